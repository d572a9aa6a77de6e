"""Preemption: how running jobs make room, for each other and for the latency-critical."""

from typing import TYPE_CHECKING

from galley.runtime.job import Job, State

if TYPE_CHECKING:
    from galley.runtime.plan import Plan
    from galley.runtime.scheduler import Scheduler

__all__ = ["Preemption"]


class Preemption:
    """Takes blocks from running jobs (SCH-5).

    A victim goes back to the queue with its output, noise positions and counts, and computes again what it
    lost. That is little: its full blocks stay published and go idle tail first, so what is really given up is
    as many blocks from the tail as are needed, its unfinished last block first, and nothing of its head.
    The rest is a prefix hit when it resumes, which it does before any new job of its tier is admitted.
    """

    def __init__(self, scheduler: "Scheduler") -> None:
        self.scheduler = scheduler

    def reach(self, job: Job, count: int, plan: "Plan", now: float) -> int:
        """How many of ``count`` tokens have room; forced ones, unlike a prompt's, may need blocks yet. A job
        that gives way itself has none."""
        size = self.scheduler.block_size
        while job.state is State.RUNNING:
            room = len(job.table.blocks) * size - job.computed
            if room >= count or not self.grow(job, plan, now):
                return min(room, count) if job.state is State.RUNNING else 0
        return 0

    def grow(self, job: Job, plan: "Plan", now: float) -> bool:
        """One more block for a running job, at the cost of others if need be, or of itself."""
        it = self.scheduler
        while job.state is State.RUNNING:
            if it.tree.extend(job.table, 1):
                return True
            victim = it.policy.victim(it.running, it.block_size, forced=False)
            if victim is None:
                return False
            self.preempt(victim, plan, now)
        return False

    def force(self, plan: "Plan", now: float) -> None:
        """Everyone is stalled and spared: preempt all the same until the best job can run (SCH-3).

        Ends: a job alone fits, since admission kept out what never could and idle blocks are evictable.
        """
        it = self.scheduler
        while len(it.running) > 1:
            victim = it.policy.victim(it.running, it.block_size, forced=True)
            if victim is None:
                break
            self.preempt(victim, plan, now)
            for job in it.running:
                if job.computed < len(job.table.blocks) * it.block_size or it.tree.extend(job.table, 1):
                    plan.add(job, 1)
                    return

    def clear(self, job: Job, plan: "Plan", now: float) -> bool:
        """Make room for a latency-critical job, in slots and in blocks. Only jobs of lower tiers give way.

        False, and nobody is disturbed, when all of them together would not be enough.
        """
        it = self.scheduler
        others = [other for other in it.running if other.tier > job.tier]
        need = -(-len(job.tokens) // it.block_size)
        held = sum(len(other.table.blocks) for other in others)
        if it.pool.available + held < need or len(it.running) - len(others) >= it.max_jobs:
            return False
        while len(it.running) >= it.max_jobs or not it.admission.fits(job, it.admission.match(job), ()):
            victim = it.policy.victim(
                (other for other in it.running if other.tier > job.tier), it.block_size, forced=True
            )
            if victim is None:
                return False
            self.preempt(victim, plan, now)
        return True

    def preempt(self, job: Job, plan: "Plan", now: float) -> None:
        """Back to the queue."""
        it = self.scheduler
        plan.drop(job)
        it.costs.hold(job, it.block_size, now)
        it.tree.release(job.table, job.tokens, job.computed)
        it.stop(job)
        job.computed = 0
        job.resumed_at = len(job.tokens)
        job.state = State.PREEMPTED
        job.skipped = 0
        job.meter.preemptions += 1
        it.counters.preemptions += 1
        it.policy.preempted()
        it.queue.add(job)
