"""Files and batches on disk. One SQLite file is the truth; a batch can be picked up again after any crash.

A line of a batch is done when its result is in the journal, and a result is written once: the UPDATE asks
that there be none. Output files are written from the journal, so writing them again changes nothing.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from galley.endpoint.database import Database
from galley.endpoint.keys import Principal
from galley.errors import NotFound

__all__ = ["Batch", "File", "Journal", "Line"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    body TEXT NOT NULL,
    expires REAL
);
CREATE TABLE IF NOT EXISTS batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    active INTEGER NOT NULL,
    due REAL NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS batches_active ON batches(active, due);
CREATE TABLE IF NOT EXISTS lines (
    batch TEXT NOT NULL,
    number INTEGER NOT NULL,
    custom_id TEXT NOT NULL,
    body BLOB NOT NULL,
    result BLOB,
    failed INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (batch, number),
    UNIQUE (batch, custom_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS lines_open ON lines(batch, number) WHERE result IS NULL;
"""

Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
ACTIVE = ("validating", "in_progress", "finalizing", "cancelling")


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A file; its bytes lie in ``files/ID``."""

    id: str
    purpose: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int | None = None
    object: str = "file"
    status: str = "processed"
    status_details: str | None = None


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch. Times are Unix seconds, None for what has not happened."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: float
    expires_at: float
    status: Status = "validating"
    metadata: dict[str, str] = {}
    principal: Principal = Principal()
    output_expires_s: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None
    errors: list[dict[str, Any]] = []


class Line(msgspec.Struct, frozen=True):
    """One request of a batch."""

    number: int
    """From 0."""
    custom_id: str
    body: bytes
    """The JSON of the request's body."""


