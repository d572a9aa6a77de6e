"""A model that is served whether it is in memory or not: it sleeps, and wakes when somebody asks."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal, Protocol

import msgspec

from galley.errors import Overloaded
from galley.model.model import Model
from galley.providers.adapters import Adapters
from galley.providers.base import Load, Meter, ModelCard, Prepared, Run
from galley.providers.local import LocalProvider
from galley.providers.opened import Opened
from galley.types import Delta, Digests, Request

__all__ = ["Resident", "Room", "State", "Status"]

State = Literal["awake", "draining", "asleep", "waking"]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``galley ps``. Times are seconds."""

    id: str
    state: State
    level: int
    """Depth of the sleep: 0 awake, 1 weights in the page cache and the tokenizer kept, 2 nothing kept."""
    bytes: int
    """Of weights and KV cache while awake, else 0."""
    context: int
    running: int
    waiting: int
    requests: int
    """In hand: arrived and not yet answered."""
    pinned: bool
    idle_s: float
    """Since the last request ended; 0 while one is in hand."""
    sleeps_in_s: float | None
    """Until it falls asleep for want of requests; None when it will not."""
    wake_s: float | None
    """What the last opening took."""


class Room(Protocol):
    """Who makes room before a model wakes (``providers.fleet.Fleet``)."""

    async def make(self, resident: "Resident") -> None:
        """Raises Overloaded when there is none to be had."""
        ...


