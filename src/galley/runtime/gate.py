"""The gate: whether one more may wait, asked before it is let into the queue."""

from collections.abc import Mapping

from galley.errors import DeadlineExceeded, Overloaded, TooManyRequests
from galley.runtime.queue import Queue, Waiting
from galley.runtime.rate import ServiceRate

__all__ = ["Gate"]

UNKNOWN = 1.0
"""Seconds to wait before trying again when nothing has been measured yet."""
HORIZON_S = 60.0
"""Nobody is told to come back later than this."""


class Gate:
    """Sheds load early, so that those let in keep their latency.

    Two measures: how many wait, and how long the newcomer would wait at the rate the machine has been seen
    to serve. A tenant is measured by its own share: while others wait, it may count on ``share`` of the
    machine, so whoever floods the queue is shed and the others are not.

    When to come back: those refused are given times one after another, as far apart as it takes to serve one
    of them. If all were told the same moment, all but the first would be refused again then.

    Args:
        max_queue: most jobs waiting. A tenant with less than its share of them is let in even beyond that.
        max_wait_s: longest expected wait for the first step; None sheds nobody for it.
        budget, slots: tokens of a step and jobs running at once.
    """

    def __init__(
        self,
        queue: Queue,
        rate: ServiceRate,
        *,
        max_queue: int,
        max_wait_s: float | None,
        budget: int,
        slots: int,
    ) -> None:
        self.queue = queue
        self.rate = rate
        self.max_queue = max_queue
        self.max_wait_s = max_wait_s
        self.budget = budget
        self.slots = slots
        self._promised: dict[str, float] = {}  # by tenant: the time given to the last one refused

    def admit(
        self,
        tenant: str,
        max_queue_s: float | None = None,
        *,
        now: float,
        running: int = 0,
        inbox: Mapping[str, Waiting] | None = None,
    ) -> None:
        """Let one more job of the tenant in, or raise. May be called beside the engine thread: an estimate.

        Args:
            now: monotonic seconds.
            running: jobs that run now.
            inbox: by tenant, work on its way to the queue and not yet in it.

        Raises Overloaded (503) when the server as a whole has too much to do, TooManyRequests (429) when it
        is this tenant that has, DeadlineExceeded when it would wait longer than its own ``max_queue_s``. Each
        says after what time to try again, from the measured rate.
        """
        queue = self.queue
        inbox = inbox or {}
        mine = [queue.tenants.get(tenant), inbox.get(tenant)]
        own = sum(part.jobs for part in mine if part is not None)
        waiting = queue.all.jobs + sum(part.jobs for part in inbox.values())
        share = queue.fairness.share(tenant)
        if waiting >= self.max_queue and (share == 1.0 or own + 1 > share * self.max_queue):
            wait = self.wait_s(tenant, running=running, inbox=inbox)
            each = UNKNOWN if wait is None else wait / max(1, waiting)
            raise self._refusal(tenant, share, f"{waiting} requests are waiting already", each, now)
        limit = self.max_wait_s
        if limit is None and max_queue_s is None:
            return
        wait = self.wait_s(tenant, running=running, inbox=inbox)
        if wait is None:
            return
        if max_queue_s is not None and wait > max_queue_s:
            raise DeadlineExceeded(
                f"the request would wait about {wait:.1f} s, more than its max_queue_s of {max_queue_s:g} s",
                kind="queue",
                retry_after_s=wait - max_queue_s,
            )
        if limit is not None and wait > limit:
            why = f"a new request would wait about {wait:.1f} s for its first step"
            raise self._refusal(tenant, share, why, wait - limit, now)

    def wait_s(
        self, tenant: str, *, running: int = 0, inbox: Mapping[str, Waiting] | None = None
    ) -> float | None:
        """Expected seconds until a job of the tenant that came now would be started; None when not known.

        All that waits, or the tenant's own part at its own pace where that is less.
        """
        queue = self.queue
        inbox = inbox or {}
        whole = self._drain_s([queue.all, *inbox.values()], running)
        share = queue.fairness.share(tenant)
        if whole is None or share == 1.0:
            return whole
        own = self._drain_s([queue.tenants.get(tenant), inbox.get(tenant)], running)
        return whole if own is None else min(whole, own / share)

    def _drain_s(self, parts: list[Waiting | None], running: int) -> float | None:
        there = [part for part in parts if part is not None]
        # Free slots are filled at once; only what comes after them waits for answers to end.
        later = max(0, sum(part.jobs for part in there) + running + 1 - self.slots)
        return self.rate.seconds(
            sum(part.tokens for part in there),
            later * self.rate.output_tokens,
            budget=self.budget,
            slots=self.slots,
            rows=min(running, self.slots),
        )

    def _refusal(self, tenant: str, share: float, why: str, soonest_s: float, now: float) -> Overloaded:
        """The error with the next free time; O(1), but for forgetting times gone by."""
        each = self._each_s(share)
        if len(self._promised) > 256:
            self._promised = {who: until for who, until in self._promised.items() if until > now}
        at = max(now + soonest_s, self._promised.get(tenant, 0.0) + each)
        self._promised[tenant] = at = min(at, now + HORIZON_S)
        if share < 1.0:
            return TooManyRequests(f"{why}; {tenant!r} has its share of the queue", retry_after_s=at - now)
        return Overloaded(why, retry_after_s=at - now)

    def _each_s(self, share: float) -> float:
        """Seconds of the machine that one more request takes, all slots being busy."""
        rate, output = self.rate, self.rate.output_tokens
        prompt = max(0.0, rate.length - output)
        each = rate.seconds(prompt, output, budget=self.budget, slots=self.slots, rows=self.slots)
        return 0.0 if each is None else each / share
