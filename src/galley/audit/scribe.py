"""The scribe: one thread that turns receipts into entries of the audit log, many at a time.

The event loop only queues references; commitments, JSON, hashing and the disk are the scribe's. What has come
meanwhile is appended with one sync (group commit). A receipt goes to the receipt store with its leaf once the
entry is durable, so a stored receipt always has its entry.
"""

import asyncio
import contextlib
import hashlib
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import msgspec

from galley.audit.entry import begin_entry, erasure_entry, request_entry, spoken
from galley.audit.log import AuditLog, AuditUnavailable
from galley.audit.note import Signer
from galley.audit.spool import tell_stderr
from galley.audit.subjects import Subjects, canonical
from galley.audit.tiles import MOST
from galley.errors import ConfigError, GalleyError
from galley.types import Delta, Receipt, Request

__all__ = ["Scribe"]

BATCH = 512
"""Most entries of one append."""
SIGN_AT = 4096
"""Unsigned entries at which a checkpoint does not wait for its time."""


class Store(Protocol):
    """Where receipts go (``audit.receipts.ReceiptStore``)."""

    def hold(self, receipt: Receipt) -> None: ...
    def record(self, receipt: Receipt) -> None: ...


class Item:
    """One thing to write down. ``done`` is set once it is durable, or when it could not be written."""

    def __init__(
        self,
        *,
        receipt: Receipt | None = None,
        request: Request | None = None,
        pieces: Mapping[int, Sequence[Delta]] | None = None,
        approvals: Sequence[Mapping[str, Any]] = (),
        begins: str | None = None,
        done: "Future[None] | None" = None,
        last: bool = False,
        flush: bool = False,
    ) -> None:
        self.receipt = receipt
        self.request = request
        self.pieces = pieces or {}
        self.approvals = approvals
        self.begins = begins
        self.done = done
        self.last = last
        self.flush = flush
        self.entry: bytes | None = None


