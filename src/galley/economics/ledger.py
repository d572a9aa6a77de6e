"""The ledger as the serving path sees it: acts go into a queue, one thread commits them in groups.

While a transaction is under way the next acts gather, so a busy server pays for a commit once for many
requests and an idle one waits for nobody. Neither the event loop nor the engine's thread ever touches the
database.
"""

import asyncio
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

from galley.economics.acts import Act, Extension, Grant, Opening, Renewal, Settled, Settlement
from galley.economics.board import Board
from galley.economics.limits import Rules
from galley.economics.reaper import Reaper
from galley.economics.store import LedgerUnavailable, Store, ledger_url
from galley.errors import GalleyError

__all__ = ["Ledger"]

GROUP = 256
LEASE_S = 60.0
RETRY_S = 1.0
LINGER_S = 0.25
"""How long acts that nobody waits for may gather. Until then the board has them."""


def tell_stderr(line: str) -> None:
    """One plain line."""
    sys.stderr.write(f"galley: ledger: {line}\n")


class Work:
    """An act on its way, and who waits for it."""

    __slots__ = ("act", "after", "done")

    def __init__(self, act: Act | None, after: Callable[[], None] | None = None) -> None:
        self.act = act
        self.after = after
        self.done: Future[Any] = Future()
        self.done.set_running_or_notify_cancel()  # who stops waiting does not undo the act


