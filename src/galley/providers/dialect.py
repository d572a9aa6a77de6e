"""The Dialect seam: one wire format of upstreams, apart from how requests are sent and timed."""

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from galley.types import Delta, Request, Usage

__all__ = ["Dialect", "Heard", "Reader", "Timeouts"]


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. ``first`` is from sending to the commit point, ``idle`` between pieces after it."""

    connect: float = 5.0
    first: float = 60.0
    idle: float = 30.0
    slow_chars: int = 0
    """Slow-stream guard: this many characters must come within ``slow_s`` of the first one before the answer
    is committed; 0 is off (the first token is then passed on at once)."""
    slow_s: float = 5.0


class Heard:
    """What one reply, or one event of it, said."""

    __slots__ = ("deltas", "done", "model", "usage")

    def __init__(
        self,
        deltas: Sequence[Delta] = (),
        *,
        usage: Usage | None = None,
        done: bool = False,
        model: str | None = None,
    ) -> None:
        self.deltas = deltas
        self.usage = usage
        self.done = done
        self.model = model


class Reader(Protocol):
    """Reads one reply; may keep state between its events."""

    def whole(self, payload: Any) -> Heard: ...
    def event(self, name: str, data: bytes) -> Heard: ...


class Dialect(Protocol):
    """A wire format. Both methods raise nothing but what they say."""

    name: str

    def lacks(self, request: Request) -> str | None:
        """Why this format cannot carry the request faithfully; None when it can."""
        ...

    def adjusted(self, request: Request) -> dict[str, str]:
        """What is left out or changed of a request that it can carry, by path, in words."""
        ...

    def headers(self, key: str | None) -> dict[str, str]: ...

    def encode(self, request: Request, model: str) -> tuple[str, bytes]:
        """Path and body."""
        ...

    def reader(self, request: Request) -> Reader: ...
