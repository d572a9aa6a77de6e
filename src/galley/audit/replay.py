"""Re-running a captured request: what must be the same, and whether it was (SMP-5)."""

from typing import Any

import msgspec

from galley.errors import InvalidRequest
from galley.types import Receipt, Request, SamplingParams

__all__ = ["Comparison", "captured", "compare"]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of a receipt against the same choice run again.

    Attributes:
        place: index of the first token that differs; None when the ids are the same.
        then, now: the token ids, of the receipt and of the run.
    """

    index: int
    place: int | None
    then: list[int]
    now: list[int]

    @property
    def same(self) -> bool:
        return self.place is None


def captured(receipt: Receipt) -> Request:
    """The request behind a receipt, with the parameters and the seed that were used.

    Raises InvalidRequest when prompt or output were not captured, or when the request did not end well.
    """
    if receipt.prompt is None or receipt.output_ids is None:
        raise InvalidRequest(
            f"The receipt {receipt.id} holds no prompt and output to compare.",
            code="not_captured",
            hint="Serve with --capture (receipts.capture) to be able to replay.",
        )
    if receipt.status != "ok":
        raise InvalidRequest(
            f"The request of {receipt.id} ended as {receipt.status!r}; only whole answers are compared.",
            code="not_replayable",
        )
    given: dict[str, Any] = dict(receipt.params)
    if given.pop("seeds", None):
        raise InvalidRequest("A request with a seed for each prompt is not replayed.", code="not_replayable")
    try:
        params = msgspec.convert(given, SamplingParams, str_keys=True)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The receipt's parameters cannot be read: {error}") from error
    chat = isinstance(receipt.prompt, list) and all(isinstance(turn, dict) for turn in receipt.prompt)
    return Request(
        id=f"replay_{receipt.id}",
        api="cli.replay",
        model=receipt.model,
        params=params,
        created=receipt.created,
        messages=receipt.prompt if chat else None,
        prompts=None if chat else receipt.prompt,
        capture=True,
        **receipt.asked,
    )


def compare(then: list[list[int]], now: list[list[int]]) -> list[Comparison]:
    """Token ids choice by choice; a missing choice has no tokens. O(tokens)."""
    found = []
    for index in range(max(len(then), len(now))):
        old = then[index] if index < len(then) else []
        new = now[index] if index < len(now) else []
        place = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
        if place is None and len(old) != len(new):
            place = min(len(old), len(new))
        found.append(Comparison(index=index, place=place, then=old, now=new))
    return found
