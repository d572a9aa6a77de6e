"""Where the ledger is kept: one SQLite file (WAL), or PostgreSQL. Blocking; called from threads of its own.

Every transaction is tried again, with jitter, where the database gave way to another one (deadlock,
serialisation, a locked file, a lost connection). Ids are chosen by the caller, so a transaction that was
committed although nobody heard of it is recognised and not done twice.
"""

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, Engine, create_engine, delete, event, inspect, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from galley.economics import schema
from galley.economics.acts import Act
from galley.economics.book import Book
from galley.economics.limits import Rule, Rules
from galley.economics.page import Page
from galley.errors import ConfigError, GalleyError

__all__ = ["LedgerUnavailable", "Store", "ledger_url"]

AGAIN = ("40001", "40P01", "55P03", "57P01", "08000", "08003", "08006")
"""SQLSTATEs: serialisation failure, deadlock, lock not available, shutdown, and lost connections."""
TRIES_S = 10.0
PAUSE_S = 0.002


class LedgerUnavailable(GalleyError):
    """The ledger cannot be written now, and without it this request may not run."""

    status = 503
    code = "ledger_unavailable"
    retryable = True
    exit_code = 1


def ledger_url(url: str | None, home: Path) -> str:
    """The database to use: as configured, else ``ledger.db`` in the home."""
    return url or f"sqlite:///{home / 'ledger.db'}"


