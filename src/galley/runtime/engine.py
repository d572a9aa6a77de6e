"""The engine: one thread behind, any number of callers in front."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import Unpack

from galley.errors import EngineFault, GalleyError, InvalidRequest, Overloaded
from galley.kv.disk import DiskStore
from galley.runtime.arrival import Arrival, Terms
from galley.runtime.backend.base import Backend
from galley.runtime.cost import CostModel
from galley.runtime.entry import Entry
from galley.runtime.inbox import Inbox
from galley.runtime.journal import Journal
from galley.runtime.loop import Loop
from galley.runtime.mailbox import Stream
from galley.runtime.meter import JobMeter
from galley.runtime.out import StepOut
from galley.runtime.pace import Pace
from galley.runtime.park import Parked, resume
from galley.runtime.policy import Policy
from galley.runtime.probe import IdleProbe
from galley.runtime.readers import Readers, Sink
from galley.runtime.setup import build_scheduler
from galley.runtime.stats import EngineStats
from galley.runtime.tier import DiskOptions, DiskTier
from galley.types import SamplingParams

__all__ = ["Engine", "EngineStats", "JobMeter", "StepOut", "build_scheduler"]

log = logging.getLogger(__name__)

IDLE_S = 1.0
"""Silence after which idle time is used for measuring."""


class Engine:
    """Thread-safe face of one Loop. The backend stays the caller's to close, after ``close``.

    Args:
        eos_ids: ids that end an output.
        token_budget: most tokens in a step. chunk: most prompt tokens of one job in a step.
        max_jobs, max_queue: most running and most waiting choices.
        context: most tokens of prompt and output; None is what model and KV memory allow.
        model_key: digest of the weights; part of every KV key. Required with ``disk``.
        max_wait_s: submit refuses what is expected to wait longer than this; None refuses nothing for it.
        weights: shares of tenants relative to each other's, 1 where not given.
        journal: where every event of the scheduler is written, for ``journal.replay``.
        disk: keep prefixes on disk too; None keeps them in memory alone.
        pace: when a disk hit is worth taking; default: measured as it goes.
        cost: what a step takes, where known (``runtime.cost``).
        measure: without ``cost``, measure it in the first idle second of the engine's thread; the model is
            then handed to this function, to keep it.
        adapters: most LoRA adapters in the backend at once.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos_ids: tuple[int, ...] | frozenset[int],
        token_budget: int = 512,
        max_jobs: int = 64,
        max_queue: int = 1024,
        context: int | None = None,
        model_key: str = "",
        chunk: int | None = None,
        policy: Policy | None = None,
        max_wait_s: float | None = None,
        weights: Mapping[str, float] | None = None,
        journal: Journal | None = None,
        disk: DiskOptions | None = None,
        pace: Pace | None = None,
        cost: CostModel | None = None,
        measure: Callable[[CostModel], None] | None = None,
        adapters: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.scheduler = build_scheduler(
            backend,
            eos_ids=eos_ids,
            token_budget=token_budget,
            max_jobs=max_jobs,
            max_queue=max_queue,
            context=context,
            model_key=model_key,
            chunk=chunk,
            policy=policy,
            max_wait_s=max_wait_s,
            weights=weights,
            journal=journal,
            cost=cost,
            adapters=adapters,
        )
        self._probe = IdleProbe(self.scheduler, backend, found=measure) if measure and not cost else None
        self.loop = Loop(self.scheduler, backend, clock=clock, arrivals=self._arrivals)
        self.context = self.scheduler.admission.room
        self.violations = 0
        self._clock = clock
        self._inbox = Inbox()
        self._readers = Readers()
        self._tier: DiskTier | None = None
        if disk is not None:
            self._tier = DiskTier.open(
                disk, backend, model_key, self.scheduler.model_key, pace=pace, wake=self._inbox.nudge
            )
        self._entry = Entry(self.scheduler, self._inbox, self._tier, clock)
        self._draining = False
        self._closing = False
        self._thread: Thread | None = None
        self._checked_at = float("-inf")

    def start(self) -> None:
        """Start the engine thread. Raises RuntimeError when it runs already or was closed."""
        if self._thread is not None or self._closing:
            raise RuntimeError("this engine was started before")
        self._thread = Thread(target=self._run, name="galley-engine", daemon=True)
        self._thread.start()

    def turn(self) -> bool:
        """One step in the caller's thread, for offline use instead of ``start``. False when all is done.

        Raises RuntimeError when the engine thread runs.
        """
        if self._thread is not None:
            raise RuntimeError("this engine has a thread of its own")
        self._step()
        if self._entry and not self.scheduler.busy:
            with self._inbox.wake:
                self._inbox.wake.wait(0.01)
        return bool(self._readers)

    def close(self) -> None:
        """Cancel what is left and stop the thread. Idempotent; blocks for at most one step, and with a disk
        tier for at most five seconds until the cache is written."""
        self._closing = self._draining = True
        self._inbox.nudge()
        if self._thread is not None:
            self._thread.join()
        else:
            self._shut()

    async def drain(self) -> None:
        """Admit nothing more and return when all jobs are done (CAN-6)."""
        with self._inbox.wake:  # whoever is about to be let in is in before
            self._draining = True
        while self._readers:
            await asyncio.sleep(0.01)

    def submit(
        self,
        job_id: str,
        prompt: list[int],
        params: SamplingParams,
        *,
        on_step: Sink,
        **terms: Unpack[Terms],
    ) -> None:
        """Queue one choice; n are n submits with lanes 0 … n-1. ``guide`` is its own, ``banned`` never drawn.

        ``on_step`` is called on the engine thread, once a step with news, and must not block. Raises at once:
        ContextLengthExceeded, InvalidRequest, Overloaded (too much waits, draining, closed), DeadlineExceeded
        (would wait longer than ``max_queue_s``).
        """
        scheduler, tenant, cache = self.scheduler, terms.get("tenant", "local"), terms.get("cache")
        scheduler.admission.refuse(prompt, params)
        enter: Callable[[], object] = partial(
            scheduler.submit, job_id, prompt, params, self._clock(), checked=True, **terms
        )
        space = scheduler.namespace(tenant, terms.get("salt"), cache, terms.get("adapter"))
        reads = terms.get("reading") is not None
        arrival = Arrival(job_id, tenant, enter, prompt, space, cache, reads)
        self._queue(arrival, on_step, terms.get("max_queue_s"))

    def park(self, job_id: str) -> "Future[Parked]":
        """Take a job out before the next step, wherever it stands; its stream ends with code ``parked``.

        The future is set by the engine: with the Parked, or with NotFound. Its KV stays cached, and with a
        disk tier is written there without waiting for an idle engine.
        """
        return self._inbox.park(job_id)

    def resume(self, parked: Parked, *, on_step: Sink, job_id: str | None = None) -> None:
        """Go on with a parked job, under its own id or a new one: the same tokens follow as if it had never
        been away. ``on_step`` gets the new ones. Raises as ``submit``."""
        name = job_id or parked.job_id
        enter = partial(resume, self.scheduler, parked, name, self._clock())
        space = self.scheduler.namespace(parked.tenant, parked.salt, parked.cache)
        self._queue(Arrival(name, parked.tenant, enter, parked.tokens, space, parked.cache), on_step)

    def _queue(
        self,
        arrival: Arrival,
        on_step: Sink,
        max_queue_s: float | None = None,
    ) -> None:
        job_id, scheduler, inbox = arrival.job_id, self.scheduler, self._inbox
        with inbox.wake:
            if self._draining:
                raise Overloaded("the engine is draining", retry_after_s=5.0)
            if job_id in self._readers:
                raise InvalidRequest(f"job id {job_id!r} is in use", param="job_id")
            running, now = len(scheduler.running), self._clock()
            scheduler.gate.admit(arrival.tenant, max_queue_s, now=now, running=running, inbox=inbox.coming)
            self._readers.sinks[job_id] = on_step
            inbox.put(arrival)

    async def stream(
        self, job_id: str, prompt: list[int], params: SamplingParams, **terms: Unpack[Terms]
    ) -> AsyncIterator[StepOut]:
        """``submit`` for asyncio; its errors come with the first step. Leaving the iterator cancels (CAN-1).

        A reader slower than the engine gets several steps in one StepOut; the engine never waits for it.
        """
        stream = Stream(job_id)
        with self._inbox.wake:
            self._readers.open(stream, asyncio.get_running_loop())
        try:
            self.submit(job_id, prompt, params, on_step=stream, **terms)
        except BaseException:
            del self._readers.boxes[stream]
            raise
        last = False
        try:
            while not last:
                out = await stream.next()
                last = out.last
                yield out
        finally:
            if not last:
                self.cancel(job_id)

    def cancel(self, job_id: str) -> None:
        """End a job with an error of code ``cancelled``. Any thread, any state, also twice (CAN-2)."""
        self._tell(job_id, False)

    def finish(self, job_id: str) -> None:
        """End a job well, with ``stop``: its text contains a stop string. Otherwise as ``cancel``."""
        self._tell(job_id, True)

    def forget_adapter(self, digest: str) -> None:
        """Give an adapter's slot back before the next step, unless a job holds it. Any thread."""
        self.scheduler.residency.gone.append(digest)

    def stats(self) -> EngineStats:
        """Cheap; from any thread."""
        return EngineStats.of(
            self.scheduler,
            inbox=self._inbox.submits + len(self._entry),
            disk=None if self._tier is None else self._tier.store.stats(),
            disk_hit_tokens=0 if self._tier is None else self._tier.loads.hit_tokens,
            draining=self._draining,
            faults=self.loop.faults,
            violations=self.violations,
            forecast=self.loop.forecast,
        )

    @property
    def disk(self) -> DiskStore | None:
        """The store of the disk tier; its questions may be asked from any thread."""
        return None if self._tier is None else self._tier.store

    def _tell(self, job_id: str, well: bool) -> None:
        if job_id in self._readers:
            self._inbox.tell(job_id, well=well)

    def _run(self) -> None:
        while True:
            with self._inbox.wake:
                while not self._wanted():
                    if self._clock() - self._checked_at > 60.0:
                        self._check()
                    # A load that is late must not wait for the next arrival.
                    patience = 0.05 if self._entry else IDLE_S if self._probe is not None else None
                    if not self._inbox.wake.wait(patience) or self._entry:
                        break
                if self._closing:
                    break
            if self._wanted() or self._entry:
                self._step()
            else:
                self._measure()
        self._shut()

    def _wanted(self) -> bool:
        waits = bool(self._inbox) or self._closing or self.scheduler.busy
        return waits or (self._tier is not None and self._tier.pending)

    def _measure(self) -> None:
        """Some idle time, for the cost model. Failing, it is left alone: serving does not need it."""
        try:
            if self._probe is not None and self._probe.run(self._wanted):
                self._probe = None
        except Exception:
            log.exception("measuring the cost of a step failed; going on without a cost model")
            self._probe = None

    def _step(self) -> None:
        """Inbox, one step, outbox. Nothing that goes wrong in it ends the thread."""
        try:
            self._arrivals()
            faults = self.loop.faults
            if self._tier is None:
                self._dispatch(self.loop.step())
            else:
                self._step_with(self._tier)
            if self.loop.faults > faults:
                self._check()  # what the failed step has left behind
        except Exception as error:
            log.exception("engine step failed; all jobs end and the pool is rebuilt")
            self.loop.faults += 1
            fault = EngineFault(f"the engine failed and started afresh: {error}; please retry")
            self.scheduler.reset(fault, self._clock())
            self._dispatch(self.scheduler.take())

    def _step_with(self, tier: DiskTier) -> None:
        """A step, with what comes from the disk before it and what goes there after."""
        counters, refused = self.scheduler.counters, self._entry.loaded(tier)
        before, began = counters.computed_tokens, time.monotonic()
        outs = refused + self.loop.step()
        tokens = counters.computed_tokens - before
        if tokens >= 64:
            tier.pace.computed(tokens, time.monotonic() - began)
        tier.collect(self.scheduler.tree)
        for out in outs:
            if out.last:
                tier.leave(out.job_id)
        self._dispatch(outs)
        tier.pump(self.scheduler.tree, idle=not (self.scheduler.busy or self._inbox))

    def _shut(self) -> None:
        """Tell everyone who is left, when the cache is written."""
        closed = GalleyError("the engine was closed", code="cancelled")
        unborn = self._entry.close(closed)
        self.scheduler.reset(closed, self._clock())
        self._dispatch(self.scheduler.take() + unborn)
        self.loop.close()

    def _arrivals(self) -> None:
        if ended := self._entry.take():
            self._dispatch(ended)

    def _dispatch(self, outs: list[StepOut]) -> None:
        """To each reader its news; a job that nobody hears any more is cancelled."""
        for job_id in self._readers.tell(outs):
            self.cancel(job_id)

    def _check(self) -> None:
        """Invariants at idle and after a failed step (KV-1, CAN-3): a violation is a metric, a log line and
        a fresh pool, never a crash."""
        self._checked_at = self._clock()
        faults = self.scheduler.check()
        if faults:
            log.error("KV invariants violated, the cache is dropped: %s", "; ".join(faults[:5]))
            self.scheduler.reset(EngineFault("the cache was inconsistent"), self._clock())
            self.violations += len(faults)
            self._dispatch(self.scheduler.take())
