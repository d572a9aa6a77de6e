"""The scheduler: jobs in, plans out. Pure Python; time and results are arguments (SCH-9)."""

from collections import Counter
from typing import TYPE_CHECKING, Unpack

from galley.errors import GalleyError, InvalidRequest
from galley.kv import chain
from galley.kv.pool import Pool
from galley.kv.table import Table
from galley.kv.tree import Tree
from galley.runtime.admission import Admission
from galley.runtime.arrival import Terms
from galley.runtime.cost import CostModel
from galley.runtime.deadlines import Deadlines
from galley.runtime.fairness import Fairness
from galley.runtime.gate import Gate
from galley.runtime.intake import Intake
from galley.runtime.integrity import violations
from galley.runtime.job import URGENT, Job, State
from galley.runtime.meter import Costs, Counters
from galley.runtime.out import StepOut
from galley.runtime.plan import Drawn, Plan
from galley.runtime.policy import Policy
from galley.runtime.preemption import Preemption
from galley.runtime.queue import Queue, urgent_tokens
from galley.runtime.rate import ServiceRate
from galley.runtime.residency import Residency
from galley.types import CacheHint, FinishReason, SamplingParams

if TYPE_CHECKING:
    from galley.model.adapter import Adapter

__all__ = ["Scheduler"]


