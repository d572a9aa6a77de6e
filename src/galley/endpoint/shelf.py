"""Answers kept for their askers: responses and stored chat completions, bounded by age and by size.

An object belongs to the key that made it; another key does not learn that it exists. Only what its request
allowed to be stored is here (``store``).
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from galley.endpoint.database import Database
from galley.errors import InvalidRequest, NotFound

__all__ = ["Kept", "Shelf"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS kept (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    owner TEXT NOT NULL,
    created REAL NOT NULL,
    model TEXT NOT NULL,
    previous TEXT,
    metadata TEXT NOT NULL,
    running INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    input BLOB NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS kept_list ON kept(kind, owner, seq);
CREATE INDEX IF NOT EXISTS kept_bytes ON kept(created, bytes);
"""
LONGEST_CHAIN = 2000
COLUMNS = "id, kind, owner, created, model, previous, metadata, running, input, body"


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One stored answer."""

    id: str
    kind: str
    """``response`` or ``chat.completion``."""
    owner: str
    """Id of the key, empty without keys."""
    created: float
    model: str
    previous: str | None = None
    metadata: dict[str, str] = {}
    running: bool = False
    """In the background, not finished."""
    input: list[Any]
    """Items (or messages) of this request alone, each with an id."""
    body: dict[str, Any]
    """The object as it is shown."""


class Shelf:
    """Kept answers in a SQLite file.

    Args:
        max_age_s: older ones are dropped.
        max_bytes: of stored JSON; beyond it the oldest are dropped, never the newest.
        clean: takes what must not be stored out of a JSON value.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_age_s: float = 30 * 86_400.0,
        max_bytes: int = 1 << 30,
        clean: Callable[[Any], Any] | None = None,
    ) -> None:
        self._clean = clean
        self._file = Database(path, SCHEMA, 1)
        self._max_age_s = max_age_s
        self._max_bytes = max_bytes

    def put(self, kept: Kept) -> None:
        """Store, or replace the one of the same id; then drop what is over the bounds."""
        if self._clean is not None:
            kept = msgspec.structs.replace(
                kept,
                input=self._clean(kept.input),
                body=self._clean(kept.body),
                metadata=self._clean(kept.metadata),
            )
        given, body = msgspec.json.encode(kept.input), msgspec.json.encode(kept.body)
        row = (
            kept.id,
            kept.kind,
            kept.owner,
            kept.created,
            kept.model,
            kept.previous,
            msgspec.json.encode(kept.metadata).decode(),
            int(kept.running),
            len(given) + len(body),
            given,
            body,
        )
        with self._file.writing() as db:
            db.execute(
                "INSERT INTO kept(id, kind, owner, created, model, previous, metadata, running, bytes, input,"
                " body) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT(id) DO UPDATE SET"
                " metadata = excluded.metadata, running = excluded.running, bytes = excluded.bytes,"
                " input = excluded.input, body = excluded.body",
                row,
            )
            db.execute("DELETE FROM kept WHERE created < ?", (time.time() - self._max_age_s,))
            over = db.execute("SELECT total(bytes) FROM kept").fetchone()[0] - self._max_bytes
            if over > 0:
                doomed = []
                query = "SELECT seq, bytes FROM kept WHERE id <> ? AND NOT running ORDER BY seq"
                for seq, size in db.execute(query, (kept.id,)):
                    doomed.append((seq,))
                    over -= size
                    if over <= 0:
                        break
                db.executemany("DELETE FROM kept WHERE seq = ?", doomed)

    def find(self, id: str, kind: str, owner: str) -> Kept | None:
        """One's own object, if it is still there."""
        if not self._file.exists():
            return None
        with self._file.reading() as db:
            row = db.execute(
                f"SELECT {COLUMNS} FROM kept WHERE id = ? AND kind = ? AND owner = ? AND created >= ?",
                (id, kind, owner, time.time() - self._max_age_s),
            ).fetchone()
        return None if row is None else read(row)

    def get(self, id: str, kind: str, owner: str) -> Kept:
        """The same. Raises NotFound."""
        found = self.find(id, kind, owner)
        if found is None:
            raise NotFound(f"There is no {kind} {id[:100]!r} here.", param="id")
        return found

    def delete(self, id: str, kind: str, owner: str) -> None:
        """Raises NotFound."""
        self.get(id, kind, owner)
        with self._file.writing() as db:
            db.execute("DELETE FROM kept WHERE id = ?", (id,))

    def chain(self, id: str, kind: str, owner: str) -> list[Kept]:
        """An object with all that came before it, oldest first.

        Raises InvalidRequest ``previous_response_not_found`` naming the link that is missing.
        """
        found: list[Kept] = []
        next: str | None = id
        while next is not None:
            link = self.find(next, kind, owner)
            if link is None or len(found) >= LONGEST_CHAIN:
                why = "is not stored here" if link is None else "is too far back"
                whose = "" if next == id else f", which {found[-1].id!r} continues,"
                raise InvalidRequest(
                    f"Previous response {next[:100]!r}{whose} {why}.",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            found.append(link)
            next = link.previous
        return found[::-1]

    def page(
        self,
        kind: str,
        owner: str,
        *,
        limit: int,
        after: str | None = None,
        newest_first: bool = False,
        model: str | None = None,
        metadata: dict[str, str] | None = None,
    ) -> tuple[list[Kept], bool]:
        """One's own objects by time of creation, and whether there are more. Raises NotFound (``after``)."""
        if not self._file.exists():
            if after is not None:
                raise NotFound(f"There is no {kind} {after[:100]!r} here.", param="after")
            return [], False
        where, values = (
            ["kind = ?", "owner = ?", "created >= ?"],
            [kind, owner, time.time() - self._max_age_s],
        )
        if model is not None:
            where.append("model = ?")
            values.append(model)
        for key, value in (metadata or {}).items():
            where.append("json_extract(metadata, ?) = ?")
            values += [f'$."{key}"', value]
        with self._file.reading() as db:
            if after is not None:
                place = db.execute(
                    "SELECT seq FROM kept WHERE id = ? AND kind = ? AND owner = ?", (after, kind, owner)
                ).fetchone()
                if place is None:
                    raise NotFound(f"There is no {kind} {after[:100]!r} here.", param="after")
                where.append("seq < ?" if newest_first else "seq > ?")
                values.append(place[0])
            order = "DESC" if newest_first else "ASC"
            rows = db.execute(
                f"SELECT {COLUMNS} FROM kept WHERE {' AND '.join(where)} ORDER BY seq {order} LIMIT ?",
                (*values, limit + 1),
            ).fetchall()
        return [read(row) for row in rows[:limit]], len(rows) > limit

    def orphans(self) -> list[Kept]:
        """What a process that is gone left running."""
        if not self._file.exists():
            return []
        with self._file.reading() as db:
            return [read(row) for row in db.execute(f"SELECT {COLUMNS} FROM kept WHERE running")]

    def close(self) -> None:
        """Idempotent."""
        self._file.close()


def read(row: tuple[Any, ...]) -> Kept:
    """A row of the table."""
    id, kind, owner, created, model, previous, metadata, running, given, body = row
    return Kept(
        id=id,
        kind=kind,
        owner=owner,
        created=created,
        model=model,
        previous=previous,
        metadata=msgspec.json.decode(metadata),
        running=bool(running),
        input=msgspec.json.decode(given),
        body=msgspec.json.decode(body),
    )
