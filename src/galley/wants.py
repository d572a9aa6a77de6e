"""Parts of a request that are types of their own."""

from typing import Literal

import msgspec

__all__ = ["CacheBreakpoint", "CacheHint", "Embed", "Pooling"]

Pooling = Literal["mean", "last", "cls"]
"""How the hidden states of a text become one vector: their mean, the last position's, the first's."""


class CacheBreakpoint(msgspec.Struct, frozen=True, kw_only=True):
    """An end of a reusable prompt prefix, as a request marks it (``cache_control``).

    Attributes:
        message: index of the message it lies in. chars: characters of that message's text before it.
        ttl: as asked for, e.g. ``5m``; ``ttl_s`` is the same in seconds.
    """

    message: int
    chars: int
    ttl: str
    ttl_s: int


class CacheHint(msgspec.Struct, frozen=True, kw_only=True):
    """What one prompt asks of the prefix cache, in tokens.

    Attributes:
        ends: prompt tokens before each breakpoint, with the seconds to keep them. Ascending.
        soon: the prompt is expected again: its blocks go to disk without waiting for an idle engine.
        memory_only: nothing of it is written to disk; it is shared only with prompts that ask for the same.
    """

    ends: tuple[tuple[int, int], ...] = ()
    soon: bool = False
    memory_only: bool = False


class Embed(msgspec.Struct, frozen=True, kw_only=True):
    """A request for embeddings: nothing is drawn, each prompt becomes one vector.

    Attributes:
        dimensions: the first so many values, for models trained to be cut (Matryoshka); None is all.
        pooling: instead of the model's own.
        normalise: to unit length, as OpenAI does.
    """

    dimensions: int | None = None
    pooling: Pooling | None = None
    normalise: bool = True