class Scheduler:
    """Owns all jobs, the pool and the tree.

    ``plan`` and one of ``commit``/``fail`` alternate; ``submit``, ``cancel`` and ``finish`` may come at any
    time between them, also while a plan is in flight. What happened is collected by ``take``.

    Args:
        num_blocks, block_size: the backend's KV arena.
        vocab: prompt ids must lie below it. context: most tokens of prompt and output together.
        eos: ids that end an output unless ``ignore_eos``.
        token_budget: most tokens in a step (SCH-1). chunk: most prompt tokens of one job in a step.
        max_jobs: most jobs running at once. max_queue, max_wait_s: most waiting ones, and the longest they
            are expected to wait; beyond it submit is refused (``Gate``).
        model_key: separates prefix trees of different weights or numerics (KV-5).
        fairness: counters and weights of the tenants.
        adapters: most LoRA adapters in the backend at once (LRA-1).
        costs: constants for the meters. cost: what a step takes, where known; may be set later.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        vocab: int,
        context: int,
        eos: frozenset[int] = frozenset(),
        token_budget: int = 512,
        chunk: int | None = None,
        max_jobs: int = 64,
        max_queue: int = 1024,
        model_key: str = "",
        policy: Policy | None = None,
        costs: Costs | None = None,
        fairness: Fairness | None = None,
        max_wait_s: float | None = None,
        cost: CostModel | None = None,
        adapters: int = 8,
    ) -> None:
        for name, value in (("token_budget", token_budget), ("max_jobs", max_jobs), ("chunk", chunk)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.eos = eos
        self.token_budget = token_budget
        self.chunk = token_budget if chunk is None else chunk
        self.max_jobs = max_jobs
        self.model_key = model_key
        self.policy = policy or Policy()
        self.costs = costs or Costs()
        self.counters = Counters()
        self.tree = Tree(Pool(num_blocks), block_size)
        self.admission = Admission(self.tree, self.policy, vocab=vocab, context=context)
        self.fairness = fairness or Fairness()
        self.queue = Queue(fairness=self.fairness)
        self.rate = ServiceRate(cost)
        limits = {"budget": token_budget, "slots": max_jobs, "max_queue": max_queue}
        self.gate = Gate(self.queue, self.rate, max_wait_s=max_wait_s, **limits)
        self.intake = Intake(self)
        self.preemption = Preemption(self)
        self.deadlines = Deadlines()
        self.residency = Residency(adapters)
        self.running: dict[Job, None] = {}
        self.slots: Counter[str] = Counter()  # of running jobs, by tenant
        self.jobs: dict[str, Job] = {}
        self.epoch = 0
        self._sequence = 0
        self.urgent = 0  # live jobs of the latency-critical class
        self._turned: float | None = None  # when the last step ended, if others were waiting for the next
        self._inflight: Plan | None = None
        self._out: list[StepOut] = []

    @property
    def pool(self) -> Pool:
        return self.tree.pool

    @property
    def cost(self) -> CostModel | None:
        """What a step takes, where known; the gate reckons with it."""
        return self.rate.cost

    @cost.setter
    def cost(self, model: CostModel | None) -> None:
        self.rate.cost = model

    @property
    def inflight(self) -> bool:
        """Whether a plan waits for its commit."""
        return self._inflight is not None

    @property
    def busy(self) -> bool:
        """Whether a job waits or runs."""
        return bool(self.jobs)

    def namespace(
        self, tenant: str, salt: str | None, cache: CacheHint | None, adapter: "Adapter | None" = None
    ) -> chain.Namespace:
        """With whom a job shares its prefixes: same weights, tenant, salt and epoch (KV-5, KV-10)."""
        apart = cache is not None and cache.memory_only
        return chain.namespace(
            self.model_key,
            tenant=tenant,
            salt=salt,
            epoch=self.epoch,
            memory_only=apart,
            adapter=None if adapter is None else adapter.key,
        )

    def new_epoch(self) -> None:
        """Weights, an adapter or the KV dtype changed: nothing cached so far matches again (KV-10).

        Running jobs go on with the blocks they hold. What nobody holds is freed at once when nothing is
        held, else as memory is needed.
        """
        self.epoch += 1
        self.tree.clear()

    def submit(
        self,
        job_id: str,
        prompt: list[int],
        params: SamplingParams,
        now: float,
        *,
        checked: bool = False,
        **terms: Unpack[Terms],
    ) -> Job:
        """Put one choice in the queue. Prefixes are shared among jobs of the same ``namespace``.

        Raises what ``Admission.refuse`` and ``Gate.admit`` raise unless ``checked`` already.
        """
        tenant = terms.get("tenant", "local")
        if job_id in self.jobs:
            raise InvalidRequest(f"job id {job_id!r} is in use", param="job_id")
        if not checked:
            self.admission.refuse(prompt, params)
            self.gate.admit(tenant, terms.get("max_queue_s"), now=now, running=len(self.running))
        job = self.intake.job(job_id, prompt, params, now, terms)
        self.enter(job, now)
        return job

    def enter(self, job: Job, now: float) -> None:
        """Queue a job that is WAITING, or PREEMPTED elsewhere; it comes after all that are here."""
        job.sequence = self._sequence
        self._sequence += 1
        self.jobs[job.id] = job
        self.urgent += job.tier == URGENT
        self.queue.add(job)
        self.deadlines.add(job, now)

    def park(self, job: Job, now: float) -> None:
        """End a job with code ``parked``, its full blocks cached. Not while a plan is in flight."""
        if self._inflight is not None:
            raise RuntimeError("park between steps")
        self._end(job, now, GalleyError("the request was parked", code="parked"), State.PARKED)

    def cancel(self, job_id: str, now: float) -> bool:
        """End a job with an error of code ``cancelled``; legal in every state, also twice (CAN-2).

        Returns False when there is no such live job. In flight it only marks: commit frees.
        """
        return self._settle(job_id, GalleyError("the request was cancelled", code="cancelled"), now)

    def finish(self, job_id: str, now: float) -> bool:
        """End a job well, with ``stop``: the text layer has found a stop string. Otherwise as ``cancel``."""
        return self._settle(job_id, "stop", now)

    def _settle(self, job_id: str, verdict: GalleyError | FinishReason, now: float) -> bool:
        job = self.jobs.get(job_id)
        if job is not None and self._inflight is not None and job in self._inflight.rows:
            job.verdict = job.verdict or verdict
        elif job is not None:
            self._end(job, now, verdict)
        return job is not None

    def take(self) -> list[StepOut]:
        """What happened since the last call, in order."""
        out, self._out = self._out, []
        return out

    def plan(self, now: float) -> Plan:
        """The next step; empty when nothing can run. Expires deadlines first (CAN-5).

        Decodes first (SCH-2); the rest of the budget (SCH-1) goes to prompts, of running and of new jobs, by
        tier and by tenant (SCH-7). O(running + what is admitted). Raises RuntimeError while a plan is in
        flight, and should no job be able to go on (SCH-3), which would be a defect.
        """
        if self._inflight is not None:
            raise RuntimeError("the last plan was neither committed nor failed")
        for late, error in self.deadlines.due(now):
            if error.retryable:
                error.retry_after_s = self.gate.wait_s(late.tenant, running=len(self.running))
            self._end(late, now, error, State.EXPIRED)
        plan = Plan(self.counters.steps, now)
        before = self.counters.preemptions
        chunks = self._decodes(plan, now)
        plan.decodes = len(plan.rows)
        if len(chunks) > 1:
            chunks.sort(key=lambda job: (self.queue.tier(job, now), self.fairness[job.tenant]))
        for job in chunks:
            self.intake.admit(plan, now, before, job)
            most = self.intake.most(job, plan)
            if most > 0 and (count := self.preemption.reach(job, most, plan, now)) > 0:
                plan.add(job, count)
        if before == self.counters.preemptions:
            self.policy.step()
        self.intake.admit(plan, now, before)
        if not plan.rows and self.running:
            self.preemption.force(plan, now)
        if plan.rows:
            self._inflight = plan
        elif self.jobs:
            raise RuntimeError(f"SCH-3: {len(self.jobs)} jobs and nothing to do")
        return plan

    def _decodes(self, plan: Plan, now: float) -> list[Job]:
        """Plan every running job with one unknown token; return the others, in order."""
        chunks, late = list[Job](), list[Job]()
        size, budget = self.block_size, self.token_budget
        if self.urgent:
            # Only where decodes alone would fill more than half of the step do they take turns.
            budget -= min(self.queue.urgent + urgent_tokens(self.running), budget // 2)
        rows = plan.rows
        for job in list(self.running):
            if len(job.tokens) - job.computed != 1:
                chunks.append(job)
            elif plan.tokens >= budget:
                late.append(job)
            elif job.computed < len(job.table.blocks) * size or self.preemption.grow(job, plan, now):
                rows[job] = 1
                plan.tokens += 1
        if late:
            # More decodes than budget: those left out go first next time.
            self.running = dict.fromkeys(job for job in [*late, *self.running] if job.state is State.RUNNING)
        return chunks

    def commit(self, plan: Plan, drawn: Drawn, now: float) -> None:
        """Take a step's result: accept, publish, finish, free. The only place where jobs advance.

        ``drawn`` has the rows of logits wanted, in plan order: of a job first those it reads, then the one it
        draws from if the step completes its known tokens.
        """
        self._land(plan)
        size, costs, counters, ids = self.block_size, self.costs, self.counters, drawn.ids
        share = costs.weight_bytes / len(plan.rows)
        row = state = 0
        for job, count in plan.rows.items():
            reading, start, outputs = job.reading, job.computed, job.outputs(count)
            end = job.computed = start + count
            known = len(job.tokens)
            costs.step(job, count, share=share, outputs=outputs, counters=counters, block_size=size, now=now)
            row += outputs
            if reading is not None:
                first, last = reading.span(start, end)
                reading.take(drawn, state if reading.states else row - outputs, start, end)
                state += (last - first) * reading.states
            if end // size > job.table.keyed:
                self._publish(job, end)
            if job.verdict is not None:
                self._end(job, now, job.verdict)
            elif end == known:
                if job.draws:
                    self._accept(job, ids[row - 1], row - 1, drawn, now)
                else:
                    self._close(job, now, State.FINISHED, keep=end)
                    self._out.append(StepOut.read(job))
        counters.steps += 1
        counters.rows += row
        counters.computed_tokens += plan.tokens
        # From the end of the last step, so that what lies between two of them counts.
        began = plan.now if self._turned is None else self._turned
        self.rate.observe(plan.tokens - plan.decodes, plan.decodes, now - began, plan.predicted)
        self._turned = now if self.jobs else None

    def _accept(self, job: Job, token: int, row: int, drawn: Drawn, now: float) -> None:
        """One drawn token becomes known and goes out, with those that its grammar forces."""
        try:
            new, finish = job.draw(token)
        except GalleyError as error:
            self._end(job, now, error, State.FAILED)
            return
        first = job.meter.drew(now, len(new))
        self.counters.generation_tokens += len(new)
        self.fairness.output(job.tenant, len(new))
        if finish is not None:
            self._close(job, now, State.FINISHED, keep=job.computed)
        self._out.append(StepOut.of(job, new, finish, drawn, row, first=first))

    def fail(self, plan: Plan, error: GalleyError, now: float) -> None:
        """The forward failed: its jobs end with ``error``, nothing of the step is kept (CAN-3, KV-3)."""
        self._land(plan)
        self.counters.steps += 1
        for job in plan.rows:
            self._end(job, now, job.verdict or error, None if job.verdict else State.FAILED, keep=0)

    def reset(self, error: GalleyError, now: float) -> None:
        """End every job with ``error`` and start with an empty pool."""
        self._inflight = None
        self.deadlines = Deadlines()
        for job in list(self.jobs.values()):
            job.table = Table(job.table.namespace)
            self._end(job, now, error, State.FAILED, keep=0)
        self.tree = self.admission.tree = Tree(Pool(self.num_blocks), self.block_size)
        self.queue = self.gate.queue = Queue(self.queue.age_s, self.fairness)

    def check(self) -> list[str]:
        """What is wrong with blocks and jobs, in words. O(N + tables)."""
        return violations(self)

    def _land(self, plan: Plan) -> None:
        if plan is not self._inflight:
            raise RuntimeError("this plan is not in flight")
        self._inflight = None

    def _publish(self, job: Job, end: int) -> None:
        table, size, before = job.table, self.block_size, job.table.keyed
        if self.tree.publish(table, job.tokens, end):
            mine = min(table.keyed, job.prompt_len // size) - min(before, job.prompt_len // size)
            job.meter.cache_write_tokens += mine * size

    def _end(
        self,
        job: Job,
        now: float,
        verdict: GalleyError | FinishReason,
        state: State | None = None,
        keep: int | None = None,
    ) -> None:
        """A job ends without a token of its own."""
        error, finish = (verdict, None) if isinstance(verdict, GalleyError) else (None, verdict)
        state = state or (State.FINISHED if error is None else State.CANCELLED)
        self._close(job, now, state, keep=job.computed if keep is None else keep)
        self._out.append(StepOut(job_id=job.id, finish=finish, error=error, meter=job.meter))

    def stop(self, job: Job) -> None:
        """Take a job out of those that run; its blocks are given back by the caller."""
        del self.running[job]
        if job.adapter is not None:
            self.residency.drop(job.adapter)
        self.slots[job.tenant] -= 1
        if not self.slots[job.tenant]:
            del self.slots[job.tenant]

    def _close(self, job: Job, now: float, state: State, *, keep: int) -> None:
        if job.state is State.RUNNING:
            self.costs.hold(job, self.block_size, now)
            self.tree.release(job.table, job.tokens, keep)
            self.stop(job)
        else:
            self.queue.remove(job)
        job.state = state
        job.held_by = None
        job.meter.finished = now
        self.counters.finished += 1
        self.rate.ended(job.meter.completion_tokens, len(job.tokens))
        self.urgent -= job.tier == URGENT
        del self.jobs[job.id]
        if not self.jobs:
            self.fairness.rest()
