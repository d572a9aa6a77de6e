"""Intake: waiting jobs become running ones."""

from itertools import islice
from typing import TYPE_CHECKING, Any

from galley.kv.tree import Node
from galley.runtime.arrival import Terms
from galley.runtime.job import URGENT, Job, State
from galley.types import SamplingParams

if TYPE_CHECKING:
    from galley.runtime.plan import Plan
    from galley.runtime.scheduler import Scheduler

__all__ = ["Intake"]

LOOK = 128
"""Waiting jobs looked at in one step, however they are skipped."""
SCORED = 128
"""Most tokens of prompts that are scored in a step: a row of logits is a vocabulary wide."""


class Intake:
    """Starts what ``Admission`` says may start, in its order."""

    def __init__(self, scheduler: "Scheduler") -> None:
        self.scheduler = scheduler

    def job(self, job_id: str, prompt: list[int], params: SamplingParams, now: float, terms: Terms) -> Job:
        """A job on these terms, not queued yet."""
        it, cache = self.scheduler, terms.get("cache")
        tenant = terms.get("tenant", "local")
        own: dict[str, Any] = {name: value for name, value in terms.items() if name not in ("salt", "cache")}
        job = Job(
            job_id,
            prompt,
            params,
            eos=it.eos,
            context=it.admission.room,
            sequence=0,
            now=now,
            namespace=it.namespace(tenant, terms.get("salt"), cache, terms.get("adapter")),
            **own,
        )
        if cache is not None:  # whole blocks are kept
            size = it.block_size
            job.meter.cache_ends = tuple((end // size * size, ttl_s) for end, ttl_s in cache.ends)
        return job

    def admit(self, plan: "Plan", now: float, before: int, rival: Job | None = None) -> None:
        """Start waiting jobs while there is room; with a ``rival``, only those whose turn is before its.

        In a step with a preemption (there were fewer ``before``) only latency-critical jobs are admitted.
        """
        it = self.scheduler
        queue, admission, running = it.queue, it.admission, it.running
        if not queue or plan.tokens >= it.token_budget:
            return
        level = None if rival is None else (queue.tier(rival, now), it.fairness[rival.tenant])
        missed = 0
        for job in islice(admission.candidates(queue, now), LOOK):
            urgent = job.tier == URGENT
            if plan.tokens >= it.token_budget:
                return
            if level is not None and (queue.tier(job, now), it.fairness[job.tenant]) >= level:
                return
            slots = it.policy.slots(it.max_jobs, newcomer=job.tenant not in it.slots)
            if not urgent and (len(running) >= slots or before != it.counters.preemptions):
                return
            if (not urgent and admission.still_held(job)) or self.most(job, plan) < 1:
                continue
            path = admission.match(job)
            if not urgent and admission.hold_back(job, len(path), running):
                continue
            free = len(running) < it.max_jobs
            if urgent and not (free and admission.fits(job, path, ())):
                free = it.preemption.clear(job, plan, now)
                path = admission.match(job)
            if not (free and admission.fits(job, path, () if urgent else running)):
                # Smaller ones may pass for a while, then the line stops here (SCH-4). What a preempted job
                # has left in the cache is not for new ones to take (SCH-5).
                job.skipped += 1
                missed += 1
                stuck = job.state is State.PREEMPTED or job.skipped > it.policy.patience
                if stuck or missed >= it.policy.look:
                    return
                continue
            if job.adapter is not None and not it.residency.hold(job.adapter):
                continue  # LRA-5: it waits for a slot, and nobody waits for it
            self._start(job, path, now)
            plan.add(job, self.most(job, plan))

    def most(self, job: Job, plan: "Plan") -> int:
        """Tokens that a job may have in this step (SCH-1)."""
        it = self.scheduler
        most = min(len(job.tokens) - job.computed, it.token_budget - plan.tokens, it.chunk)
        if job.reading is not None and not job.reading.states:
            most = min(most, SCORED - plan.scored)
        return most

    def _start(self, job: Job, path: list[Node], now: float) -> None:
        it = self.scheduler
        it.queue.remove(job)
        it.tree.claim(job.table, path)
        if not it.tree.extend(job.table, -(-len(job.tokens) // it.block_size) - len(path)):
            raise RuntimeError("KV-1: blocks counted as available were not")
        job.computed = len(path) * it.block_size
        meter, counters = job.meter, it.counters
        if job.state is State.WAITING:
            meter.first_scheduled = now
            meter.cached_tokens = min(job.computed, job.prompt_len)
            counters.prompt_tokens += job.prompt_len
            counters.cache_query_tokens += job.prompt_len
            counters.cache_hit_tokens += meter.cached_tokens
            it.fairness.prompt(job.tenant, job.prompt_len - meter.cached_tokens)
        job.state = State.RUNNING
        job.accounted_at = now
        job.held_by = None
        it.running[job] = None
        it.slots[job.tenant] += 1
