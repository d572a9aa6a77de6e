"""Scheduling judgement, apart from its mechanics: who is admitted, who gives way."""

from collections.abc import Iterable

from galley.runtime.job import Job

__all__ = ["Policy"]


class Policy:
    """The default policy; replace it to schedule otherwise. Holds numbers, never jobs.

    Args:
        watermark: share of the pool kept free when admitting beside running jobs (SCH-10).
        hold_back: a shared uncached prefix of this many tokens is computed by one job first (SCH-8).
        patience: steps for which smaller jobs may pass one that does not fit (SCH-4).
        look: waiting jobs considered in one step.
        window: waiting jobs among which the one with the longest cached prefix goes first (SCH-8); 1 is off.
        slack: most that the counters of their tenants may differ (SCH-7), in prompt tokens.
        spare: slots that only a tenant with no running job may take, where there are at least eight (SCH-7).
        order_queue: with more jobs than this waiting, their order is left alone (SCH-8).
    """

    def __init__(
        self,
        *,
        watermark: float = 0.01,
        hold_back: int = 32,
        patience: int = 32,
        look: int = 16,
        window: int = 8,
        slack: float = 512.0,
        order_queue: int = 128,
        spare: int = 1,
    ) -> None:
        self.watermark = watermark
        self.hold_back = hold_back
        self.patience = patience
        self.look = look
        self.window = window
        self.slack = slack
        self.order_queue = order_queue
        self.spare = spare
        self.floor = 0.1
        self.ratio = 0.4

    def step(self) -> None:
        """A step without preemption: the admission estimate decays to its floor (SCH-10)."""
        if self.ratio > self.floor:
            self.ratio = max(self.floor, self.ratio * 0.995)

    def preempted(self) -> None:
        """A preemption shows the estimate was too low: it jumps (SCH-10)."""
        self.ratio = min(1.0, self.ratio + 0.3)

    def reserve(self, jobs: Iterable[Job], block_size: int, pool_size: int) -> int:
        """Blocks to leave for the expected output of ``jobs``, watermark included (SCH-10).

        The most a job may still draw is a poor guess when it asked for no limit: 4096 tokens bound it.
        """
        tokens = sum(min(job.remaining, 4096) for job in jobs)
        return int(self.ratio * tokens) // block_size + max(1, int(self.watermark * pool_size))

    def slots(self, max_jobs: int, *, newcomer: bool) -> int:
        """How many jobs may run for one more of this tenant to start; a newcomer has none running."""
        return max_jobs if newcomer or max_jobs < 8 else max_jobs - self.spare

    def victim(self, jobs: Iterable[Job], block_size: int, *, forced: bool) -> Job | None:
        """Who gives up its blocks: lowest tier, then least lost work, then newest (SCH-5).

        Lost work is what neither a published block nor a twin of one keeps. A job that has drawn fewer than
        ``block_size`` tokens since its last preemption is spared, unless ``forced``.
        """
        best, worst_rank = None, None
        for job in jobs:
            spared = job.resumed_at >= 0 and len(job.tokens) - job.resumed_at < block_size
            if spared and not forced:
                continue
            rank = (job.tier, -(job.computed % block_size), job.sequence)
            if worst_rank is None or rank > worst_rank:
                best, worst_rank = job, rank
        return best