class Journal:
    """Everything about files and batches but the bytes of files.

    Every change is durable when the call returns (``synchronous=FULL``).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = Database(path, SCHEMA, 1, synchronous="FULL")

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    # ---- files

    def add_file(self, file: File, owner: str) -> None:
        """A file whose bytes are in place."""
        with self._file.writing() as db:
            db.execute(
                "INSERT INTO files(id, owner, body, expires) VALUES (?, ?, ?, ?) ON CONFLICT(id) DO NOTHING",
                (file.id, owner, msgspec.json.encode(file).decode(), file.expires_at),
            )

    def file(self, id: str, owner: str | None) -> File:
        """One's own file (anybody's with ``owner=None``). Raises NotFound."""
        if self._file.exists():
            with self._file.reading() as db:
                row = db.execute(
                    "SELECT body FROM files WHERE id = ? AND owner = coalesce(?, owner)"
                    " AND (expires IS NULL OR expires > ?)",
                    (id, owner, time.time()),
                ).fetchone()
            if row is not None:
                return msgspec.json.decode(row[0], type=File)
        raise NotFound(f"There is no file {id[:100]!r} here.", param="file_id")

    def files(self, owner: str, purpose: str | None) -> list[File]:
        """One's own files, oldest first."""
        if not self._file.exists():
            return []
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT body FROM files WHERE owner = ? AND (expires IS NULL OR expires > ?) ORDER BY seq",
                (owner, time.time()),
            ).fetchall()
        found = [msgspec.json.decode(row[0], type=File) for row in rows]
        return [file for file in found if purpose is None or file.purpose == purpose]

    def drop_file(self, id: str) -> None:
        """Forget a file."""
        with self._file.writing() as db:
            db.execute("DELETE FROM files WHERE id = ?", (id,))

    def overdue_files(self) -> list[str]:
        """Ids of files past their time, forgotten by this call."""
        if not self._file.exists():
            return []
        with self._file.writing() as db:
            rows = db.execute("SELECT id FROM files WHERE expires <= ?", (time.time(),)).fetchall()
            db.executemany("DELETE FROM files WHERE id = ?", rows)
        return [str(row[0]) for row in rows]

    def knows_file(self, id: str) -> bool:
        """Whether there is such a file, expired or not."""
        with self._file.reading() as db:
            return db.execute("SELECT 1 FROM files WHERE id = ?", (id,)).fetchone() is not None

    # ---- batches

    def add(self, batch: Batch, owner: str) -> None:
        """A new batch."""
        with self._file.writing() as db:
            db.execute(
                "INSERT INTO batches(id, owner, active, due, body) VALUES (?, ?, 1, ?, ?)",
                (batch.id, owner, batch.expires_at, msgspec.json.encode(batch).decode()),
            )

    def get(self, id: str, owner: str | None) -> Batch:
        """One's own batch. Raises NotFound."""
        if self._file.exists():
            with self._file.reading() as db:
                row = db.execute(
                    "SELECT body FROM batches WHERE id = ? AND owner = coalesce(?, owner)", (id, owner)
                ).fetchone()
            if row is not None:
                return msgspec.json.decode(row[0], type=Batch)
        raise NotFound(f"There is no batch {id[:100]!r} here.", param="batch_id")

    def batches(self, owner: str) -> list[Batch]:
        """One's own batches, oldest first."""
        if not self._file.exists():
            return []
        with self._file.reading() as db:
            rows = db.execute("SELECT body FROM batches WHERE owner = ? ORDER BY seq", (owner,)).fetchall()
        return [msgspec.json.decode(row[0], type=Batch) for row in rows]

    def active(self) -> list[tuple[Batch, str]]:
        """Batches with work to do and their owners, the most urgent first."""
        if not self._file.exists():
            return []
        with self._file.reading() as db:
            rows = db.execute("SELECT body, owner FROM batches WHERE active ORDER BY due, seq").fetchall()
        return [(msgspec.json.decode(row[0], type=Batch), str(row[1])) for row in rows]

    def change(self, id: str, *, when: Iterable[Status] | None = None, **fields: Any) -> Batch:
        """Set fields of a batch, where its status is one of ``when``; the batch as it is then."""
        with self._file.writing() as db:
            row = db.execute("SELECT body FROM batches WHERE id = ?", (id,)).fetchone()
            batch = msgspec.json.decode(row[0], type=Batch)
            if when is not None and batch.status not in when:
                return batch
            batch = msgspec.structs.replace(batch, **fields)
            db.execute(
                "UPDATE batches SET body = ?, active = ? WHERE id = ?",
                (msgspec.json.encode(batch).decode(), int(batch.status in ACTIVE), id),
            )
        return batch

    # ---- lines

    def accept(self, id: str, lines: Iterable[Line]) -> Batch:
        """The validated lines, and the batch in progress, in one transaction."""
        with self._file.writing() as db:
            db.execute("DELETE FROM lines WHERE batch = ?", (id,))
            db.executemany(
                "INSERT INTO lines(batch, number, custom_id, body) VALUES (?, ?, ?, ?)",
                ((id, line.number, line.custom_id, line.body) for line in lines),
            )
            row = db.execute("SELECT body FROM batches WHERE id = ?", (id,)).fetchone()
            batch = msgspec.json.decode(row[0], type=Batch)
            if batch.status == "validating":
                batch = msgspec.structs.replace(batch, status="in_progress", in_progress_at=time.time())
            body = msgspec.json.encode(batch).decode()
            db.execute("UPDATE batches SET body = ? WHERE id = ?", (body, id))
        return batch

    def open_lines(self, id: str, after: int, limit: int) -> list[Line]:
        """Lines without a result, in order."""
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT number, custom_id, body FROM lines WHERE batch = ? AND result IS NULL AND number > ?"
                " ORDER BY number LIMIT ?",
                (id, after, limit),
            ).fetchall()
        return [Line(*row) for row in rows]

    def settle(self, id: str, results: list[tuple[int, bytes, bool]]) -> int:
        """Write results ``(number, JSON, failed)``; how many lines had none before."""
        with self._file.writing() as db:
            before = db.total_changes
            db.executemany(
                "UPDATE lines SET result = ?, failed = ? WHERE batch = ? AND number = ? AND result IS NULL",
                ((result, int(failed), id, number) for number, result, failed in results),
            )
            return db.total_changes - before

    def results(self, id: str, *, failed: bool) -> Iterator[bytes]:
        """Results in the order of the input."""
        last = -1
        while True:
            with self._file.reading() as db:
                rows = db.execute(
                    "SELECT number, result FROM lines WHERE batch = ? AND failed = ? AND result IS NOT NULL"
                    " AND number > ? ORDER BY number LIMIT 500",
                    (id, int(failed), last),
                ).fetchall()
            if not rows:
                return
            for number, result in rows:
                last = number
                yield result

    def counts(self, id: str) -> tuple[int, int, int]:
        """Lines, those that went well, those that failed."""
        with self._file.reading() as db:
            row = db.execute(
                "SELECT count(*), total(result IS NOT NULL AND NOT failed), total(failed) FROM lines"
                " WHERE batch = ?",
                (id,),
            ).fetchone()
        return int(row[0]), int(row[1]), int(row[2])

    def forget_bodies(self, id: str) -> None:
        """Drop results that are now in the output files; the counts stay."""
        with self._file.writing() as db:
            db.execute("UPDATE lines SET body = x'', result = x'' WHERE batch = ?", (id,))