class Store:
    """One database. ``apply`` belongs to one thread; everything else opens a connection of its own.

    Args:
        url: an SQLAlchemy URL; ``postgresql://`` means the driver psycopg.
        synchronous: of SQLite: ``NORMAL`` outlives kill -9, ``FULL`` a power cut too, for one fsync a commit.
        tries_s: how long a transaction is tried again.

    Raises ConfigError for a URL that is none, or whose driver is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        synchronous: Literal["NORMAL", "FULL"] = "NORMAL",
        tries_s: float = TRIES_S,
        busy_s: float = 5.0,
    ) -> None:
        self._synchronous = synchronous
        self._tries_s = tries_s
        self._busy_s = busy_s
        self._known: set[tuple[str, str]] = set()
        self._rules: Rules | None = None
        self._revision = -1
        self._rng = random.Random()
        self._db: Connection | None = None
        self.retried = 0
        """Transactions tried again."""
        try:
            parsed = make_url(url)
            if parsed.drivername in ("postgresql", "postgres"):
                parsed = parsed.set(drivername="postgresql+psycopg")
            self.sqlite = parsed.get_backend_name() == "sqlite"
            self.path = Path(parsed.database) if self.sqlite and parsed.database else None
            self.shown = parsed.render_as_string(hide_password=True)
            self._engine = self._open(parsed)
        except (ArgumentError, NoSuchModuleError, ImportError, ValueError) as error:
            raise ConfigError(
                f"ledger.url cannot be used: {error}",
                param="ledger.url",
                hint="sqlite:///PATH, or postgresql://USER@HOST/NAME with pip install 'galley[postgres]'",
            ) from error
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise ConfigError(
                f"ledger.url: {parsed.get_backend_name()} is neither sqlite nor postgresql.",
                param="ledger.url",
            )

    def _open(self, url: Any) -> Engine:
        if not self.sqlite:
            return create_engine(url, poolclass=NullPool)
        engine = create_engine(
            url, poolclass=NullPool, connect_args={"timeout": self._busy_s, "check_same_thread": False}
        )

        @event.listens_for(engine, "connect")
        def connected(raw: Any, _record: Any) -> None:
            raw.isolation_level = None  # transactions begin where they are told to, below
            raw.execute("PRAGMA journal_mode=WAL")
            raw.execute(f"PRAGMA synchronous={self._synchronous}")
            raw.execute("PRAGMA foreign_keys=ON")

        @event.listens_for(engine, "begin")
        def begun(db: Connection) -> None:
            writing = db.get_execution_options().get("writing", False)
            db.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

        return engine

    # ---- transactions

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection in a transaction that sees one state. Raises GalleyError ``ledger_unavailable``."""
        self.create()
        with self._named(), self._engine.connect() as opened:
            level: Any = {} if self.sqlite else {"isolation_level": "REPEATABLE READ"}
            db = opened.execution_options(**level)
            with db.begin():
                yield db

    def create(self) -> None:
        """Make the tables where there are none. Raises GalleyError, also for tables of a newer Galley."""
        if self._rules is None:
            self.refresh()

    def apply(self, acts: Sequence[Act]) -> list[Any]:
        """All acts in one transaction: see ``Book.apply``. Raises LedgerUnavailable, and then nothing of it
        is known to have been done."""
        if not acts:
            return []

        def work(db: Connection) -> list[Any]:
            page = Page(db, self._known)
            found = Book(page, self._read_rules(db)).apply(acts)
            stored.update(page.prices)
            return found

        stored: set[tuple[str, str]] = set()
        results: list[Any] = self.writing(work)
        self._known |= stored
        return results

    def writing(self, work: Callable[[Connection], Any]) -> Any:
        """What ``work`` returns, committed; run again where another transaction was in the way. Raises
        LedgerUnavailable when that goes on for too long, or the database is not to be had."""
        end = time.monotonic() + self._tries_s
        attempt = 0
        while True:
            try:
                db = self._connected()
                with db.begin():
                    return work(db)
            except (DBAPIError, OSError) as error:
                self._disconnect()
                attempt += 1
                if not again(error) or time.monotonic() >= end:
                    raise unavailable(self.shown, error) from error
                self.retried += 1
                time.sleep(self._rng.uniform(0, min(0.2, PAUSE_S * 2 ** min(attempt, 7))))

    def _connected(self) -> Connection:
        if self._db is None:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            db = self._engine.connect().execution_options(writing=True)
            try:
                if not self.sqlite:
                    db = db.execution_options(isolation_level="READ COMMITTED")
                with db.begin():
                    self._migrate(db)
            except BaseException:
                db.close()
                raise
            self._db = db
        return self._db

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(DBAPIError, OSError):
                db.invalidate()
                db.close()

    def close(self) -> None:
        """Idempotent; the next use opens again."""
        db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(DBAPIError, OSError):
                db.close()
        self._engine.dispose()

    def _migrate(self, db: Connection) -> None:
        if not self.sqlite:  # several processes may be here for the first time
            db.execute(text("SELECT pg_advisory_xact_lock(6046220214)"))
        if inspect(db).has_table("meta"):
            found = db.execute(select(schema.meta.c.value).where(schema.meta.c.name == "version")).scalar()
            if found is None or found > schema.VERSION:
                raise GalleyError(
                    f"{self.shown} has schema version {found}; this Galley knows up to {schema.VERSION}",
                    code="database_newer",
                    hint="Upgrade Galley, or point ledger.url elsewhere.",
                )
            return
        schema.metadata.create_all(db)
        rows = [{"name": "version", "value": schema.VERSION}, {"name": "rules", "value": 0}]
        db.execute(schema.meta.insert(), rows)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, OSError) as error:
            raise unavailable(self.shown, error) from error

    # ---- rules

    def refresh(self) -> Rules:
        """The rules in force now. Raises LedgerUnavailable."""
        rules: Rules = self.writing(self._read_rules)
        return rules

    @property
    def read(self) -> bool:
        """Whether the rules were ever read."""
        return self._rules is not None

    @property
    def rules(self) -> Rules:
        """As last read."""
        return self._rules or Rules({})

    def _read_rules(self, db: Connection) -> Rules:
        revision = db.execute(REVISION).scalar_one()
        if self._rules is None or revision != self._revision:
            rows = db.execute(select(schema.rule.c.scope, schema.rule.c.body))
            found = {row.scope: msgspec.json.decode(row.body, type=Rule) for row in rows}
            self._rules, self._revision = Rules(found), revision
        return self._rules

    def rule_rows(self) -> dict[str, Rule]:
        """Every rule set, by scope."""
        with self.reading() as db:
            rows = db.execute(select(schema.rule.c.scope, schema.rule.c.body).order_by(schema.rule.c.scope))
            return {row.scope: msgspec.json.decode(row.body, type=Rule) for row in rows}

    def set_rule(self, scope: str, change: Callable[[Rule | None], Rule | None]) -> Rule | None:
        """Replace a scope's rule by what ``change`` makes of it; None removes it. Every process sees it at
        its next transaction. Returns the new one."""

        def work(db: Connection) -> Rule | None:
            # The revision is taken first: one change at a time.
            db.execute(schema.meta.update().where(schema.meta.c.name == "rules")
                       .values(value=schema.meta.c.value + 1))  # fmt: skip
            body = db.execute(select(schema.rule.c.body).where(schema.rule.c.scope == scope)).scalar()
            new = change(None if body is None else msgspec.json.decode(body, type=Rule))
            db.execute(delete(schema.rule).where(schema.rule.c.scope == scope))
            if new is not None:
                row = {
                    "scope": scope,
                    "body": msgspec.json.encode(new).decode(),
                    "set_us": time.time_ns() // 1000,
                }
                db.execute(schema.rule.insert(), row)
            return new

        new: Rule | None = self.writing(work)
        return new

    # ---- reservations

    def open_reservations(self, *, lease_before_us: int | None = None) -> list[dict[str, Any]]:
        """Reservations that nobody has settled, oldest lease first; of those only the ones whose lease has
        run out, when asked so."""
        table = schema.reservation
        wanted = select(table).where(table.c.state == "open").order_by(table.c.lease_us)
        if lease_before_us is not None:
            wanted = wanted.where(table.c.lease_us < lease_before_us)
        with self.reading() as db:
            return [dict(row._mapping) for row in db.execute(wanted)]


REVISION = select(schema.meta.c.value).where(schema.meta.c.name == "rules")


def again(error: Exception) -> bool:
    """Whether the same transaction may succeed at the next try."""
    if not isinstance(error, DBAPIError):
        return False
    state = getattr(error.orig, "sqlstate", None)
    if state is not None:
        return state in AGAIN
    words = str(error.orig).lower()
    return error.connection_invalidated or "locked" in words or "busy" in words or "connection" in words


def unavailable(shown: str, error: Exception) -> LedgerUnavailable:
    """In words, without the statement's parameters."""
    cause = getattr(error, "orig", None) or error
    return LedgerUnavailable(
        f"The ledger {shown} cannot be used: {str(cause).splitlines()[0] if str(cause) else cause!r}",
        retry_after_s=1.0,
    )