class Ledger:
    """One process's way to the ledger.

    Args:
        folder: of the boards, on this machine.
        lease_s: how long a reservation holds without being renewed; renewed four times in that time.
        strict: refuse every request while the ledger cannot be written. Otherwise only those that a limit may
            refuse; the rest run, and are entered when it can.

    Attributes:
        owed: settlements not yet committed because the database gave an error.
        fault: the last failure in words, None once a later commit went through.
        reaped: reservations settled for dead processes.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        *,
        lease_s: float = LEASE_S,
        strict: bool = False,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        tell: Callable[[str], None] = tell_stderr,
    ) -> None:
        self.store = store
        self.strict = strict
        self.clock_us = clock_us
        self.lease_us = int(lease_s * 1e6)
        self.owed: list[Work] = []
        self.fault: str | None = None
        self.reaped = 0
        self.groups = 0
        self.acts = 0
        self._tell = tell
        self._folder = folder
        self._queue: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._later: list[Work] = []
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._board: Board | None = None
        self._reaper: Reaper | None = None
        self._renew_at = self._reap_at = self._read_at = 0

    @classmethod
    def at(cls, home: Path, url: str | None, *, strict: bool = False) -> "Ledger":
        """The ledger of a home, in the database of ``url`` or in a file of its own. Raises ConfigError."""
        return cls(Store(ledger_url(url, home)), home / "ledger.live", strict=strict)

    @property
    def board(self) -> Board:
        """This process's, made on first use. Raises LedgerUnavailable."""
        with self._lock:
            if self._board is None:
                try:
                    self._board = Board(self._folder)
                except OSError as error:
                    raise LedgerUnavailable(f"{self._folder}: {error}", retry_after_s=1.0) from error
                self._reaper = Reaper(self.store, self._folder, self._board.owner, self.clock_us)
            return self._board

    @property
    def owner(self) -> str:
        """The process, and its board where it has one."""
        try:
            return self.board.owner
        except LedgerUnavailable:
            return "no board"

    @property
    def rules(self) -> Rules:
        """As last read: at the latest transaction, and at most a second ago."""
        return self.store.rules

    def start(self) -> None:
        """Begin, and first of all settle what dead processes left. Never raises: without a database it goes
        on trying."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="galley-ledger", daemon=True)
            self._thread.start()

    def close(self, timeout: float = 30.0) -> None:
        """Commit what is queued and stop. What cannot be committed stays on the board, for the next start."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:
            self._queue.put(Work(None))
            self._thread.join(timeout)
        elif self._board is not None:
            self._board.close(remove=True)

    # ---- the event loop's side

    async def reserve(self, opening: Opening) -> Grant:
        """Hold the worst case of a request. Raises QuotaExceeded, RateExceeded, LedgerUnavailable."""
        return cast(Grant, await asyncio.wrap_future(self._put(opening)))

    async def extend(self, extension: Extension) -> Grant:
        """Hold more. Raises as ``reserve``."""
        return cast(Grant, await asyncio.wrap_future(self._put(extension)))

    def settle(
        self, settlement: Settlement, after: Callable[[], None], *, later: bool = False
    ) -> "Future[Settled | None]":
        """Enter what a request cost; done exactly once, and tried until it is. ``after`` is called by the
        ledger's thread once it is committed. ``later`` lets it wait for others."""
        return self._put(settlement, after, later=later)

    def note(self, opening: Opening) -> None:
        """Open a reservation that no limit can refuse. It waits for others; the board has it meanwhile."""
        self._put(opening, later=True)

    @property
    def quiet(self) -> bool:
        """Whether no limit is set, so that nobody needs to wait for an answer."""
        return self.store.read and self.rules.quiet and not self.strict and self.fault is None

    def track(self, id: str, slot: int) -> None:
        """Renew this reservation until ``untrack``."""
        with self._lock:
            self._open[id] = slot

    def untrack(self, id: str) -> None:
        """It is being settled."""
        with self._lock:
            self._open.pop(id, None)

    async def settled(self) -> None:
        """Wait until everything put in so far has been tried."""
        await asyncio.wrap_future(self._put(None))

    def _put(
        self, act: Act | None, after: Callable[[], None] | None = None, *, later: bool = False
    ) -> "Future[Any]":
        work = Work(act, after)
        if act is None:
            work.act = Renewal(
                id="", lease_us=0, prompt_tokens=0, cached_tokens=0, completion_tokens=0
            )  # changes nothing, and is answered in its turn
        if self._closed:
            work.done.set_exception(LedgerUnavailable("The ledger is closed.", retry_after_s=5.0))
            return work.done
        self.start()
        if later:
            with self._lock:
                self._later.append(work)
        else:
            self._queue.put(work)
        return work.done

    def _gathered(self) -> list[Work]:
        """What waited for others, in order: before whatever comes by the queue."""
        with self._lock:
            later, self._later = self._later, []
        return later

    # ---- the thread

    def _run(self) -> None:
        last = False
        self._tick(force=True)
        while not last:
            group: list[Work] = []
            try:
                group.append(self._queue.get(timeout=LINGER_S))
                while len(group) < GROUP:
                    group.append(self._queue.get_nowait())
            except queue.Empty:
                pass
            last = any(work.act is None for work in group)
            group = self._gathered() + group
            self._commit([work for work in group if work.act is not None])
            if not last:
                self._tick(idle=not group)
        self._commit(self._gathered())
        while True:  # whatever was put in behind the last one
            try:
                self._commit([self._queue.get_nowait()])
            except queue.Empty:
                break
        if self.owed:
            self._tell(f"{len(self.owed)} settlements are not entered; the next start does it")
        if self._board is not None:
            self._board.close(remove=not self.owed and not self._open)
        self.store.close()

    def _tick(self, *, force: bool = False, idle: bool = False) -> None:
        """What is done by the clock: owed settlements, renewals, the dead, and changed limits."""
        now = self.clock_us()
        try:
            if self.owed:
                self._commit([])
            if now >= self._renew_at:
                self._renew_at = now + self.lease_us // 4
                self._renew(now)
            if force or now >= self._reap_at:
                self._reap_at = now + self.lease_us // 2
                owner = self.board.owner
                assert self._reaper is not None and owner
                found = self._reaper.reap()
                self.reaped += found
                if found:
                    self._tell(f"{found} requests of a process that ended without settling them are settled")
                self._well()
            elif idle and now >= self._read_at:  # else the transactions have read them
                self._read_at = now + int(RETRY_S * 1e6)
                self.store.refresh()
                self._well()
        except Exception as error:  # the thread must live; what failed is tried again
            self._ill(error)

    def _renew(self, now: int) -> None:
        with self._lock:
            held = dict(self._open)
        acts: list[Act] = []
        for id, slot in held.items():
            seen = self.board.read_slot(slot)
            acts.append(
                Renewal(
                    id=id,
                    lease_us=now + self.lease_us,
                    prompt_tokens=seen.prompt_tokens,
                    cached_tokens=seen.cached_tokens,
                    completion_tokens=seen.completion_tokens,
                )
            )
        self.store.apply(acts)

    def _commit(self, group: list[Work]) -> None:
        """One transaction for the group and what is owed; each alone should that fail for a fault of one."""
        works, self.owed = self.owed + group, []
        if not works:
            return
        try:
            results = self.store.apply([cast(Act, work.act) for work in works])
        except Exception as error:
            if len(works) > 1 and not isinstance(error, LedgerUnavailable):
                for work in works:
                    self._commit([work])
            else:
                self._failed(works, error)
            return
        self.groups += 1
        self.acts += len(works)
        self._well()
        for work, result in zip(works, results, strict=True):
            if isinstance(result, GalleyError):
                work.done.set_exception(result)
            else:
                work.done.set_result(result)
            if work.after is not None:
                work.after()

    def _failed(self, works: list[Work], error: Exception) -> None:
        self._ill(error)
        for work in works:
            if isinstance(work.act, Settlement):
                self.owed.append(work)  # never dropped
            elif isinstance(error, GalleyError):
                work.done.set_exception(error)
            else:
                work.done.set_exception(
                    LedgerUnavailable(f"The ledger failed: {type(error).__name__}", retry_after_s=1.0)
                )

    def _ill(self, error: Exception) -> None:
        words = error.message if isinstance(error, GalleyError) else f"{type(error).__name__}: {error}"
        if words != self.fault:
            self._tell(words)
        self.fault = words

    def _well(self) -> None:
        if self.fault is not None:
            self._tell("works again")
        self.fault = None