class Resident:
    """One model: a Provider whose engine exists only while it is awake (SLP-1).

    awake → draining → asleep → waking → awake. Sleep waits for the requests in hand; those that come
    meanwhile wait and wake it again (SLP-3). Asleep there is neither engine nor KV cache, so nothing of an
    earlier life can be matched (SLP-2, KV-10). At level 1 the file stays mapped, its tokenizer and template
    ready, which is most of what a start takes (SLP-5); at level 2 nothing is kept.

    Belongs to one event loop. Everything slow happens in threads.

    Args:
        open_model: opens it in a thread, given the file when that is still open, and the adapters it had.
        wake_s: longest that a request waits for the model.
        drain_s: longest that sleep waits for the requests in hand, before it is called off.
    """

    def __init__(
        self,
        card: ModelCard,
        open_model: Callable[[Model | None, Adapters | None], Opened],
        room: Room,
        *,
        opened: Opened | None = None,
        wake_s: float = 120.0,
        drain_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = "local"
        self.card = card
        self.state: State = "asleep" if opened is None else "awake"
        self.level = 2 if opened is None else 0
        self.pinned = False
        self.idle_after_s: float | None = None
        self.users = 0
        """Requests in hand, those that wait for it to wake included."""
        self.holders = 0
        """Requests that keep it awake."""
        self.quiet = asyncio.Event()
        self.quiet.set()
        self.opened = opened
        self.last_used = clock()
        self.opening_s: float | None = None
        self._open = open_model
        self._room = room
        self._wake_s = wake_s
        self._drain_s = drain_s
        self.clock = clock
        self._lock = asyncio.Lock()
        self._kept: Model | None = None
        self._adapters: Adapters | None = None if opened is None else opened.provider.adapters
        self._rousing: asyncio.Task[None] | None = None
        self._digests = Digests() if opened is None else opened.provider.digests
        self._fingerprint = "" if opened is None else opened.provider.fingerprint

    @property
    def cards(self) -> Sequence[ModelCard]:
        if self.opened is not None:
            return self.opened.provider.cards
        return [self.card, *(self._adapters.cards(self.card) if self._adapters is not None else ())]

    @property
    def digests(self) -> Digests:
        return self._digests

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def adapters(self) -> Adapters | None:
        """Adapters of this model, also while it sleeps; None before it was first opened."""
        return self._adapters

    async def awake(self) -> LocalProvider:
        """The running model; wakes it if it sleeps (SLP-3).

        Raises Overloaded when that takes too long or there is no room, and whatever opening it raises.
        """
        try:
            async with asyncio.timeout(self._wake_s):
                while self.state != "awake" or self.opened is None:
                    if self._rousing is None:
                        # A task of its own: whoever gives up waiting leaves the opening to the others.
                        self._rousing = asyncio.create_task(self._rouse())
                        self._rousing.add_done_callback(self._roused)
                    await asyncio.shield(self._rousing)
                return self.opened.provider
        except TimeoutError:
            raise Overloaded(
                f"The model {self.card.id!r} did not wake within {self._wake_s:g} s.",
                code="model_waking",
                retry_after_s=self.opening_s or 5.0,
            ) from None

    async def _rouse(self) -> None:
        async with self._lock:
            if self.opened is not None:
                return
            await self._room.make(self)
            before, self.state = self.clock(), "waking"
            try:
                self.opened = await asyncio.to_thread(self._open, self._kept, self._adapters)
            finally:
                self.state = "asleep" if self.opened is None else "awake"
            self.level = 0
            self._adapters = self.opened.provider.adapters
            self.last_used = self.clock()
            self.opening_s = self.last_used - before
            self._digests, self._fingerprint = self.opened.provider.digests, self.opened.provider.fingerprint

    def _roused(self, task: asyncio.Task[None]) -> None:
        self._rousing = None
        if not task.cancelled():
            task.exception()  # those who waited have it; without any, nobody is to be warned

    async def sleep(self, level: int = 1) -> bool:
        """Finish what is in hand, then give the memory back (SLP-1). False when it would not come to an end.

        A model that sleeps at level 1 can be put to level 2; the other way round nothing happens.
        """
        async with self._lock:
            if self.opened is not None:
                self.state = "draining"
                try:
                    async with asyncio.timeout(self._drain_s):
                        await self.quiet.wait()
                except TimeoutError:
                    self.state = "awake"
                    return False
                self._kept = self.opened.release()
                opened, self.opened = self.opened, None
                self.card = opened.provider.cards[0]
                await asyncio.to_thread(opened.close)
                self.state, self.level = "asleep", 1
            if level >= 2 and self._kept is not None:
                self._kept.close()
                self._kept = None
            if self._kept is None:
                self.level = 2
            return True

    async def shut(self) -> None:
        """Close it now, whatever is in hand: for the end of the process. Idempotent."""
        async with self._lock:
            opened, self.opened = self.opened, None
            if opened is not None:
                await asyncio.to_thread(opened.close)
            if self._kept is not None:
                self._kept.close()
            self._kept, self.state, self.level = None, "asleep", 2

    async def prepare(self, request: Request) -> Prepared:
        """See ``Provider.prepare``; wakes the model first."""
        use = Use(self)
        try:
            return await (await use.begin()).prepare(request)
        finally:
            use.end()

    async def start(self, prepared: Prepared, meter: Meter) -> Run:
        """See ``Provider.start``; the model stays awake until the run has stopped."""
        use = Use(self)
        try:
            run = await (await use.begin()).start(prepared, meter)
        except BaseException:
            use.end()
            raise
        return HeldRun(run, use)

    def load(self) -> Load:
        """See ``Provider.load``; zeros while it sleeps."""
        return Load() if self.opened is None else self.opened.provider.load()

    def token(self, id: int) -> tuple[str, bytes]:
        """See ``Provider.token``."""
        return self._provider().token(id)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """See ``Provider.encode``."""
        return self._provider().encode(text, special=special)

    def decode(self, ids: list[int]) -> str:
        """See ``Provider.decode``."""
        return self._provider().decode(ids)

    def render(self, request: Request) -> str:
        """See ``Provider.render``."""
        return self._provider().render(request)

    def status(self) -> Status:
        """How it is now."""
        load = self.load()
        idle = 0.0 if self.users else self.clock() - self.last_used
        leaves = self.idle_after_s is not None and self.state == "awake" and not self.pinned
        return Status(
            id=self.card.id,
            state=self.state,
            level=self.level,
            bytes=0 if self.opened is None else self.opened.bytes,
            context=self.cards[0].context,
            running=load.running,
            waiting=load.waiting,
            requests=self.users,
            pinned=self.pinned,
            idle_s=idle,
            sleeps_in_s=max(0.0, (self.idle_after_s or 0.0) - idle) if leaves else None,
            wake_s=self.opening_s,
        )

    def _provider(self) -> LocalProvider:
        if self.opened is None:
            raise Overloaded(
                f"The model {self.card.id!r} is asleep; a request wakes it.",
                code="model_asleep",
                retry_after_s=self.opening_s or 5.0,
            )
        return self.opened.provider


class Use:
    """A request in hand: it waits for the model, then holds it awake until ``end``."""

    def __init__(self, resident: Resident) -> None:
        self._resident = resident
        self._holds = False
        self._ended = False
        resident.users += 1

    async def begin(self) -> LocalProvider:
        """The running model, which does not fall asleep from here on."""
        resident = self._resident
        provider = await resident.awake()
        # No turn of the event loop lies between: whoever wants it to sleep sees this holder.
        self._holds = True
        resident.holders += 1
        resident.quiet.clear()
        return provider

    def end(self) -> None:
        """Idempotent."""
        if self._ended:
            return
        self._ended = True
        resident = self._resident
        resident.users -= 1
        resident.last_used = resident.clock()
        if self._holds:
            resident.holders -= 1
            if not resident.holders:
                resident.quiet.set()


class HeldRun:
    """A run that keeps its model awake until ``stop``."""

    def __init__(self, run: Run, use: Use) -> None:
        self._run = run
        self._use = use

    async def deltas(self) -> AsyncIterator[Delta]:
        """See ``Run.deltas``."""
        async for delta in self._run.deltas():
            yield delta

    async def stop(self) -> None:
        """See ``Run.stop``."""
        try:
            await self._run.stop()
        finally:
            self._use.end()
