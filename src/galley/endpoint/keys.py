"""API keys of this home: what each may do, kept as digests only.

A key is 256 random bits, so one SHA-256 is enough to keep it: there is nothing to guess from. The secret is
shown once, when it is made.
"""

import hashlib
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from galley.endpoint.database import Database
from galley.errors import InvalidRequest, NotFound, PermissionDenied
from galley.router.catalog import Catalog

__all__ = ["SCOPES", "Key", "KeyStore", "Principal", "Scope"]

Scope = Literal["inference", "batch", "receipts", "admin"]
SCOPES: tuple[Scope, ...] = ("inference", "batch", "receipts", "admin")
"""inference: ask models. batch: files and batches too. receipts: read receipts and metrics.
admin: everything, keys included."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY,
    digest BLOB NOT NULL UNIQUE,
    name TEXT NOT NULL,
    hint TEXT NOT NULL,
    scopes TEXT NOT NULL,
    models TEXT NOT NULL,
    created REAL NOT NULL,
    expires REAL,
    revoked REAL
);
CREATE TABLE IF NOT EXISTS parties (
    key TEXT PRIMARY KEY,
    org TEXT,
    team TEXT
);
"""
SELECT = """SELECT keys.*, parties.org, parties.team FROM keys
LEFT JOIN parties ON parties.key = keys.id """


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a key; never the key."""

    id: str
    name: str
    hint: str
    """Its first and last characters."""
    scopes: list[Scope]
    models: list[str]
    """Models it may ask, by name or alias; empty means all."""
    created: float
    expires: float | None = None
    revoked: float | None = None
    org: str | None = None
    team: str | None = None
    """Whose budgets its requests count in, besides its own."""

    def good(self, now: float) -> bool:
        """Neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or now < self.expires)


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks, and what they may do."""

    key: str | None = None
    """Id of the key; None where none is asked for."""
    scopes: tuple[str, ...] = ("inference", "batch", "receipts")
    models: tuple[str, ...] = ()
    tenant: str | None = None
    """Who is charged; None where the key tells nobody from anybody."""
    org: str | None = None
    team: str | None = None

    def need(self, scope: Scope) -> None:
        """Raises PermissionDenied without the scope. ``admin`` has all; ``batch`` includes ``inference``."""
        if (
            scope in self.scopes
            or "admin" in self.scopes
            or (scope == "inference" and "batch" in self.scopes)
        ):
            return
        raise PermissionDenied(
            f"This needs a key with the scope {scope!r}.",
            code="scope_missing",
            hint=f"galley keys create --scope {scope}",
        )

    def may_ask(self, *names: str) -> bool:
        """Whether one of a model's names is on the list."""
        return not self.models or any(name in self.models for name in names)

    def reachable(self, name: str, catalog: Catalog) -> list[str]:
        """The models that may serve a request for ``name``; empty means all. Raises PermissionDenied
        ``model_not_allowed``.

        A list of models holds for what serves, not only for what is asked: a route leads to those of its
        models that are listed (or to all of them where the route itself is), and so does a fallback.
        """
        if not self.models:
            return []
        listed = {catalog.aliases.get(each, each) for each in self.models}
        route = catalog.routes.get(name)
        if route is not None:
            models = [each for each in route.models if name in self.models or each in listed]
            if not models:
                self.need_model(name)
            return models
        real = catalog.aliases.get(name, name)
        self.need_model(name, real)
        logical = catalog.models.get(real)
        return [real, *(each for each in (logical.fallback if logical else ()) if each in listed)]

    def need_model(self, *names: str) -> None:
        """Raises PermissionDenied ``model_not_allowed``."""
        if not self.may_ask(*names):
            raise PermissionDenied(
                f"This key may not use the model {names[0][:200]!r}. Allowed: {', '.join(self.models)}.",
                code="model_not_allowed",
                param="model",
            )


