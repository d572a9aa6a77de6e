"""Receipts on disk: SQLite in WAL mode, one writer thread, and a spool for when the disk says no.

``record`` only puts the receipt on a queue, so it never blocks an event loop. The writer commits in batches
of at most 50 ms. When a commit fails (disk full, locked, damaged file) the receipts stay in memory, go to
``receipts.spool.jsonl`` beside the database and as a JSON line to stderr, and are counted; they are retried
every few seconds and, from the spool, at the next start. The primary key makes every retry harmless.

Durability: WAL with ``synchronous=NORMAL`` survives kill -9 of the process with every committed receipt; a
power cut may lose the last commits. ``synchronous="FULL"`` closes that gap for one fsync a batch.
"""

import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import msgspec

from galley.audit.spool import Spool, encode, tell_stderr
from galley.errors import GalleyError
from galley.types import Receipt

__all__ = ["ReceiptStore"]

SCHEMA_VERSION = 1
BATCH_ROWS = 512
PARKED_LIMIT = 10_000
SCHEMA = """
CREATE TABLE IF NOT EXISTS receipts (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    created REAL NOT NULL,
    model TEXT NOT NULL,
    status TEXT NOT NULL,
    user TEXT,
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS receipts_created ON receipts(created);
"""
INSERT = """INSERT INTO receipts(id, created, model, status, user, body) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT(id) DO NOTHING"""


class Flush:
    """A marker in the queue: everything before it is settled once ``done`` is set."""

    def __init__(self, *, last: bool = False) -> None:
        self.last = last
        self.done = threading.Event()


