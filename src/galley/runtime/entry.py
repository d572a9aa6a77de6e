"""The entry: from the inbox into the scheduler, by way of the disk where that is worth it."""

from collections.abc import Callable
from concurrent.futures import Future

from galley.errors import GalleyError
from galley.runtime.arrival import Arrival
from galley.runtime.inbox import Inbox
from galley.runtime.meter import JobMeter
from galley.runtime.out import StepOut
from galley.runtime.park import Parked, park
from galley.runtime.scheduler import Scheduler
from galley.runtime.tier import DiskTier

__all__ = ["Entry"]


class Entry:
    """Owned by an Engine; its verbs are for the engine thread. What ends here is returned, to be told.

    Args:
        tier: the disk tier, or None.
        clock: monotonic seconds.
    """

    def __init__(
        self, scheduler: Scheduler, inbox: Inbox, tier: DiskTier | None, clock: Callable[[], float]
    ) -> None:
        self.scheduler = scheduler
        self.inbox = inbox
        self.tier = tier
        self._clock = clock
        self._loading: dict[str, Arrival] = {}

    def __len__(self) -> int:
        """Jobs that wait for the disk."""
        return len(self._loading)

    def take(self) -> list[StepOut]:
        """Take the inbox: first submits, then cancels and parks, so that these find their job."""
        if not self.inbox:
            return []
        submits, verdicts, parks = self.inbox.take(parks=not self.scheduler.inflight)
        now, tree = self._clock(), self.scheduler.tree
        ended: list[StepOut] = []
        for arrival in submits:
            job_id, prompt, space, cache = arrival.job_id, arrival.tokens, arrival.space, arrival.cache
            tier = None if arrival.reads else self.tier
            if tier is not None and tier.arrive(tree, job_id, space, prompt, cache):
                self._loading[job_id] = arrival
            else:
                self._enter(arrival, ended)
        for job_id, well in verdicts:
            loading = self._loading.pop(job_id, None)
            if loading is None:
                (self.scheduler.finish if well else self.scheduler.cancel)(job_id, now)
            elif self.tier is not None:
                self.tier.loads.abandon(job_id)
                self.inbox.came(loading)
                cancelled = GalleyError("the request was cancelled", code="cancelled")
                ended.append(StepOut(job_id=job_id, error=cancelled, meter=JobMeter(finished=now)))
        for job_id, future in parks:
            self._park(job_id, future, ended)
        return ended

    def loaded(self, tier: DiskTier) -> list[StepOut]:
        """Let those in whose blocks have come from the disk, or are not to be had."""
        refused: list[StepOut] = []
        for job_id in tier.loads.ready(self.scheduler.tree):
            self._enter(self._loading.pop(job_id), refused)
        return refused

    def close(self, error: GalleyError) -> list[StepOut]:
        """End with ``error`` what is not in the scheduler yet, once the cache is written."""
        post = self.inbox.close()
        left = [*self._loading.values(), *post.submits]
        self._loading = {}
        if self.tier is not None:
            self.tier.close(self.scheduler.tree)
        for _, future in post.parks:
            future.set_exception(error)
        now = self._clock()
        return [StepOut(job_id=a.job_id, error=error, meter=JobMeter(finished=now)) for a in left]

    def _enter(self, arrival: Arrival, refused: list[StepOut]) -> None:
        try:
            arrival.enter()
        except GalleyError as error:
            meter = JobMeter(finished=self._clock())
            refused.append(StepOut(job_id=arrival.job_id, error=error, meter=meter))
        finally:
            self.inbox.came(arrival)

    def _park(self, job_id: str, future: "Future[Parked]", refused: list[StepOut]) -> None:
        """One park between steps; a job that still waits for the disk enters first."""
        if not future.set_running_or_notify_cancel():
            return
        if job_id in self._loading and self.tier is not None:
            self.tier.loads.abandon(job_id)
            self._enter(self._loading.pop(job_id), refused)
        try:
            parked = park(self.scheduler, job_id, self._clock())
        except GalleyError as error:
            future.set_exception(error)
            return
        if self.tier is not None:
            space = self.scheduler.namespace(parked.tenant, parked.salt, parked.cache)
            self.tier.want(self.scheduler.tree, space, parked.tokens)
        future.set_result(parked)
