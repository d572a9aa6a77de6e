"""The scheduler's invariant checker: after every operation in tests, at idle in production."""

from collections import Counter
from typing import TYPE_CHECKING

from galley.runtime.job import State

if TYPE_CHECKING:
    from galley.runtime.scheduler import Scheduler

__all__ = ["violations"]


def violations(scheduler: "Scheduler") -> list[str]:
    """What is wrong with blocks, tables and job lists, in words; empty when all is well. Mutates nothing.

    O(N + tables). KV-1, KV-2, KV-6, KV-7 by the tree; SCH-1's bounds and the job lists here.
    """
    jobs, running, queue = scheduler.jobs, scheduler.running, scheduler.queue
    faults = scheduler.tree.check(job.table for job in jobs.values())
    for job in jobs.values():
        held = len(job.table.blocks)
        if job.over:
            faults.append(f"job {job.id} is over but still listed")
        elif job.state is State.RUNNING:
            if job not in running or job.computed > held * scheduler.block_size:
                faults.append(f"running job {job.id}: {job.computed} computed in {held} blocks")
            if not job.computed < len(job.tokens) <= job.limit:
                faults.append(f"SCH-1: job {job.id} computed {job.computed} of {len(job.tokens)}")
        elif held or job.computed or job not in queue:
            faults.append(f"waiting job {job.id} holds {held} blocks")
    if Counter(job.tenant for job in running) != scheduler.slots:
        faults.append(f"slots by tenant are miscounted: {scheduler.slots}")
    if len(running) + len(queue) != len(jobs) or len(running) > scheduler.max_jobs:
        faults.append(f"{len(running)} running + {len(queue)} waiting != {len(jobs)} jobs")
    return faults
