"""An answer in Ollama's form: one JSON object a line, the last of them with the figures."""

from datetime import UTC, datetime
from typing import Any

import msgspec

from galley.endpoint.messages.reply import read_input
from galley.endpoint.pieces import Block, Blocks
from galley.endpoint.reply import finite
from galley.errors import GalleyError
from galley.router.router import Answer
from galley.types import Delta, TokenLogprob, Usage

__all__ = ["OllamaReply", "moment"]

encode = msgspec.json.encode
REASONS = {"length": "length"}
"""Finish reasons by Galley's; ``stop`` for all the others."""


def moment(seconds: float) -> str:
    """Unix seconds as RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


class OllamaReply:
    """One answer being written down. Calls are sent whole, since their arguments are an object here.

    Args:
        field: ``message`` of a chat, or ``response`` of a completion.
    """

    def __init__(self, answer: Answer, field: str) -> None:
        self._answer = answer
        self._field = field
        self._blocks = Blocks()
        self._sent: set[int] = set()
        self._finish = "stop"
        self._logprobs: list[TokenLogprob] = []

    def opening(self) -> bytes:
        return b""

    def take(self, delta: Delta) -> None:
        for _ in self._blocks.take(delta):
            pass
        self._logprobs += delta.logprobs or ()
        if delta.finish is not None:
            self._finish = delta.finish

    def chunks(self, delta: Delta) -> bytes:
        self.take(delta)
        shown: dict[str, Any] = {}
        if delta.logprobs:
            shown["logprobs"] = self._shown(delta.logprobs)
        # A call may still turn out to be none until something follows it.
        calls = self._calls(done=delta.finish is not None)
        if not (delta.text or delta.reasoning or calls or shown):
            return b""
        return self._line(self._said(delta.text, delta.reasoning, calls) | shown, done=False)

    def ending(self, usage: Usage) -> bytes:
        return self._line(self._said("", "", []) | self._figures(usage), done=True)

    def fault(self, error: GalleyError) -> bytes:
        return encode({"error": error.message, "code": error.code}) + b"\n"

    def whole(self, usage: Usage) -> bytes:
        text = "".join(block.text for block in self._blocks.all if block.kind == "text")
        thought = "".join(block.text for block in self._blocks.all if block.kind == "reasoning")
        found = self._said(text, thought, self._calls(done=True))
        if self._logprobs:
            found["logprobs"] = self._shown(self._logprobs)
        return self._line(found | self._figures(usage), done=True)

    def _calls(self, *, done: bool) -> list[dict[str, Any]]:
        """Calls that are complete and were not sent: all but the last block, or with ``done`` all."""
        blocks = self._blocks.all if done else self._blocks.all[:-1]
        ready = [
            block
            for block in blocks
            if block.kind == "tool" and not block.retracted and block.number not in self._sent
        ]
        self._sent |= {block.number for block in ready}
        return [call_object(block) for block in ready]

    def _said(self, text: str, thought: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
        more: dict[str, Any] = {"thinking": thought} if thought else {}
        if self._field == "response":
            return {"response": text, **more}
        more |= {"tool_calls": calls} if calls else {}
        return {"message": {"role": "assistant", "content": text, **more}}

    def _figures(self, usage: Usage) -> dict[str, Any]:
        """Times in nanoseconds. ``load_duration`` is what passed before the first step: waiting, and opening
        a model that slept."""
        receipt = self._answer.receipt
        assert receipt is not None
        times = receipt.times
        return {
            "done_reason": REASONS.get(self._finish, "stop"),
            "total_duration": nanoseconds(times.total_s),
            "load_duration": nanoseconds(times.queue_s),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": nanoseconds(times.prefill_s),
            "eval_count": usage.completion_tokens,
            "eval_duration": nanoseconds(times.decode_s),
        }

    def _line(self, fields: dict[str, Any], *, done: bool) -> bytes:
        head = {"model": self._answer.card.id, "created_at": moment(self._answer.request.created)}
        return encode({**head, **fields, "done": done}) + b"\n"

    def _shown(self, entries: list[TokenLogprob]) -> list[dict[str, Any]]:
        def one(id: int, logprob: float) -> dict[str, Any]:
            text, raw = self._answer.provider.token(id)
            return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}

        return [
            {**one(e.token_id, e.logprob), "top_logprobs": [one(*each) for each in e.top]} for e in entries
        ]


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def call_object(block: Block) -> dict[str, Any]:
    """A call as Ollama has it: arguments are an object."""
    return {"id": block.id, "function": {"name": block.name, "arguments": read_input(block.text)}}
