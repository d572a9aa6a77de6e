"""The engine: one thread behind, any number of callers in front."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from threading import Condition, Thread

from galley.errors import ConfigError, EngineFault, GalleyError, InvalidRequest, Overloaded
from galley.runtime.backend.base import Backend
from galley.runtime.cost import CostModel
from galley.runtime.loop import Loop
from galley.runtime.mailbox import Mailbox, Stream
from galley.runtime.meter import Costs, JobMeter
from galley.runtime.out import StepOut
from galley.runtime.policy import Policy
from galley.runtime.probe import IdleProbe
from galley.runtime.scheduler import Scheduler
from galley.runtime.stats import EngineStats
from galley.types import SamplingParams

__all__ = ["Engine", "EngineStats", "JobMeter", "StepOut", "build_scheduler"]

log = logging.getLogger(__name__)

IDLE_S = 1.0
"""Silence after which idle time is used for measuring."""


def build_scheduler(
    backend: Backend,
    *,
    eos_ids: tuple[int, ...] | frozenset[int],
    token_budget: int,
    max_jobs: int,
    max_queue: int,
    context: int | None,
    model_key: str = "",
    chunk: int | None = None,
    policy: Policy | None = None,
    cost: CostModel | None = None,
) -> Scheduler:
    """A scheduler of the backend's sizes.

    ``context=None`` is the model's own, or what the KV pool holds where that is less. Raises ConfigError when
    an explicit context is more than either.
    """
    spec = backend.spec
    most = min(spec.context, backend.num_blocks * backend.block_size)
    if context is not None and not 1 <= context <= most:
        raise ConfigError(
            f"a context of {context} tokens is not within 1..{most} (model: {spec.context}, "
            f"KV memory: {backend.num_blocks * backend.block_size})",
            param="engine.context",
        )
    return Scheduler(
        num_blocks=backend.num_blocks,
        block_size=backend.block_size,
        vocab=spec.vocab,
        context=context or most,
        eos=frozenset(eos_ids),
        token_budget=token_budget,
        chunk=chunk,
        max_jobs=max_jobs,
        max_queue=max_queue,
        model_key=f"{model_key}/{backend.fingerprint}",
        policy=policy,
        costs=Costs.of(
            spec, weight_bytes=backend.weight_bytes, kv_bytes_per_token=backend.kv_bytes_per_token
        ),
        cost=cost,
    )


class Engine:
    """Thread-safe face of one Loop. The backend stays the caller's to close, after ``close``.

    Args:
        eos_ids: ids that end an output.
        token_budget: most tokens in a step. chunk: most prompt tokens of one job in a step.
        max_jobs, max_queue: most running and most waiting choices.
        context: most tokens of prompt and output; None is what model and KV memory allow.
        model_key: digest of the weights; part of every KV key.
        cost: what a step takes, where known (``runtime.cost``).
        measure: without ``cost``, measure it in the first idle second of the engine's thread; the model is
            then handed to this function, to keep it.
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
        cost: CostModel | None = None,
        measure: Callable[[CostModel], None] | None = None,
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
            cost=cost,
        )
        self._probe = IdleProbe(self.scheduler, backend, found=measure) if measure and not cost else None
        self.loop = Loop(self.scheduler, backend, clock=clock, arrivals=self._arrivals)
        self.context = self.scheduler.admission.room
        self.violations = 0
        self._max_queue = max_queue
        self._clock = clock
        self._wake = Condition()
        # Guarded by _wake; the engine thread takes all of it once a step.
        self._submits: list[tuple[str, Callable[[], object]]] = []
        self._verdicts: list[tuple[str, bool]] = []
        self._sinks: dict[str, Stream | Callable[[StepOut], None]] = {}
        self._boxes: dict[Stream, Mailbox] = {}
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
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
        return bool(self._sinks)

    def close(self) -> None:
        """Cancel what is left and stop the thread. Idempotent; blocks for at most one step."""
        with self._wake:
            self._closing = self._draining = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            self._shut()

    async def drain(self) -> None:
        """Admit nothing more and return when all jobs are done (CAN-6)."""
        with self._wake:
            self._draining = True
        while self._sinks:
            await asyncio.sleep(0.01)

    def submit(
        self,
        job_id: str,
        prompt: list[int],
        params: SamplingParams,
        *,
        on_step: Callable[[StepOut], None] | Stream,
        lane: int = 0,
        tenant: str = "local",
        salt: str | None = None,
        priority: int = 0,
        max_queue_s: float | None = None,
        max_total_s: float | None = None,
    ) -> None:
        """Queue one choice; n choices are n submits with lanes 0 … n-1, and share the prompt's KV.

        ``on_step`` is called on the engine thread, once a step with news, and must not block. Raises at once:
        ContextLengthExceeded, InvalidRequest, Overloaded (queue full, draining, closed).
        """
        self.scheduler.admission.refuse(prompt, params)
        enter = partial(
            self.scheduler.submit,
            job_id,
            prompt,
            params,
            self._clock(),
            lane=lane,
            tenant=tenant,
            salt=salt,
            priority=priority,
            max_queue_s=max_queue_s,
            max_total_s=max_total_s,
            checked=True,
        )
        with self._wake:
            if self._draining:
                raise Overloaded("the engine is draining", retry_after_s=5.0)
            if job_id in self._sinks:
                raise InvalidRequest(f"job id {job_id!r} is in use", param="job_id")
            if len(self.scheduler.queue) + len(self._submits) >= self._max_queue:
                raise Overloaded("too many requests are waiting already", retry_after_s=1.0)
            self._sinks[job_id] = on_step
            self._submits.append((job_id, enter))
            self._wake.notify()

    async def stream(
        self,
        job_id: str,
        prompt: list[int],
        params: SamplingParams,
        *,
        lane: int = 0,
        tenant: str = "local",
        salt: str | None = None,
        priority: int = 0,
        max_queue_s: float | None = None,
        max_total_s: float | None = None,
    ) -> AsyncIterator[StepOut]:
        """``submit`` for asyncio; its errors come with the first step. Leaving the iterator cancels (CAN-1).

        A reader slower than the engine gets several steps in one StepOut; the engine never waits for it.
        """
        stream = Stream(job_id)
        with self._wake:
            self._boxes[stream] = self._mailbox(asyncio.get_running_loop())
        try:
            self.submit(
                job_id,
                prompt,
                params,
                on_step=stream,
                lane=lane,
                tenant=tenant,
                salt=salt,
                priority=priority,
                max_queue_s=max_queue_s,
                max_total_s=max_total_s,
            )
        except BaseException:
            del self._boxes[stream]
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

    def stats(self) -> EngineStats:
        """Cheap; from any thread."""
        return EngineStats.of(
            self.scheduler,
            inbox=len(self._submits),
            draining=self._draining,
            faults=self.loop.faults,
            violations=self.violations,
            forecast=self.loop.forecast,
        )

    def _tell(self, job_id: str, well: bool) -> None:
        with self._wake:
            if job_id in self._sinks:
                self._verdicts.append((job_id, well))
                self._wake.notify()

    def _mailbox(self, loop: asyncio.AbstractEventLoop) -> Mailbox:
        box = self._mailboxes.get(loop)
        if box is None:
            for dead in [known for known in self._mailboxes if known.is_closed()]:
                del self._mailboxes[dead]
            box = self._mailboxes[loop] = Mailbox(loop)
        return box

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._wanted():
                    if self._clock() - self._checked_at > 60.0:
                        self._check()
                    if not self._wake.wait(IDLE_S if self._probe is not None else None):
                        break
                if self._closing:
                    break
            if self._wanted():
                self._step()
            else:
                self._measure()
        self._shut()

    def _wanted(self) -> bool:
        return bool(self._submits or self._verdicts or self._closing or self.scheduler.busy)

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
            self._dispatch(self.loop.step())
        except Exception as error:
            log.exception("engine step failed; all jobs end and the pool is rebuilt")
            self.loop.faults += 1
            fault = EngineFault(f"the engine failed and started afresh: {error}; please retry")
            self.scheduler.reset(fault, self._clock())
            self._dispatch(self.scheduler.take())

    def _shut(self) -> None:
        """Tell everyone who is left."""
        with self._wake:
            self._submits, left = [], self._submits
        now = self._clock()
        closed = GalleyError("the engine was closed", code="cancelled")
        self.scheduler.reset(closed, now)
        unborn = [StepOut(job_id=job_id, error=closed, meter=JobMeter(finished=now)) for job_id, _ in left]
        self._dispatch(self.scheduler.take() + unborn)

    def _arrivals(self) -> None:
        """Take the inbox: first submits, then cancels, so that a cancel finds its job."""
        if not (self._submits or self._verdicts):
            return
        with self._wake:
            submits, self._submits = self._submits, []
            verdicts, self._verdicts = self._verdicts, []
        now = self._clock()
        refused = []
        for job_id, enter in submits:
            try:
                enter()
            except GalleyError as error:
                refused.append(StepOut(job_id=job_id, error=error, meter=JobMeter(finished=now)))
        for job_id, well in verdicts:
            (self.scheduler.finish if well else self.scheduler.cancel)(job_id, now)
        if refused:
            self._dispatch(refused)

    def _dispatch(self, outs: list[StepOut]) -> None:
        """To each sink its news; one wake-up for each event loop."""
        posts: dict[Mailbox, list[tuple[Stream, StepOut]]] = {}
        for out in outs:
            sink = self._sinks.pop(out.job_id, None) if out.last else self._sinks.get(out.job_id)
            if isinstance(sink, Stream):
                box = self._boxes.pop(sink) if out.last else self._boxes[sink]
                posts.setdefault(box, []).append((sink, out))
            elif sink is not None:
                try:
                    sink(out)
                except Exception:
                    log.exception("on_step of job %s failed; the job is cancelled", out.job_id)
                    self.cancel(out.job_id)
        for box, post in posts.items():
            if not box.post(post):
                for stream, _ in post:
                    self.cancel(stream.job_id)

    def _check(self) -> None:
        """Invariants at idle (KV-1): a violation is a metric, a log line and a fresh pool, never a crash."""
        self._checked_at = self._clock()
        faults = self.scheduler.check()
        if faults:
            log.error("KV invariants violated, the cache is dropped: %s", "; ".join(faults[:5]))
            self.scheduler.reset(EngineFault("the cache was inconsistent"), self._clock())
            self.violations += len(faults)