class Scribe:
    """Writes one log; owned by a server.

    Args:
        store: gets each receipt after its entry.
        strict: no log, no tokens: a request is let in once its ``begin`` entry is durable, and its last bytes
            are sent once its ``request`` entry is. Otherwise entries are at most ``batch_s`` behind.
        checkpoint_s: how often the tree is signed while there is something new.
        most: entries that may wait for a log that cannot be written; beyond it requests are refused.
        retry_s: how soon a failed append is tried again.

    Attributes:
        fault: the last failure in words; None once an append went through.
        failures: appends that failed.
    """

    def __init__(
        self,
        log: AuditLog,
        subjects: Subjects,
        store: Store,
        *,
        strict: bool = False,
        batch_s: float = 0.02,
        checkpoint_s: float = 1.0,
        most: int = 10_000,
        retry_s: float = 1.0,
        tell: Callable[[str], None] = tell_stderr,
    ) -> None:
        self.log = log
        self.subjects = subjects
        self.strict = strict
        self.fault: str | None = None
        self.failures = 0
        self._store = store
        self._batch_s = batch_s
        self._checkpoint_s = checkpoint_s
        self._most = most
        self._retry_s = retry_s
        self._tell = tell
        self._queue: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._pending: list[Item] = []
        self._sign_at = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._write_forever, name="galley-audit", daemon=True)
        self._thread.start()

    @classmethod
    def opened(
        cls,
        store: Store,
        *,
        mode: str,
        folder: Path,
        signing_key: Path,
        origin: str | None,
        checkpoint_s: float,
        tell: Callable[[str], None] = tell_stderr,
    ) -> "Scribe | None":
        """The scribe that the settings ask for; None with mode ``off``.

        Raises ConfigError (no cryptography, or the log is not to be had), AuditBusy, AuditDamaged.
        """
        if mode == "off":
            return None
        try:
            log = AuditLog(folder, Signer.kept(signing_key, name=origin))
        except OSError as error:
            raise ConfigError(f"The audit log cannot be opened: {error}", param="audit.folder") from error
        for note in log.notes:
            tell(f"galley: audit log: {note}")
        return cls(
            log,
            Subjects(folder / "keys"),
            store,
            strict=mode == "strict",
            checkpoint_s=checkpoint_s,
            tell=tell,
        )

    # ---- the event loop's side

    async def admit(self, request: Request, receipt: str) -> None:
        """Before a request runs. Raises AuditUnavailable where it could not be accounted for."""
        done = self.begin(request, receipt)
        if done is not None:
            await asyncio.wrap_future(done)

    def begin(self, request: Request, receipt: str) -> "Future[None] | None":
        """The same without an event loop: in strict mode, what to wait for. Raises AuditUnavailable."""
        if self._closed or len(self._pending) >= self._most:
            raise AuditUnavailable(f"The audit log cannot be written: {self.fault}", retry_after_s=1.0)
        if not self.strict:
            return None
        done: Future[None] = Future()
        self._queue.put(Item(request=request, begins=receipt, done=done))
        return done

    def put(
        self,
        receipt: Receipt,
        request: Request,
        pieces: Mapping[int, Sequence[Delta]],
        approvals: Sequence[Mapping[str, Any]] = (),
    ) -> "Future[None] | None":
        """After a request, whatever became of it. Never blocks. In strict mode the result tells when the
        entry is durable; its exception is AuditUnavailable."""
        self._store.hold(receipt)
        done: Future[None] | None = Future() if self.strict else None
        self._queue.put(Item(receipt=receipt, request=request, pieces=pieces, approvals=approvals, done=done))
        return done

    def flush(self, timeout: float | None = None) -> None:
        """Wait until what was put so far is in the log and signed. Raises what kept it from that."""
        done: Future[None] = Future()
        self._queue.put(Item(done=done, flush=True))
        done.result(timeout)

    def close(self) -> None:
        """Write and sign what is left, and let go of the log. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(Item(last=True))
        self._thread.join()

    # ---- the thread

    def _write_forever(self) -> None:
        while True:
            batch = self._gather()
            for item in batch:
                self._spell(item)
            written = self._append(batch)
            flushes = [item for item in batch if item.flush and item.done is not None]
            last = any(item.last for item in batch)
            due = time.monotonic() >= self._sign_at or self.log.unsigned >= SIGN_AT
            fault = None if written else AuditUnavailable(f"The audit log cannot be written: {self.fault}")
            if self.log.unsigned and (due or flushes):
                fault = self._sign() or fault
            for item in flushes:
                assert item.done is not None
                settle(item.done, fault)
            if last:
                self._end()
                return

    def _gather(self) -> list[Item]:
        """What there is; waits for something, for the next checkpoint, or for another try."""
        batch: list[Item] = []
        wait: float | None = self._retry_s if self._pending else None
        if self.log.unsigned:
            until = max(0.0, self._sign_at - time.monotonic())
            wait = until if wait is None else min(wait, until)
        with contextlib.suppress(queue.Empty):
            batch.append(self._queue.get(timeout=wait))
            end = time.monotonic() + self._batch_s
            while len(batch) < BATCH:
                hurried = any(item.done is not None or item.last for item in batch)
                left = 0.0 if hurried else end - time.monotonic()
                batch.append(self._queue.get_nowait() if left <= 0 else self._queue.get(timeout=left))
        return batch

    def _spell(self, item: Item) -> None:
        """The entry of an item. A fault of this very code is written down as such, and shouted."""
        request, receipt = item.request, item.receipt
        if request is None:
            return
        try:
            subject = self.subjects.of(request.tenant, request.user)
            if receipt is None:
                item.entry = begin_entry(request, item.begins or "", subject)
            else:
                item.entry = request_entry(
                    receipt, request, spoken(item.pieces), subject, self.subjects, approvals=item.approvals
                )
        except Exception as error:
            self._tell(f"galley: AUDIT ENTRY NOT MADE: {traceback.format_exc()}")
            id = receipt.id if receipt is not None else item.begins
            kind = "begin" if receipt is None else "request"
            item.entry = canonical({"v": 1, "type": kind, "id": id, "fault": type(error).__name__})
        if len(item.entry) > MOST:
            self._tell(f"galley: AUDIT ENTRY TOO LONG: {len(item.entry)} bytes; its digest is logged instead")
            digest = hashlib.sha256(item.entry).hexdigest()
            id = receipt.id if receipt is not None else item.begins
            item.entry = canonical(
                {"v": 1, "type": "request", "id": id, "fault": "too_long", "sha256": digest}
            )
        item.pieces = {}

    def _append(self, batch: list[Item]) -> bool:
        """Make entries durable, the pending ones first. False when they could not be."""
        items = self._pending + [item for item in batch if item.entry is not None]
        erased = self.subjects.erased() if not self._pending else []
        entries = [item.entry for item in items if item.entry is not None]
        entries += [erasure_entry(each) for each in erased]
        if not entries:
            return True
        try:
            held = self.log.append(entries)
        except (OSError, GalleyError, ValueError) as error:
            self._fail(items, batch, error)
            return False
        self.fault = None
        if erased:
            self.subjects.told(len(erased))
        self._pending = []
        if self.log.unsigned == len(held):
            self._sign_at = time.monotonic() + self._checkpoint_s
        for item, place in zip(items, held, strict=False):
            if item.receipt is not None:
                leaf = f"{place.index}:{place.leaf.hex()}"
                self._store.record(msgspec.structs.replace(item.receipt, audit_leaf=leaf))
                item.receipt = None
            if item.done is not None:
                settle(item.done, None)
        return True

    def _fail(self, items: list[Item], batch: list[Item], error: Exception) -> None:
        """Loud, counted, kept for another try. Those who wait are told; a request that was not let in is not
        kept. Receipts go on without a leaf."""
        self.failures += 1
        self.fault = str(error)
        self._tell(f"galley: AUDIT LOG NOT WRITTEN ({len(items)} entries wait): {error}")
        shown = error if isinstance(error, AuditUnavailable) else AuditUnavailable(str(error))
        self._pending = [item for item in items if item.begins is None]
        for item in items:
            if item.receipt is not None:
                self._store.record(item.receipt)
                item.receipt = None
            if item.done is not None:
                settle(item.done, shown)
                item.done = None

    def _sign(self) -> AuditUnavailable | None:
        try:
            self.log.checkpoint()
        except AuditUnavailable as error:
            self.failures += 1
            self.fault = str(error)
            self._tell(f"galley: AUDIT CHECKPOINT NOT WRITTEN: {error}")
            self._sign_at = time.monotonic() + self._retry_s
            return error
        return None

    def _end(self) -> None:
        if self._pending:
            self._tell(f"galley: {len(self._pending)} ENTRIES LOST to the audit log: {self.fault}")
        try:
            self.log.close()
        except AuditUnavailable as error:
            self._tell(f"galley: the audit log was closed unsigned: {error}")
            self.fault = str(error)


def settle(done: "Future[Any]", error: Exception | None) -> None:
    """Set a result; who waited may have been cancelled meanwhile."""
    if not done.set_running_or_notify_cancel():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
