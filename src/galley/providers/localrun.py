"""One request on the local engine: a task per choice."""

import asyncio
from collections.abc import AsyncIterator
from typing import Unpack

import msgspec

from galley.errors import EngineFault
from galley.model.adapter import Adapter
from galley.model.model import Model
from galley.providers.adapters import Adapters
from galley.providers.base import Meter, Prepared
from galley.providers.choice import ChoiceText
from galley.providers.outbox import Outbox
from galley.providers.toolbox import Toolbox
from galley.providers.vectors import finished
from galley.runtime.arrival import Terms
from galley.runtime.engine import Engine
from galley.runtime.reading import Pooled, Scored
from galley.types import Delta, Embed

__all__ = ["LocalRun"]

STOP_TIMEOUT = 10.0
"""Seconds to wait for the engine to acknowledge a cancel. It takes one step; this is for a dead engine."""
AT_ONCE = 128
"""Texts of one request for embeddings that are in the engine at once: the queue is everybody's."""


class LocalRun:
    """One request on the engine: a task per choice reads steps and puts text into one outbox.

    The tasks outlive an impatient reader: after a cancel they stay until the engine has said its last word,
    because that word carries the meter and every receipt needs it.
    """

    def __init__(
        self,
        engine: Engine,
        model: Model,
        toolbox: Toolbox,
        prepared: Prepared,
        meter: Meter,
        *,
        adapters: Adapters,
    ) -> None:
        self._engine = engine
        self._model = model
        self._toolbox = toolbox
        self._prepared = prepared
        self._meter = meter
        self._outbox = Outbox(prepared.count)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()
        self._room = asyncio.Semaphore(AT_ONCE)
        self._adapters = adapters
        self._uses: Adapter | None = None

    async def begin(self) -> None:
        """Submit every choice. Raises what the engine raises at submission, with nothing left running."""
        n = self._prepared.params.n
        if (adapter := self._prepared.adapter) is not None:
            self._adapters.use(adapter)
            self._uses = adapter
        for index in range(self._prepared.count):
            job = f"{self._prepared.request.id}/{index}"
            self._tasks[job] = asyncio.create_task(self._pump(job, index, index // n, index % n))
        # A submission is made before the task first waits; so one turn of the loop tells who was refused.
        await asyncio.sleep(0)
        if self._outbox.error is not None:
            await self.stop()
            raise self._outbox.error

    async def deltas(self) -> AsyncIterator[Delta]:
        """See ``Run.deltas``."""
        while True:
            batch = await self._outbox.take()
            if batch is None:
                return
            for delta in batch:
                yield delta

    async def stop(self) -> None:
        """See ``Run.stop``."""
        self._stopping.set()
        left = [task for task in self._tasks.values() if not task.done()]
        for job, task in self._tasks.items():
            if not task.done():
                self._engine.cancel(job)
        if left:
            _, deaf = await asyncio.wait(left, timeout=STOP_TIMEOUT)
            for task in deaf:
                task.cancel()
        if self._uses is not None:
            used, self._uses = self._uses, None
            self._adapters.done(used)

    async def _pump(self, job: str, index: int, number: int, lane: int) -> None:
        """Read one choice to its end, whatever happens to the reader. Never raises but for cancellation."""
        try:
            if (embed := self._prepared.request.embed) is None:
                await self._read(job, index, number, lane)
            else:
                async with self._room:
                    await self._embed(job, index, embed)
            self._outbox.end()
        except Exception as error:  # goes to the reader, who raises it; a task must not die unheard
            self._outbox.fail(error)

    async def _read(self, job: str, index: int, number: int, lane: int) -> None:
        request = self._prepared.request
        ids = self._prepared.prompts[number]
        params = msgspec.structs.replace(
            self._prepared.params, max_tokens=self._prepared.max_tokens[number], n=1
        )
        compiled = self._prepared.compiled
        choice = ChoiceText(
            self._model,
            ids,
            params,
            index,
            output=self._toolbox.output(request, ids),
            shown=self._toolbox.shown,
        )
        scored = request.echo and params.logprobs is not None
        async for out in self._engine.stream(
            job,
            ids,
            params,
            **self._terms(
                lane=lane,
                cache=self._prepared.cache[number] if self._prepared.cache else None,
                guide=compiled.guide() if compiled is not None else None,
                banned=self._prepared.banned,
                reading=Scored(len(ids)) if scored else None,
            ),
        ):
            if out.meter is not None:
                self._meter.jobs[index] = out.meter
            if self._stopping.is_set() or choice.ended:
                continue
            if out.error is not None:
                raise out.error
            deltas = choice.read(out)
            for delta in deltas:
                self._meter.note(delta)
                self._outbox.put(delta)
            if deltas[-1].finish is not None and out.finish is None:
                self._engine.finish(job)
        if not choice.ended and not self._stopping.is_set():
            raise EngineFault("The engine ended the request without a finish reason.")

    async def _embed(self, job: str, index: int, embed: Embed) -> None:
        """One text to its vector. Nothing when the run was stopped before its turn came."""
        if self._stopping.is_set():
            return
        ids, pooling = self._prepared.prompts[index], self._prepared.pooling
        assert pooling is not None
        reading = Pooled(pooling, len(ids))
        params = msgspec.structs.replace(self._prepared.params, max_tokens=0, temperature=0.0)
        async for out in self._engine.stream(job, ids, params, **self._terms(reading=reading)):
            if out.meter is not None:
                self._meter.jobs[index] = out.meter
            if self._stopping.is_set():
                continue
            if out.error is not None:
                raise out.error
            if out.vector is None:
                raise EngineFault("The engine ended the request without a vector.")
            delta = Delta(
                index=index,
                vector=finished(out.vector, embed),
                finish="stop",
                cached_tokens=out.cached_tokens,
            )
            self._meter.note(delta)
            self._outbox.put(delta)

    def _terms(self, **more: Unpack[Terms]) -> Terms:
        """How a choice is treated: what all of the request's have in common, and ``more``."""
        request = self._prepared.request
        common = Terms(
            tenant=request.tenant,
            salt=request.cache_salt,
            priority=request.priority,
            urgent=request.service_tier == "priority",
            max_queue_s=request.max_queue_s,
            max_total_s=request.max_total_s,
            adapter=self._prepared.adapter,
        )
        return {**common, **more}
