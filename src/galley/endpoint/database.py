"""A SQLite file of this home: WAL, a schema version, one connection behind a lock."""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from galley.errors import GalleyError

__all__ = ["Database"]


class Database:
    """Opened (and made) on first use; safe from any thread; several processes may share the file.

    Args:
        schema: statements that may be run again (``CREATE … IF NOT EXISTS``).
        version: of the schema; a newer file is refused.
        synchronous: ``NORMAL`` outlives kill -9, ``FULL`` a power cut too, for one fsync a transaction.

    Raises GalleyError ``database_unusable`` from every call when the file cannot be used.
    """

    def __init__(
        self,
        path: Path,
        schema: str,
        version: int,
        *,
        synchronous: Literal["NORMAL", "FULL"] = "NORMAL",
        busy_s: float = 5.0,
    ) -> None:
        self.path = path
        self._schema = schema
        self._version = version
        self._synchronous = synchronous
        self._busy_s = busy_s
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, for SELECT."""
        with self._lock, self._named():
            yield self._connect()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The connection in a write transaction: committed at the end, rolled back by an exception."""
        with self._lock, self._named():
            db = self._connect()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                # After a failed COMMIT (disk full) the transaction may be over already.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def exists(self) -> bool:
        """Whether there is a file yet."""
        return self._db is not None or os.path.exists(self.path)  # asked on every request

    def close(self) -> None:
        """Idempotent; the next use opens again."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except (sqlite3.Error, OSError) as error:
            raise GalleyError(f"{self.path}: {error}", code="database_unusable") from error

    def _connect(self) -> sqlite3.Connection:
        if self._db is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(
                self.path, timeout=self._busy_s, check_same_thread=False, isolation_level=None
            )
            try:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute(f"PRAGMA synchronous={self._synchronous}")
                found = int(db.execute("PRAGMA user_version").fetchone()[0])
                if found > self._version:
                    raise GalleyError(
                        f"{self.path} has schema version {found}; this Galley knows up to {self._version}",
                        code="database_newer",
                        hint="Upgrade Galley, or point GALLEY_HOME elsewhere.",
                    )
                db.executescript(self._schema)
                db.execute(f"PRAGMA user_version={self._version}")
            except BaseException:
                db.close()
                raise
            self._db = db
        return self._db
