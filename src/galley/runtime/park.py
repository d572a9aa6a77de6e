"""Parking: a running job becomes a value, its KV stays behind in the cache, and it goes on later (SCH-6)."""

import msgspec

from galley.errors import InvalidRequest, NotFound
from galley.runtime.job import URGENT, Job, State
from galley.runtime.scheduler import Scheduler
from galley.types import CacheHint, SamplingParams

__all__ = ["Parked", "park", "resume"]


class Parked(msgspec.Struct, frozen=True, kw_only=True):
    """All that a job is beside its KV. Plain data: it may be stored and resumed by another process.

    Attributes:
        tokens: ids of the prompt and of the output so far. prompt_len: how many are the prompt's.
        seed, lane: with a token's position they are its noise, so the output goes on as it would have.
        computed: positions whose KV was in the cache when it was parked.
    """

    job_id: str
    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    seed: int
    lane: int
    tenant: str
    salt: str | None
    priority: int
    memory_only: bool
    computed: int
    banned: tuple[int, ...] = ()
    urgent: bool = False

    @classmethod
    def of(cls, job: Job) -> "Parked":
        """A job as it stands, but for its grammar."""
        space = dict(job.table.namespace)
        return cls(
            job_id=job.id,
            tokens=list(job.tokens),
            prompt_len=job.prompt_len,
            params=job.params,
            seed=job.seed,
            lane=job.lane,
            tenant=job.tenant,
            salt=space.get("salt"),
            priority=0 if job.tier == URGENT else job.tier,
            urgent=job.tier == URGENT,
            memory_only="tier" in space,
            computed=job.computed,
            banned=job.banned,
        )

    @property
    def cache(self) -> CacheHint:
        """What to ask of the prefix cache when it comes back."""
        return CacheHint(memory_only=self.memory_only)


def park(scheduler: Scheduler, job_id: str, now: float) -> Parked:
    """Take a job out between steps; its stream ends with an error of code ``parked``.

    Its full blocks stay cached, unused, and are given up like any others when memory is needed. Raises
    NotFound when there is no such job, InvalidRequest when a grammar guides it: its state is not plain data.
    """
    job = scheduler.jobs.get(job_id)
    if job is None:
        raise NotFound(f"There is no job {job_id[:100]!r} to park.", param="job_id")
    if job.guide is not None:
        raise InvalidRequest("A request with structured output cannot be parked.", param="job_id")
    if job.reading is not None or job.adapter is not None:
        raise InvalidRequest(
            "A request with an adapter, or one that reads its prompt, cannot be parked.", param="job_id"
        )
    parked = Parked.of(job)
    scheduler.park(job, now)
    return parked


def resume(scheduler: Scheduler, parked: Parked, job_id: str, now: float) -> Job:
    """Queue a parked job again, before new ones of its class. What the cache no longer has is recomputed.

    Raises InvalidRequest and ContextLengthExceeded when it cannot run on this engine.
    """
    prompt, output = parked.tokens[: parked.prompt_len], parked.tokens[parked.prompt_len :]
    params = msgspec.structs.replace(parked.params, seed=parked.seed)
    scheduler.admission.refuse(prompt, params)
    job = Job(
        job_id,
        prompt,
        params,
        eos=scheduler.eos,
        context=scheduler.admission.room,
        sequence=0,
        now=now,
        namespace=scheduler.namespace(parked.tenant, parked.salt, parked.cache),
        lane=parked.lane,
        tenant=parked.tenant,
        priority=parked.priority,
        urgent=parked.urgent,
        banned=parked.banned,
    )
    for token in output:
        job.take(token)
    job.state = State.PREEMPTED
    job.reached = parked.computed
    job.resumed_at = len(job.tokens)
    job.meter.first_scheduled = now
    scheduler.enter(job, now)
    return job
