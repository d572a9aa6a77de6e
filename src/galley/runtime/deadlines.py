"""Deadlines of jobs: time in the queue and time in all (CAN-5)."""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Literal

from galley.errors import DeadlineExceeded
from galley.runtime.job import Job

__all__ = ["Deadlines"]


class Deadlines:
    """A heap of clock values. ``add`` is O(log n); jobs that are over are dropped lazily."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Literal["queue", "total"], Job]] = []
        self._floor = 64

    def add(self, job: Job, now: float) -> None:
        """Watch a job that arrives now; nothing to do when it has no deadline."""
        if len(self._heap) > self._floor:  # jobs that ended long before their deadline must not pile up
            self._heap = [entry for entry in self._heap if not entry[3].over]
            heapify(self._heap)
            self._floor = max(64, 2 * len(self._heap))
        if job.max_queue_s is not None:
            heappush(self._heap, (now + job.max_queue_s, job.sequence, "queue", job))
        if job.max_total_s is not None:
            heappush(self._heap, (now + job.max_total_s, job.sequence, "total", job))

    @property
    def next(self) -> float | None:
        """Earliest clock value at which a job may expire."""
        while self._heap and self._heap[0][3].over:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Iterator[tuple[Job, DeadlineExceeded]]:
        """Jobs whose time is up, each with its error; they leave the heap."""
        while self._heap and self._heap[0][0] <= now:
            _, _, kind, job = heappop(self._heap)
            if job.over or (kind == "queue" and job.meter.first_scheduled is not None):
                continue
            limit, where = (job.max_queue_s, "queueing") if kind == "queue" else (job.max_total_s, "in all")
            yield job, DeadlineExceeded(f"the request took more than {limit:g} s {where}", kind=kind)
