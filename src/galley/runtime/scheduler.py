"""The scheduler: jobs in, plans out. Pure Python; time and results are arguments (SCH-9)."""

from itertools import islice

from galley.errors import GalleyError, InvalidRequest, Overloaded
from galley.kv.pool import Pool
from galley.kv.table import Table
from galley.kv.tree import Namespace, Node, Tree
from galley.runtime.admission import Admission
from galley.runtime.cost import CostModel
from galley.runtime.deadlines import Deadlines
from galley.runtime.integrity import violations
from galley.runtime.job import Job, State
from galley.runtime.meter import Costs, Counters
from galley.runtime.out import StepOut
from galley.runtime.plan import Drawn, Plan
from galley.runtime.policy import Policy
from galley.runtime.queue import Queue
from galley.types import FinishReason, SamplingParams, TokenLogprob

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
        max_jobs: most jobs running at once. max_queue: most waiting ones; beyond it submit is refused.
        model_key: separates prefix trees of different weights or numerics (KV-5).
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
        cost: CostModel | None = None,
    ) -> None:
        for name, value in (("token_budget", token_budget), ("max_jobs", max_jobs), ("chunk", chunk)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.eos = eos
        self.token_budget = token_budget
        self.chunk = token_budget if chunk is None else chunk
        self.max_jobs = max_jobs
        self.max_queue = max_queue
        self.model_key = model_key
        self.policy = policy or Policy()
        self.costs, self.cost = costs or Costs(), cost
        self.counters = Counters()
        self.tree = Tree(Pool(num_blocks), block_size)
        self.admission = Admission(self.tree, self.policy, vocab=vocab, context=context)
        self.queue = Queue()
        self.deadlines = Deadlines()
        self.running: dict[Job, None] = {}
        self.jobs: dict[str, Job] = {}
        self._sequence = 0
        self._inflight: Plan | None = None
        self._out: list[StepOut] = []

    @property
    def pool(self) -> Pool:
        return self.tree.pool

    @property
    def busy(self) -> bool:
        """Whether a job waits or runs."""
        return bool(self.jobs)

    def submit(
        self,
        job_id: str,
        prompt: list[int],
        params: SamplingParams,
        now: float,
        *,
        lane: int = 0,
        tenant: str = "local",
        salt: str | None = None,
        priority: int = 0,
        max_queue_s: float | None = None,
        max_total_s: float | None = None,
        checked: bool = False,
    ) -> Job:
        """Put one choice in the queue. Prefixes are shared among all jobs of the same ``salt``.

        Raises what ``Admission.refuse`` raises unless ``checked`` already, Overloaded when the queue is full.
        """
        if job_id in self.jobs:
            raise InvalidRequest(f"job id {job_id!r} is in use", param="job_id")
        if not checked:
            self.admission.refuse(prompt, params)
        if len(self.queue) >= self.max_queue:
            raise Overloaded(f"{len(self.queue)} requests are waiting already", retry_after_s=1.0)
        namespace: Namespace = (("model", self.model_key),) + ((("salt", salt),) if salt else ())
        job = Job(
            job_id,
            prompt,
            params,
            eos=self.eos,
            context=self.admission.room,
            sequence=self._sequence,
            now=now,
            namespace=namespace,
            seed=params.seed or 0,
            lane=lane,
            tenant=tenant,
            priority=priority,
            max_queue_s=max_queue_s,
            max_total_s=max_total_s,
        )
        self._sequence += 1
        self.jobs[job_id] = job
        self.queue.add(job)
        self.deadlines.add(job, now)
        return job

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
        if job is None:
            return False
        if self._inflight is not None and job in self._inflight.rows:
            job.verdict = job.verdict or verdict
        else:
            self._end(job, now, verdict)
        return True

    def take(self) -> list[StepOut]:
        """What happened since the last call, in order."""
        out, self._out = self._out, []
        return out

    def plan(self, now: float) -> Plan:
        """The next step; empty when nothing can run. Expires deadlines first (CAN-5).

        Decodes, then prompt chunks of running jobs, then admissions, within the budget (SCH-1, SCH-2).
        O(running + what is admitted). Raises RuntimeError while a plan is in flight, and
        should no job be able to go on (SCH-3), which would be a defect.
        """
        if self._inflight is not None:
            raise RuntimeError("the last plan was neither committed nor failed")
        for late, error in self.deadlines.due(now):
            self._end(late, now, error, State.EXPIRED)
        plan = Plan(self.counters.steps)
        before = self.counters.preemptions
        chunks = self._decodes(plan, now)
        for job in chunks:
            room = self.token_budget - plan.tokens
            if room <= 0:
                break
            if job.state is State.RUNNING:
                plan.add(job, min(len(job.tokens) - job.computed, room, self.chunk))
        if before == self.counters.preemptions:
            self.policy.step()
            if self.queue and plan.tokens < self.token_budget and len(self.running) < self.max_jobs:
                self._admit(plan, now)
        if not plan.rows and self.running:
            self._force(plan, now)
        if plan.rows:
            self._inflight = plan
        elif self.jobs:
            raise RuntimeError(f"SCH-3: {len(self.jobs)} jobs and nothing to do")
        return plan

    def _decodes(self, plan: Plan, now: float) -> list[Job]:
        """Plan every running job with one unknown token; return the others, in order."""
        chunks, late = list[Job](), list[Job]()
        size, budget = self.block_size, self.token_budget
        rows = plan.rows
        for job in list(self.running):
            if len(job.tokens) - job.computed != 1:
                chunks.append(job)
            elif plan.tokens >= budget:
                late.append(job)
            elif job.computed < len(job.table.blocks) * size or self._grow(job, plan, now):
                rows[job] = 1
                plan.tokens += 1
        if late:
            # More decodes than budget: those left out go first next time.
            self.running = dict.fromkeys(job for job in [*late, *self.running] if job.state is State.RUNNING)
        return chunks

    def _grow(self, job: Job, plan: Plan, now: float) -> bool:
        """One more block for a running job, at the cost of others if need be (SCH-5)."""
        while job.state is State.RUNNING:
            if self.tree.extend(job.table, 1):
                return True
            victim = self.policy.victim(self.running, self.block_size, forced=False)
            if victim is None:
                return False
            self._preempt(victim, plan, now)
        return False

    def _force(self, plan: Plan, now: float) -> None:
        """Everyone is stalled and spared: preempt all the same until the best job can run (SCH-3).

        Ends: a job alone fits, since admission kept out what never could and idle blocks are evictable.
        """
        while len(self.running) > 1:
            victim = self.policy.victim(self.running, self.block_size, forced=True)
            if victim is None:
                break
            self._preempt(victim, plan, now)
            for job in self.running:
                if job.computed < len(job.table.blocks) * self.block_size or self.tree.extend(job.table, 1):
                    plan.add(job, 1)
                    return

    def _preempt(self, job: Job, plan: Plan, now: float) -> None:
        """Back to the queue. Its full blocks stay cached and go tail first, when memory is really needed."""
        plan.drop(job)
        self.costs.hold(job, self.block_size, now)
        self.tree.release(job.table, job.tokens, job.computed)
        del self.running[job]
        job.computed = 0
        job.resumed_at = len(job.tokens)
        job.state = State.PREEMPTED
        job.skipped = 0
        job.meter.preemptions += 1
        self.counters.preemptions += 1
        self.policy.preempted()
        self.queue.add(job)

    def _admit(self, plan: Plan, now: float) -> None:
        missed = 0
        for job in list(islice(self.queue.ordered(now), 128)):
            if plan.tokens >= self.token_budget or len(self.running) >= self.max_jobs:
                return
            if self.admission.still_held(job):
                continue
            path = self.tree.match(job.table.namespace, job.tokens)
            if self.admission.hold_back(job, len(path), self.running):
                continue
            if not self.admission.fits(job, path, self.running):
                # Smaller ones may pass for a while, then the line stops here (SCH-4).
                job.skipped += 1
                missed += 1
                if job.skipped > self.policy.patience or missed >= self.policy.look:
                    return
                continue
            self._start(job, path, now)
            plan.add(job, min(len(job.tokens) - job.computed, self.token_budget - plan.tokens, self.chunk))

    def _start(self, job: Job, path: list[Node], now: float) -> None:
        self.queue.remove(job)
        self.tree.claim(job.table, path)
        if not self.tree.extend(job.table, -(-len(job.tokens) // self.block_size) - len(path)):
            raise RuntimeError("KV-1: blocks counted as available were not")
        job.computed = len(path) * self.block_size
        meter, counters = job.meter, self.counters
        if job.state is State.WAITING:
            meter.first_scheduled = now
            meter.cached_tokens = job.computed
            counters.prompt_tokens += job.prompt_len
            counters.cache_query_tokens += job.prompt_len
            counters.cache_hit_tokens += job.computed
        job.state = State.RUNNING
        job.accounted_at = now
        job.held_by = None
        self.running[job] = None

    def commit(self, plan: Plan, drawn: Drawn, now: float) -> None:
        """Take a step's result: accept, publish, finish, free. The only place where jobs advance.

        ``drawn`` has one row for each job whose known tokens the step completed, in plan order.
        """
        self._land(plan)
        size = self.block_size
        costs, counters, ids = self.costs, self.counters, drawn.ids
        share = costs.weight_bytes / len(plan.rows)
        row = -1
        for job, count in plan.rows.items():
            end = job.computed = job.computed + count
            known = len(job.tokens)
            costs.step(job, count, share=share, counters=counters, block_size=size, now=now)
            if end // size > job.table.keyed:
                self._publish(job, end)
            if end == known:
                row += 1
            if job.verdict is not None:
                self._end(job, now, job.verdict)
            elif end == known:
                self._accept(job, ids[row], row, drawn, now)
        counters.steps += 1
        counters.rows += row + 1
        counters.computed_tokens += plan.tokens

    def _accept(self, job: Job, token: int, row: int, drawn: Drawn, now: float) -> None:
        """One drawn token becomes known and goes out."""
        finish = job.take(token)
        meter = job.meter
        cached = meter.cached_tokens if meter.drew(now) else None
        self.counters.generation_tokens += 1
        logprobs = None
        if job.params.logprobs is not None:
            logprobs = [TokenLogprob(token, drawn.logprobs[row], drawn.ranks[row], drawn.tops[row])]
        if finish is not None:
            self._close(job, now, State.FINISHED, keep=job.computed)
        self._out.append(
            StepOut(
                job_id=job.id,
                token_ids=[token],
                logprobs=logprobs,
                finish=finish,
                stop_token=token if finish == "stop" and token in job.stop_ids else None,
                cached_tokens=cached,
                meter=None if finish is None else meter,
            )
        )

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
        self.queue = Queue(self.queue.age_s)

    def check(self) -> list[str]:
        """What is wrong with blocks and jobs, in words. O(N + tables)."""
        return violations(self)

    def _land(self, plan: Plan) -> None:
        if plan is not self._inflight:
            raise RuntimeError("this plan is not in flight")
        self._inflight = None

    def _publish(self, job: Job, end: int) -> None:
        table, size = job.table, self.block_size
        before = table.keyed
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
        error = verdict if isinstance(verdict, GalleyError) else None
        finish = None if isinstance(verdict, GalleyError) else verdict
        state = state or (State.FINISHED if error is None else State.CANCELLED)
        self._close(job, now, state, keep=job.computed if keep is None else keep)
        self._out.append(StepOut(job_id=job.id, finish=finish, error=error, meter=job.meter))

    def _close(self, job: Job, now: float, state: State, *, keep: int) -> None:
        if job.state is State.RUNNING:
            self.costs.hold(job, self.block_size, now)
            self.tree.release(job.table, job.tokens, keep)
            del self.running[job]
        else:
            self.queue.remove(job)
        job.state = state
        job.held_by = None
        job.meter.finished = now
        self.counters.finished += 1
        del self.jobs[job.id]
