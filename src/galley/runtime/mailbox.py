"""From the engine thread to an asyncio loop: bounded, coalescing, never blocking (CAN-4)."""

import asyncio
from threading import Lock

from galley.runtime.out import StepOut

__all__ = ["Mailbox", "Stream"]


class Stream:
    """The reading end of one job: at most one pending StepOut; a slow reader finds later ones merged in."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self._pending: StepOut | None = None
        self._ready = asyncio.Event()

    def offer(self, out: StepOut) -> None:
        """Add what a step made. Called on the event loop."""
        self._pending = out if self._pending is None else self._pending.then(out)
        self._ready.set()

    async def next(self) -> StepOut:
        """Everything since the last call, as one StepOut; waits for something."""
        while self._pending is None:
            self._ready.clear()
            await self._ready.wait()
        out, self._pending = self._pending, None
        return out


class Mailbox:
    """All streams of one event loop. However many jobs a step serves, the loop is woken once.

    Also bounded when the event loop stands still: one merged StepOut a stream waits, and one wake-up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.wakeups = 0
        self._lock = Lock()
        self._pending: dict[Stream, StepOut] = {}
        self._woken = False

    def post(self, outs: list[tuple[Stream, StepOut]]) -> bool:
        """Hand over one step's outcome; called on the engine thread. False when the loop is closed."""
        with self._lock:
            pending = self._pending
            for stream, out in outs:
                earlier = pending.get(stream)
                pending[stream] = out if earlier is None else earlier.then(out)
            if self._woken:
                return True
            self._woken = True
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the event loop was closed without closing its streams
            return False
        self.wakeups += 1
        return True

    def _deliver(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, {}
            self._woken = False
        for stream, out in pending.items():
            stream.offer(out)
