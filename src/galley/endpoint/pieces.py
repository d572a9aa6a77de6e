"""One choice's output in the order it came: runs of reasoning, of text, and tool calls.

The one place where a Delta is read for the APIs that number what they send (responses, messages).
"""

from collections.abc import Iterator
from typing import Literal

import msgspec

from galley.types import Delta, TokenLogprob

__all__ = ["Block", "Blocks", "Event"]

Kind = Literal["reasoning", "text", "tool"]


class Block:
    """A run of one kind. ``text`` is prose, or the arguments of a tool call."""

    def __init__(self, kind: Kind, number: int, *, id: str = "", name: str = "") -> None:
        self.kind = kind
        self.number = number
        self.id = id
        self.name = name
        self.parts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.retracted = False

    @property
    def text(self) -> str:
        return "".join(self.parts)


class Event(msgspec.Struct, frozen=True):
    """``open`` and ``close`` frame a block; ``add`` brings more of it."""

    what: Literal["open", "add", "close"]
    block: Block
    text: str = ""
    logprobs: list[TokenLogprob] | None = None


class Blocks:
    """Deltas of one choice in, events out; keeps all blocks. O(length of the output)."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None
        self._calls: dict[int, Block] = {}

    def take(self, delta: Delta) -> Iterator[Event]:
        """The events of one delta."""
        if delta.reasoning:
            yield from self._turn_to("reasoning")
            yield self._add(delta.reasoning)
        if delta.text or (delta.logprobs and not delta.reasoning and not delta.tool_calls):
            yield from self._turn_to("text")
            yield self._add(delta.text, delta.logprobs)
        for piece in delta.tool_calls:
            call = self._calls.get(piece.index)
            if piece.retracted:
                if call is not None:
                    call.retracted = True
                continue
            if call is None:
                call = Block("tool", len(self.all), id=piece.id or "", name=piece.name or "")
                self._calls[piece.index] = call
                yield from self._begin(call)
            if piece.arguments:
                call.parts.append(piece.arguments)
                yield Event("add", call, piece.arguments)

    def end(self) -> Iterator[Event]:
        """Close what is open; an answer without any output becomes one empty text."""
        if not self.all:
            yield from self._turn_to("text")
        if self._open is not None:
            yield Event("close", self._open)
            self._open = None

    def _turn_to(self, kind: Kind) -> Iterator[Event]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(Block(kind, len(self.all)))

    def _begin(self, block: Block) -> Iterator[Event]:
        if self._open is not None:
            yield Event("close", self._open)
        self._open = block
        self.all.append(block)
        yield Event("open", block)

    def _add(self, text: str, logprobs: list[TokenLogprob] | None = None) -> Event:
        assert self._open is not None
        self._open.parts.append(text)
        self._open.logprobs.extend(logprobs or ())
        return Event("add", self._open, text, logprobs)