class ReceiptStore:
    """All receipts of one Galley home.

    The file is opened, and the writer thread started, by the first ``record``; a store used only for reading
    writes nothing. Safe to use from any thread; several processes may share one home. ``clean`` takes out of
    a receipt what must not be stored.

    Attributes:
        failures: receipts that a commit could not store at the first try (each is counted once).
        duplicates: receipts refused because their id was already stored.
        fault: the last failure in words, None once a later commit went through.
    """

    def __init__(
        self,
        path: Path,
        *,
        synchronous: Literal["NORMAL", "FULL"] = "NORMAL",
        batch_s: float = 0.05,
        retry_s: float = 5.0,
        busy_s: float = 2.0,
        clean: Callable[[Receipt], Receipt] = lambda receipt: receipt,
        tell: Callable[[str], None] = tell_stderr,
    ) -> None:
        self.path = path
        self.spool = path.with_suffix(".spool.jsonl")
        self.failures = 0
        self.duplicates = 0
        self.fault: str | None = None
        self._synchronous = synchronous
        self._batch_s = batch_s
        self._retry_s = retry_s
        self._busy_s = busy_s
        self._clean = clean
        self._tell = tell
        self._queue: queue.SimpleQueue[Receipt | Flush] = queue.SimpleQueue()
        self._hurry, self._lock = threading.Event(), threading.Lock()
        self._unsaved: dict[str, Receipt] = {}
        self._parked: list[Receipt] = []
        self._writer: threading.Thread | None = None
        self._closed = False
        self._db: sqlite3.Connection | None = None

    # ---- writing

    def record(self, receipt: Receipt) -> None:
        """Take one receipt for storing. Never blocks, never raises; see the class for what failure does."""
        receipt = self._clean(receipt)
        with self._lock:
            late = self._closed
            self._unsaved[receipt.id] = receipt
            if not late:
                self._start_writer()
                self._queue.put(receipt)
        if late:
            self._fail([receipt], "the store is closed")

    def hold(self, receipt: Receipt) -> None:
        """Show a receipt that will be recorded shortly, by whoever adds the last of it (``audit.scribe``)."""
        receipt = self._clean(receipt)
        with self._lock:
            self._unsaved[receipt.id] = receipt

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything recorded so far is committed or has failed loudly. False on timeout."""
        with self._lock:
            if self._writer is None or self._closed:
                return True
            mark = Flush()
            self._queue.put(mark)
            self._hurry.set()
        return mark.done.wait(timeout)

    def replay(self) -> None:
        """Start the writer, whose first act is to store what an earlier process had to spool."""
        with self._lock:
            if not self._closed:
                self._start_writer()

    def close(self) -> None:
        """Commit what is queued and stop the writer. Idempotent."""
        with self._lock:
            writer, self._closed = self._writer, True
            self._writer = None
            if writer is not None:
                self._queue.put(Flush(last=True))
                self._hurry.set()
        if writer is not None:
            writer.join()

    def _start_writer(self) -> None:
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_forever, name="galley-receipts", daemon=True)
            self._writer.start()

    def _write_forever(self) -> None:
        if self.spool.exists():
            self._commit([])
        while True:
            marks: list[Flush] = []
            batch = self._next_batch(marks)
            if batch or self._parked:
                self._commit(batch)
            for mark in marks:
                mark.done.set()
            if any(mark.last for mark in marks):
                self._disconnect()
                return

    def _next_batch(self, marks: list[Flush]) -> list[Receipt]:
        """Gather for ``batch_s`` after the first receipt; a mark ends that at once. Asleep meanwhile: being
        woken by every receipt would take the interpreter's lock from the thread that answers requests."""
        batch: list[Receipt] = []
        try:
            item = self._queue.get(timeout=self._retry_s if self._parked else None)
            self._hurry.wait(0 if isinstance(item, Flush) else self._batch_s)
            while True:
                if isinstance(item, Flush):
                    if self._queue.empty():  # else another mark may be behind this one
                        self._hurry.clear()
                    marks.append(item)
                    return batch
                batch.append(item)
                if len(batch) >= BATCH_ROWS:
                    return batch
                item = self._queue.get_nowait()
        except queue.Empty:
            return batch

    def _commit(self, batch: list[Receipt]) -> None:
        """Store the batch with what is parked and spooled, or park and spool the batch. Never raises."""
        for attempt in (1, 2):
            try:
                self._insert(self._parked + batch)
                self.fault = None
                return
            except Exception as error:  # any fault at all must end in the spool, not in a dead writer
                self._disconnect()
                if attempt == 1 and self._damaged(error) and self._set_aside():
                    continue
                self._fail(batch, f"{type(error).__name__}: {error}")
                return

    def _insert(self, receipts: list[Receipt]) -> None:
        db = self._connect()
        rows = [self._row(r) for r in receipts]
        with Spool(self.spool, self._tell) as spooled, db:
            before = db.total_changes
            db.executemany(INSERT, rows)
            fresh = db.total_changes - before
            db.executemany(INSERT, (self._row(r) for r in spooled.receipts))
            db.commit()
            spooled.drop()
        # Parked receipts may have been replayed by another process: only the new ones can be duplicates.
        self.duplicates += max(0, len(rows) - fresh) if not self._parked else 0
        self._parked = []
        with self._lock:
            for receipt in receipts:
                self._unsaved.pop(receipt.id, None)

    @staticmethod
    def _row(receipt: Receipt) -> tuple[str, float, str, str, str | None, str]:
        body = encode(receipt)
        r = receipt
        if not (r.id + r.model + (r.user or "")).isascii():
            r = msgspec.json.decode(body, type=Receipt)  # what was stored, should it not have been Unicode
        return (r.id, r.created, r.model, r.status, r.user, body.decode())

    def _fail(self, batch: list[Receipt], why: str) -> None:
        """Loud, counted, kept: spool and stderr, and parked for the next try."""
        self.fault = why
        self.failures += len(batch)
        try:
            lines = b"".join(encode(r) + b"\n" for r in batch)
            if lines:
                Spool.append(self.spool, lines)
            kept = f"kept in {self.spool}"
        except Exception as error:  # the same full disk, most likely; stderr is the last resort
            kept = f"spool failed too ({error}); this line is the only copy on record"
        for receipt in batch:
            # Captured text stays out of the log unless the log is all that is left.
            shown = receipt
            if kept.startswith("kept"):
                shown = msgspec.structs.replace(receipt, prompt=None, output=None)
            line = encode(shown).decode()
            self._tell(f"galley: RECEIPT NOT STORED in {self.path}: {why}; {kept}: {line}")
        self._parked.extend(batch)
        for receipt in self._parked[PARKED_LIMIT:]:
            with self._lock:
                self._unsaved.pop(receipt.id, None)
        del self._parked[PARKED_LIMIT:]

    @staticmethod
    def _damaged(error: Exception) -> bool:
        text = str(error)
        return isinstance(error, sqlite3.DatabaseError) and ("malformed" in text or "not a database" in text)

    def _set_aside(self) -> bool:
        """Rename a damaged database (with its WAL) to make room for new receipts. Never deletes."""
        stamp = f".damaged-{time.time_ns()}"
        try:
            for suffix in ("", "-wal", "-shm"):
                part = self.path.with_name(self.path.name + suffix)
                if part.exists():
                    part.rename(part.with_name(part.name + stamp))
        except OSError as error:
            self._tell(f"galley: {self.path} is damaged and could not be set aside: {error}")
            return False
        self._tell(
            f"galley: {self.path} was damaged; set aside as {self.path.name}{stamp}, a new one is begun"
        )
        return True

    # ---- the database

    def _connect(self) -> sqlite3.Connection:
        if self._db is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self.path, timeout=self._busy_s, check_same_thread=False)
            try:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute(f"PRAGMA synchronous={self._synchronous}")
                self._check_version(db)
                db.executescript(SCHEMA)
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            except BaseException:
                db.close()
                raise
            self._db = db
        return self._db

    def _disconnect(self) -> None:
        if self._db is not None:
            try:
                self._db.close()
            except sqlite3.Error as error:
                self._tell(f"galley: closing {self.path}: {error}")
            self._db = None

    def _check_version(self, db: sqlite3.Connection) -> int:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise GalleyError(
                f"{self.path} has schema version {version}; this Galley knows up to {SCHEMA_VERSION}",
                code="receipts_schema_newer",
                hint="Upgrade Galley, or point GALLEY_HOME elsewhere.",
            )
        return version

    def _select(self, where: str, values: tuple[object, ...]) -> list[tuple[int, str]]:
        """Rows ``(seq, body)``; a home without receipts has none. Raises GalleyError if unreadable."""
        try:
            self.path.stat()
            # Reading makes files beside the database. A read-only home does not allow that; but where nothing
            # waits in the write-ahead log either, the database alone is all there is.
            real = os.access in os.supports_effective_ids
            writable = os.access(self.path.parent, os.W_OK, effective_ids=real)
            alone = not writable and not self._pending()
            uri = f"file:{quote(str(self.path))}{'?immutable=1' * alone}"
            with closing(sqlite3.connect(uri, timeout=self._busy_s, uri=True)) as db:
                if self._check_version(db) == 0:
                    return []
                return db.execute(f"SELECT seq, body FROM receipts {where}", values).fetchall()
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, sqlite3.Error) as error:
            raise self._unreadable(str(error)) from error

    def _pending(self) -> bool:
        """Whether commits wait in the write-ahead log."""
        log = self.path.with_name(self.path.name + "-wal")
        return log.exists() and log.stat().st_size > 0

    def _unreadable(self, why: str) -> GalleyError:
        hint = "it may be another user's: set GALLEY_HOME (--home), or receipts.path"
        return GalleyError(f"{self.path}: {why}", code="receipts_unreadable", hint=hint)

    def _spooled(self) -> list[Receipt]:
        try:
            return Spool.read(self.spool)
        except OSError as error:
            raise self._unreadable(f"{self.spool.name}: {error.strerror or error}") from error

    # ---- reading

    def get(self, id: str) -> Receipt | None:
        """One receipt by id, also one waiting for its commit or spooled; None when there is none."""
        with self._lock:
            waiting = self._unsaved.get(id)
        if waiting is not None:
            return waiting
        rows = self._select("WHERE id = ?", (id,))
        if rows:
            return msgspec.json.decode(rows[0][1], type=Receipt)
        return next((r for r in self._spooled() if r.id == id), None)

    def list(
        self,
        limit: int = 20,
        *,
        model: str | None = None,
        user: str | None = None,
        since: float | None = None,
        before: float | None = None,
    ) -> list[Receipt]:
        """Newest first, those waiting or spooled included. ``since`` (inclusive) and ``before``
        (exclusive) are Unix seconds of arrival."""

        def wanted(r: Receipt) -> bool:
            return (
                (model is None or r.model == model)
                and (user is None or r.user == user)
                and (since is None or r.created >= since)
                and (before is None or r.created < before)
            )

        with self._lock:
            found = {r.id: r for r in self._unsaved.values() if wanted(r)}
        tests = {"model = ?": model, "user = ?": user, "created >= ?": since, "created < ?": before}
        used = {k: v for k, v in tests.items() if v is not None}
        where = f"WHERE {' AND '.join(used)} " if used else ""
        rows = self._select(where + "ORDER BY created DESC, seq DESC LIMIT ?", (*used.values(), limit))
        for _, body in rows:
            receipt = msgspec.json.decode(body, type=Receipt)
            found.setdefault(receipt.id, receipt)
        for receipt in self._spooled():
            if wanted(receipt):
                found.setdefault(receipt.id, receipt)
        return sorted(found.values(), key=lambda r: (r.created, r.id), reverse=True)[:limit]

    def follow(
        self, *, poll_s: float = 0.2, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[Receipt]:
        """Every receipt committed from now on by any process, in commit order, until ``stopped()``."""
        rows = self._select("ORDER BY seq DESC LIMIT 1", ())
        last = rows[0][0] if rows else 0
        while not stopped():
            rows = self._select("WHERE seq > ? ORDER BY seq LIMIT 1000", (last,))
            for seq, body in rows:
                last = seq
                yield msgspec.json.decode(body, type=Receipt)
            if not rows:
                time.sleep(poll_s)
