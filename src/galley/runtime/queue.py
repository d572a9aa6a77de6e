"""The waiting line: tiers by priority with ageing, first come first served inside a tier."""

from collections.abc import Iterator
from heapq import merge

from galley.runtime.job import Job, State

__all__ = ["Queue"]


class Queue:
    """Jobs that hold no blocks yet. ``add`` and ``remove`` are O(1).

    Order: effective priority (lower first), then preempted jobs before new ones (SCH-5), then arrival.
    Every ``age_s`` seconds of waiting lifts a job by one tier, so that no tier starves (SCH-7).
    """

    def __init__(self, age_s: float = 10.0) -> None:
        self.age_s = age_s
        # Per (priority, is_new): insertion-ordered, so a line is sorted by arrival as long as jobs are added
        # as they arrive. Preempted jobs come back in any order and are sorted when read: they are few.
        self._lines: dict[tuple[int, bool], dict[Job, None]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, job: Job) -> bool:
        return job in self._lines.get((job.priority, job.state is State.WAITING), ())

    def add(self, job: Job) -> None:
        """Append a WAITING or PREEMPTED job."""
        self._lines.setdefault((job.priority, job.state is State.WAITING), {})[job] = None
        self._count += 1

    def remove(self, job: Job) -> None:
        """Take a job out; its state must not have changed since ``add``. Raises KeyError when absent."""
        key = (job.priority, job.state is State.WAITING)
        line = self._lines[key]
        del line[job]
        self._count -= 1
        if not line:
            del self._lines[key]

    def ordered(self, now: float) -> Iterator[Job]:
        """All jobs, best first. Lazy: reading the first k costs O(k). Do not mutate while reading."""

        def rank(job: Job) -> tuple[float, bool, int]:
            lifted = (now - job.meter.arrived) // self.age_s
            return (job.priority - lifted, job.state is State.WAITING, job.sequence)

        lines = [
            iter(line) if new else iter(sorted(line, key=rank)) for (_, new), line in self._lines.items()
        ]
        return lines[0] if len(lines) == 1 else merge(*lines, key=rank)