class KeyStore:
    """Keys in a SQLite file. Changes by another process are seen at the next look."""

    def __init__(self, path: Path) -> None:
        self._file = Database(path, SCHEMA, 1)
        self._seen: int | None = None
        self._by_digest: dict[bytes, Key] = {}

    def create(
        self,
        name: str = "",
        *,
        scopes: Iterable[Scope] = ("inference",),
        models: Iterable[str] = (),
        days: float | None = None,
        org: str | None = None,
        team: str | None = None,
    ) -> tuple[Key, str]:
        """A new key and its secret, which is not kept. Raises InvalidRequest."""
        wanted = list(dict.fromkeys(scopes))
        for scope in wanted:
            if scope not in SCOPES:
                raise InvalidRequest(f"Unknown scope {scope!r}. Scopes: {', '.join(SCOPES)}.", param="scopes")
        if not wanted:
            raise InvalidRequest("A key needs at least one scope.", param="scopes")
        if days is not None and not 0 < days <= 36_500:
            raise InvalidRequest("'days' must be above 0 and at most 36500.", param="days")
        if len(name) > 100 or not name.isprintable():
            raise InvalidRequest("'name' is longer than 100 characters or not printable.", param="name")
        for place, given in (("org", org), ("team", team)):
            if given is not None and not (0 < len(given) <= 100 and given.isprintable()):
                raise InvalidRequest(f"'{place}' must be 1 to 100 printable characters.", param=place)
        secret = "sk-galley-" + secrets.token_urlsafe(32)
        now = time.time()
        key = Key(
            id="key_" + secrets.token_hex(8),
            name=name,
            hint=f"{secret[:13]}…{secret[-4:]}",
            scopes=wanted,
            models=list(dict.fromkeys(models)),
            created=now,
            expires=None if days is None else now + days * 86_400,
            org=org,
            team=team,
        )
        with self._file.writing() as db:
            db.execute(
                "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    key.id,
                    digest(secret.encode()),
                    key.name,
                    key.hint,
                    msgspec.json.encode(key.scopes).decode(),
                    msgspec.json.encode(key.models).decode(),
                    key.created,
                    key.expires,
                    None,
                ),
            )
            if org is not None or team is not None:
                db.execute("INSERT INTO parties VALUES (?, ?, ?)", (key.id, org, team))
        self._seen = None
        return key, secret

    def all(self) -> list[Key]:
        """All keys, revoked ones too, oldest first."""
        if not self._file.exists():
            return []
        with self._file.reading() as db:
            return [key for _, key in self._rows(db.execute(SELECT + "ORDER BY created, id"))]

    def revoke(self, id: str) -> Key:
        """From now on the key is refused. Repeating it changes nothing. Raises NotFound."""
        with self._file.writing() as db:
            db.execute("UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (time.time(), id))
            found = self._rows(db.execute(SELECT + "WHERE id = ?", (id,)))
        self._seen = None
        if not found:
            raise NotFound(f"There is no key {id[:100]!r}.", param="id", hint="galley keys list")
        return found[0][1]

    def find(self, secret: bytes) -> Key | None:
        """The good key with this secret. Looked up by digest, so the time tells nothing of the secret."""
        self._refresh()
        key = self._by_digest.get(digest(secret))
        return key if key is not None and key.good(time.time()) else None

    def get(self, id: str) -> Key | None:
        """The good key of that id."""
        self._refresh()
        now = time.time()
        return next((key for key in self._by_digest.values() if key.id == id and key.good(now)), None)

    def known(self, id: str) -> bool:
        """Whether a key of that id was ever made here."""
        self._refresh()
        return any(key.id == id for key in self._by_digest.values())

    def used(self) -> bool:
        """Whether keys were ever made here: from the first one on, every request needs one."""
        self._refresh()
        return bool(self._by_digest)

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    def _refresh(self) -> None:
        if not self._file.exists():
            return
        with self._file.reading() as db:
            # Changes when another connection has committed; a few microseconds.
            version = int(db.execute("PRAGMA data_version").fetchone()[0])
            if version != self._seen:
                self._by_digest = dict(self._rows(db.execute(SELECT)))
                self._seen = version

    @staticmethod
    def _rows(rows: Iterable[tuple[Any, ...]]) -> list[tuple[bytes, Key]]:
        found = []
        for id, raw, name, hint, scopes, models, created, expires, revoked, org, team in rows:
            facts = {
                "id": id,
                "name": name,
                "hint": hint,
                "scopes": msgspec.json.decode(str(scopes)),
                "models": msgspec.json.decode(str(models)),
                "created": created,
                "expires": expires,
                "revoked": revoked,
                "org": org,
                "team": team,
            }
            found.append((raw, msgspec.convert(facts, Key)))
        return found


def digest(secret: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(b"galley api key " + secret).digest()
