"""What LLM answers with. The shapes are those vLLM's users know."""

from collections.abc import Callable

import msgspec

from galley.types import Delta, FinishReason, Pooling, Receipt, TokenLogprob, Usage

__all__ = ["Completion", "Embedding", "Logprob", "Result", "completion"]


class Logprob(msgspec.Struct, frozen=True):
    """Log-probability of one token under the raw model distribution; ``rank`` 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """One choice.

    Attributes:
        token_ids: what was drawn, an end token included; nothing after a stop string.
        stop_reason: the stop string or stop token id that ended it, None for the model's own end.
        logprobs: per token, id to Logprob of the token drawn and of the alternatives asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float | None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one prompt. ``prompt`` is None when it came as ids or messages.

    ``prompt_logprobs`` is always None: they cannot be asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    usage: Usage
    receipt: Receipt
    finished: bool = True
    prompt_logprobs: None = None

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return self.usage.cached_tokens


class Embedding(msgspec.Struct, frozen=True, kw_only=True):
    """The vector of one text. ``prompt`` is None when it came as ids; ``pooling`` says how it was made."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    embedding: list[float]
    pooling: Pooling
    usage: Usage
    receipt: Receipt


def completion(
    index: int, pieces: list[Delta], decode: Callable[[list[int]], str], *, wanted: bool
) -> Completion:
    """All deltas of one choice as one."""
    drawn: list[TokenLogprob] = [entry for piece in pieces for entry in piece.logprobs or ()]
    finish = pieces[-1].finish
    if finish is None:
        raise RuntimeError("a choice ended without a finish reason")
    return Completion(
        index=index,
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        finish_reason=finish,
        stop_reason=pieces[-1].stop,
        logprobs=[table(entry, decode) for entry in drawn] if wanted else None,
        cumulative_logprob=sum(entry.logprob for entry in drawn) if wanted else None,
    )


def table(entry: TokenLogprob, decode: Callable[[list[int]], str]) -> dict[int, Logprob]:
    """The drawn token and its alternatives by id, as vLLM lists them."""
    listed = {entry.token_id: Logprob(entry.logprob, entry.rank, decode([entry.token_id]))}
    for place, (token, value) in enumerate(entry.top):
        listed.setdefault(token, Logprob(value, place + 1, decode([token])))
    return listed
