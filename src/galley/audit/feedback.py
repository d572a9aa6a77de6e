"""What answers were worth, as their users say: one reward for each receipt, beside the receipts.

SQLite in WAL mode. A later word on the same receipt replaces the earlier one. Safe from any thread; several
processes may share the file, so what the command line writes a running server reads.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from galley.errors import GalleyError, InvalidRequest

__all__ = ["Feedback", "FeedbackStore"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS feedback (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    receipt TEXT NOT NULL UNIQUE,
    at REAL NOT NULL,
    reward REAL NOT NULL,
    comment TEXT NOT NULL,
    key TEXT
)
"""
LONGEST = 2000
"""Characters of a comment."""


class Feedback(msgspec.Struct, frozen=True, kw_only=True):
    """One reward, 0 (worthless) to 1 (as good as can be). ``key`` is the id of the API key that gave it."""

    receipt: str
    reward: float
    at: float
    comment: str = ""
    key: str | None = None
    seq: int = 0


class FeedbackStore:
    """All feedback of one Galley home. The file is made by the first ``add``.

    Raises GalleyError ``feedback_unusable`` when the file cannot be used.
    """

    def __init__(self, path: Path, *, busy_s: float = 5.0) -> None:
        self.path = path
        self._busy_s = busy_s

    def add(self, receipt: str, reward: float, *, comment: str = "", key: str | None = None) -> Feedback:
        """Keep a reward. Raises InvalidRequest: outside 0..1, or a comment of more than 2,000 characters."""
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not 0 <= reward <= 1:
            raise InvalidRequest("'reward' is a number from 0 to 1.", param="reward")
        if len(comment) > LONGEST:
            raise InvalidRequest(f"'comment' has more than {LONGEST} characters.", param="comment")
        given = Feedback(receipt=receipt, reward=float(reward), at=time.time(), comment=comment, key=key)
        with self._open() as db, db:
            db.execute(
                "INSERT INTO feedback(receipt, at, reward, comment, key) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT(receipt) DO UPDATE SET at = excluded.at, reward = excluded.reward,"
                " comment = excluded.comment, key = excluded.key",
                (receipt, given.at, given.reward, comment, key),
            )
        return given

    def get(self, receipt: str) -> Feedback | None:
        """Of one receipt."""
        return next(iter(self._select("WHERE receipt = ?", (receipt,))), None)

    def since(self, seq: int = 0, limit: int = 10_000) -> list[Feedback]:
        """First given after ``seq``, oldest first."""
        return self._select("WHERE seq > ? ORDER BY seq LIMIT ?", (seq, limit))

    def _select(self, where: str, values: tuple[object, ...]) -> list[Feedback]:
        if not self.path.exists():
            return []
        with self._open() as db:
            rows = db.execute(f"SELECT seq, receipt, at, reward, comment, key FROM feedback {where}", values)
            return [
                Feedback(seq=seq, receipt=receipt, at=at, reward=reward, comment=comment, key=key)
                for seq, receipt, at, reward, comment, key in rows
            ]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=self._busy_s)) as db:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute(SCHEMA)
                yield db
        except sqlite3.Error as error:
            raise GalleyError(f"{self.path}: {error}", code="feedback_unusable") from error
