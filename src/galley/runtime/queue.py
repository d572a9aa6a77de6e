"""The waiting line: strict tiers with ageing, fair shares between tenants inside a tier."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from itertools import islice

from galley.runtime.fairness import Fairness
from galley.runtime.job import URGENT, Job, State

__all__ = ["Queue", "Waiting", "urgent_tokens"]

Rank = tuple[int, bool, float, int]
Key = tuple[int, bool, str]


class Waiting:
    """What one tenant, or all, have waiting."""

    __slots__ = ("jobs", "tokens")

    def __init__(self) -> None:
        self.jobs = 0
        self.tokens = 0
        """Tokens they know; some may be found in the cache."""

    def more(self, tokens: int) -> None:
        """One more job."""
        self.jobs += 1
        self.tokens += tokens

    def fewer(self, tokens: int) -> None:
        """One job less."""
        self.jobs -= 1
        self.tokens -= tokens


class Queue:
    """Jobs that hold no blocks. ``add`` and ``remove`` are O(1).

    Order: effective tier (lower first), then preempted jobs before new ones (SCH-5), then the tenant with
    the smallest counter (SCH-7), then arrival. Every ``age_s`` seconds of waiting lift a job by one tier, up
    to the best one in which anybody waits, so that no tier starves. It goes no higher: there the counters
    decide, and age must not undo them. Nothing is lifted to the latency-critical tier.
    """

    def __init__(self, age_s: float = 10.0, fairness: Fairness | None = None) -> None:
        self.age_s = age_s
        self.fairness = fairness or Fairness()
        self.all = Waiting()
        self.tenants: dict[str, Waiting] = {}
        # Per (tier, is_new, tenant), in order of arrival; preempted jobs come back in any order and are
        # sorted when read: they are few. OrderedDict, since a dict is slow to find its head after removals.
        self._lines: dict[Key, OrderedDict[Job, None]] = {}

    def __len__(self) -> int:
        return self.all.jobs

    def __contains__(self, job: Job) -> bool:
        return job in self._lines.get(key_of(job), ())

    @property
    def urgent(self) -> int:
        """Known tokens of the latency-critical jobs that wait. O(lines)."""
        return sum(urgent_tokens(line) for key, line in self._lines.items() if key[0] == URGENT)

    def add(self, job: Job) -> None:
        """Append a WAITING or PREEMPTED job."""
        self._lines.setdefault(key_of(job), OrderedDict())[job] = None
        self.all.more(len(job.tokens))
        self.tenants.setdefault(job.tenant, Waiting()).more(len(job.tokens))
        self.fairness.wait(job.tenant, job.tier)

    def remove(self, job: Job) -> None:
        """Take a job out; its state must not have changed since ``add``. Raises KeyError when absent."""
        line = self._lines[key_of(job)]
        del line[job]
        if not line:
            del self._lines[key_of(job)]
        self.all.fewer(len(job.tokens))
        mine = self.tenants[job.tenant]
        mine.fewer(len(job.tokens))
        if not mine.jobs:
            del self.tenants[job.tenant]
        self.fairness.leave(job.tenant, job.tier)

    def tier(self, job: Job, now: float) -> int:
        """The job's tier, with its age."""
        if job.tier == URGENT:
            return URGENT
        top = min((key[0] for key in self._lines if key[0] != URGENT), default=job.tier)
        return self._aged(job, now, top)

    def best(self, now: float) -> tuple[int, float] | None:
        """Effective tier and counter of the job that ``ordered`` gives first. O(lines)."""
        job = next(self.ordered(now), None)
        return None if job is None else (self.tier(job, now), self.fairness[job.tenant])

    def ordered(self, now: float) -> Iterator[Job]:
        """All jobs, best first. Lazy: O(lines), then O(log lines) a job.

        Between two steps of the iterator the job just given may be removed and its tenant charged, which
        counts from the next step on. A job that stays is passed over as if it had been served.
        """
        top = min((key[0] for key in self._lines if key[0] != URGENT), default=0)
        passed: dict[Key, int] = {}
        extra: dict[str, float] = {}
        lines = {
            key: line if key[1] else OrderedDict.fromkeys(sorted(line, key=lambda job: job.sequence))
            for key, line in self._lines.items()
        }

        def rank(job: Job) -> Rank:
            tier = URGENT if job.tier == URGENT else self._aged(job, now, top)
            counter = self.fairness[job.tenant] + extra.get(job.tenant, 0.0)
            return (tier, job.state is State.WAITING, counter, job.sequence)

        heads = [(rank(job), key, job) for key, line in lines.items() for job in islice(line, 1)]
        heapify(heads)
        while heads:
            before, key, job = heappop(heads)
            after = rank(job)
            if after > before:  # its tenant has been charged meanwhile
                heappush(heads, (after, key, job))
                continue
            yield job
            if job in self:
                passed[key] = passed.get(key, 0) + 1
                price = self.fairness.price(job.tenant, len(job.tokens))
                extra[job.tenant] = extra.get(job.tenant, 0.0) + price
            elif not key[1]:
                del lines[key][job]  # a sorted copy
            for follower in islice(lines[key], passed.get(key, 0), passed.get(key, 0) + 1):
                heappush(heads, (rank(follower), key, follower))

    def _aged(self, job: Job, now: float, top: int) -> int:
        lifted = int((now - job.meter.arrived) // self.age_s)
        return max(job.tier - lifted, min(top, job.tier))


def urgent_tokens(jobs: Iterable[Job]) -> int:
    """Prompt tokens that latency-critical jobs among these have yet to compute."""
    left = ((job, len(job.tokens) - job.computed) for job in jobs if job.tier == URGENT)
    return sum(tokens for job, tokens in left if tokens > 1 or job.state is not State.RUNNING)


def key_of(job: Job) -> Key:
    """The line a job stands in."""
    return (job.tier, job.state is State.WAITING, job.tenant)
