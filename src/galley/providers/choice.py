"""One choice: the engine's steps in, deltas out."""

import msgspec

from galley.model.model import Model
from galley.providers.outbox import in_order, merge
from galley.runtime.out import StepOut
from galley.runtime.text.harmony import HarmonyOutput
from galley.runtime.text.output import Output, Piece
from galley.runtime.text.stream import TextStream
from galley.types import Delta, FinishReason, SamplingParams

__all__ = ["ChoiceText"]


class ChoiceText:
    """Steps of one choice in, deltas out.

    Args:
        output: tells reasoning and tool calls from text; None where there are none.
        shown: control tokens that ``output`` has to see.
    """

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        params: SamplingParams,
        index: int,
        *,
        output: Output | HarmonyOutput | None = None,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self.ended = False
        self._index = index
        self._params = params
        self._output = output
        self._text = TextStream(
            model.tokenizer,
            prompt_ids=prompt,
            skip_special=params.skip_special_tokens,
            stops=params.stops,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
            shown=shown if output is not None else frozenset(),
        )

    def read(self, out: StepOut) -> list[Delta]:
        """One step as deltas: one, unless its pieces are in an order that one cannot have. After a stop
        string completes, ``ended`` is set and later ids do not count."""
        ids = out.token_ids
        # The token that ended the output is counted but not shown, unless the user asked for it.
        shown = ids
        asked = out.stop_token is not None and self._params.include_stop_str_in_output
        if out.finish == "stop" and ids and not asked and not out.complete:
            shown = ids[:-1]
        pieces, reasoned, stopped, kept = self._pieces(shown)
        finish: FinishReason | None = out.finish
        stop: str | int | None = out.stop_token
        if stopped is not None:
            finish, stop, ids = "stop", stopped, ids[:kept]
            pieces += self._end("stop")
        elif finish is not None:
            pieces += self._end(finish)
        self.ended = finish is not None
        if finish == "stop" and self._output is not None and self._output.good:
            finish = "tool_calls"
        deltas = [Delta(index=self._index)]
        for piece in pieces:
            added = Delta(
                index=self._index,
                text=piece.text,
                reasoning=piece.reasoning,
                tool_calls=[piece.call] if piece.call is not None else [],
                warnings=[piece.warning] if piece.warning else [],
            )
            if in_order(deltas[-1], added):
                deltas[-1] = merge(deltas[-1], added)
            else:
                deltas.append(added)
        deltas[0] = msgspec.structs.replace(
            deltas[0],
            token_ids=ids,
            reasoning_tokens=reasoned,
            logprobs=None if out.logprobs is None else out.logprobs[: len(ids)],
            cached_tokens=out.cached_tokens,
            prompt_logprobs=out.prompt,
        )
        deltas[-1] = msgspec.structs.replace(deltas[-1], finish=finish, stop=stop)
        return deltas

    def _pieces(self, ids: list[int]) -> tuple[list[Piece], int, str | None, int]:
        """What the ids make certain, how many of them are reasoning, the stop string they complete, and how
        many of them count."""
        if self._output is None:
            read = self._text.push(ids)
            return [Piece(text=read.text)] if read.text else [], 0, read.stop, read.kept
        pieces: list[Piece] = []
        reasoned = 0
        for place, token in enumerate(ids):
            # One by one, so that the count of reasoning tokens does not depend on how steps were merged.
            reasoned += self._output.reasoning
            read = self._text.push([token])
            pieces += self._output.feed(read.text)
            if read.stop is not None:
                return pieces, reasoned, read.stop, place + 1
        return pieces, reasoned, None, len(ids)

    def _end(self, finish: FinishReason) -> list[Piece]:
        """What was held back."""
        text = self._text.flush(finish)
        if self._output is None:
            return [Piece(text=text)] if text else []
        return [*self._output.feed(text), *self._output.flush(finish)]
