"""What the engine's inbox holds: a job on its way into the scheduler."""

from collections.abc import Callable
from typing import NamedTuple

from galley.kv.chain import Namespace
from galley.types import CacheHint

__all__ = ["Arrival"]


class Arrival(NamedTuple):
    """One submission. ``enter`` puts the job into the scheduler; the rest is for the disk tier to look up."""

    job_id: str
    enter: Callable[[], object]
    tokens: list[int]
    space: Namespace
    cache: CacheHint | None
