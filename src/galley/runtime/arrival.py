"""What comes to the engine: the terms a job is submitted on, and its way into the scheduler."""

from collections.abc import Callable
from typing import NamedTuple, TypedDict

from galley.kv.chain import Namespace
from galley.runtime.guide import Guide
from galley.types import CacheHint

__all__ = ["Arrival", "Terms"]


class Terms(TypedDict, total=False):
    """How a choice is to be treated; what is left out is the scheduler's default.

    ``lane`` is the number of the choice; ``tenant`` and ``salt`` say with whom it shares prefixes;
    ``priority`` is lower for first; the deadlines are in seconds; ``cache`` is what it asks of the prefix
    cache. ``guide`` is the choice's own grammar state, ``banned`` the ids never drawn.
    """

    lane: int
    tenant: str
    salt: str | None
    priority: int
    max_queue_s: float | None
    max_total_s: float | None
    cache: CacheHint | None
    guide: Guide | None
    banned: tuple[int, ...]


class Arrival(NamedTuple):
    """One submission. ``enter`` puts the job into the scheduler; the rest is for the disk tier to look up."""

    job_id: str
    enter: Callable[[], object]
    tokens: list[int]
    space: Namespace
    cache: CacheHint | None
