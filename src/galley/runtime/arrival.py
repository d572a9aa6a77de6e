"""What comes to the engine: the terms a job is submitted on, and its way into the scheduler."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from galley.kv.chain import Namespace
from galley.runtime.guide import Guide
from galley.runtime.reading import Reading
from galley.types import CacheHint

if TYPE_CHECKING:
    from galley.model.adapter import Adapter

__all__ = ["Arrival", "Terms"]


class Terms(TypedDict, total=False):
    """How a choice is to be treated; what is left out is the scheduler's default.

    Attributes:
        lane: number of the choice; noise of equal seeds differs by it.
        tenant: who gets the service charged (SCH-7); with ``salt`` it says who shares prefixes (KV-5).
        priority: lower is served first; 0 is normal.
        urgent: latency-critical: its prompt is computed in the very next step.
        max_queue_s, max_total_s: seconds until it must be started, and over (CAN-5).
        cache: what it asks of the prefix cache.
        guide: the choice's own grammar state. banned: the ids never drawn.
        reading: what it wants of its prompt's rows. adapter: what is added to the weights for it.
    """

    lane: int
    tenant: str
    salt: str | None
    priority: int
    urgent: bool
    max_queue_s: float | None
    max_total_s: float | None
    cache: CacheHint | None
    guide: Guide | None
    banned: tuple[int, ...]
    reading: Reading | None
    adapter: "Adapter | None"


class Arrival(NamedTuple):
    """One submission. ``enter`` puts the job into the scheduler; the rest is for the disk tier to look up."""

    job_id: str
    tenant: str
    enter: Callable[[], object]
    tokens: list[int]
    space: Namespace
    cache: CacheHint | None
    reads: bool = False
    """It reads rows of its prompt, which no cache has."""
