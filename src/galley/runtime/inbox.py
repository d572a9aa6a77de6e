"""The inbox: what callers on any thread have for the engine thread, which takes all of it once a step."""

from concurrent.futures import Future
from threading import Condition
from typing import NamedTuple

from galley.runtime.arrival import Arrival
from galley.runtime.park import Parked
from galley.runtime.queue import Waiting

__all__ = ["Inbox", "Post"]


class Post(NamedTuple):
    """What has come since the last step. ``verdicts``: job id, and whether it is to end well."""

    submits: list[Arrival]
    verdicts: list[tuple[str, bool]]
    parks: list[tuple[str, "Future[Parked]"]]


class Inbox:
    """Everything in it is guarded by ``wake``, on which the engine thread sleeps.

    Attributes:
        coming: by tenant, what was submitted and is not in the scheduler's queue yet: still here, or waiting
            for the disk. The gate counts it.
    """

    def __init__(self) -> None:
        self.wake = Condition()
        self.coming: dict[str, Waiting] = {}
        self._submits: list[Arrival] = []
        self._verdicts: list[tuple[str, bool]] = []
        self._parks: list[tuple[str, Future[Parked]]] = []

    def __bool__(self) -> bool:
        return bool(self._submits or self._verdicts or self._parks)

    @property
    def submits(self) -> int:
        """Submissions not taken yet."""
        return len(self._submits)

    def put(self, arrival: Arrival) -> None:
        """One submission."""
        with self.wake:
            self._submits.append(arrival)
            self.coming.setdefault(arrival.tenant, Waiting()).more(len(arrival.tokens))
            self.wake.notify()

    def came(self, arrival: Arrival) -> None:
        """It is no longer on its way: the queue counts it now, or nobody."""
        with self.wake:
            waiting = self.coming[arrival.tenant]
            waiting.fewer(len(arrival.tokens))
            if not waiting.jobs:
                del self.coming[arrival.tenant]

    def tell(self, job_id: str, *, well: bool) -> None:
        """End a job, well or not."""
        with self.wake:
            self._verdicts.append((job_id, well))
            self.wake.notify()

    def park(self, job_id: str) -> "Future[Parked]":
        """Park a job; the future is set by the engine."""
        future: Future[Parked] = Future()
        with self.wake:
            self._parks.append((job_id, future))
            self.wake.notify()
        return future

    def nudge(self) -> None:
        """Wake the engine thread: something else has come up."""
        with self.wake:
            self.wake.notify()

    def take(self, *, parks: bool) -> Post:
        """All that is here; jobs to be parked stay when it is not the time for ``parks``."""
        with self.wake:
            post = Post(self._submits, self._verdicts, self._parks if parks else [])
            self._submits, self._verdicts = [], []
            self._parks = self._parks[len(post.parks) :]
        return post

    def close(self) -> Post:
        """What is left, for the last time; nothing counts as coming any more."""
        post = self.take(parks=True)
        with self.wake:
            self.coming = {}
        return post
