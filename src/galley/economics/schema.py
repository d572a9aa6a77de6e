"""The ledger's tables, the same for SQLite and PostgreSQL.

A line moves an amount from one account to another, so it holds both of its postings and no set of lines can
fail to balance; the view ``posting`` shows them one by one. Triggers refuse to change or delete what was
written: a correction is a further transaction.
"""

from typing import Any

from sqlalchemy import (
    DDL,
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    event,
)

__all__ = [
    "APPEND_ONLY",
    "VERSION",
    "bucket",
    "charge",
    "counter",
    "line",
    "meta",
    "metadata",
    "price",
    "reservation",
    "rule",
    "txn",
]

VERSION = 1
"""Of these tables; a newer file is refused."""

metadata = MetaData()


def ddl(words: str) -> DDL:
    """A statement run when the tables are made."""
    statement: DDL = DDL(words)  # type: ignore[no-untyped-call]
    return statement


def amounts(prefix: str = "") -> list[Column[Any]]:
    """The four units of an ``Amount``."""
    return [
        Column(prefix + unit, BigInteger, nullable=False, default=0)
        for unit in ("pico", "tokens", "requests", "slots")
    ]


meta = Table(
    "meta",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", BigInteger, nullable=False),
)
"""``version`` of the tables, ``rules`` the revision of the rules."""

rule = Table(
    "rule",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("body", Text, nullable=False),
    Column("set_us", BigInteger, nullable=False),
)
"""Limits in force, as JSON."""

price = Table(
    "price_version",
    metadata,
    Column("id", Text, primary_key=True),
    Column("digest", Text, primary_key=True),
    Column("body", Text, nullable=False),
)
"""Every price that a line names, as JSON, so that it can be computed again; append-only. An id that comes
with other numbers gets a second row."""

txn = Table(
    "txn",
    metadata,
    Column("id", Text, primary_key=True),
    Column("reservation", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("day", Text, nullable=False),
    Column("at_us", BigInteger, nullable=False),
    Column("lines", Integer, nullable=False),
    CheckConstraint("kind IN ('reserve', 'extend', 'settle', 'adjust')", name="txn_kind"),
    sqlite_with_rowid=False,
)
"""``<receipt>:reserve``, ``:extend:N``, ``:settle``, ``:adjust``: the id alone makes a second settlement
impossible. ``day`` is that of the admission: what is reserved on a day is spent on it. ``lines``: how many
belong to it."""

line = Table(
    "line",
    metadata,
    Column("txn", Text, ForeignKey("txn.id"), primary_key=True),
    Column("n", Integer, primary_key=True),
    Column("source", Text, nullable=False),
    Column("target", Text, nullable=False),
    *amounts(),
    Column("price_version", Text, nullable=False),
    Column("kind", Text, nullable=False),
    CheckConstraint("source <> target", name="line_accounts"),
    CheckConstraint("pico >= 0 AND tokens >= 0 AND requests >= 0 AND slots >= 0", name="line_sign"),
    sqlite_with_rowid=False,
)
"""One movement from ``source`` (credited) to ``target`` (debited)."""

reservation = Table(
    "reservation",
    metadata,
    Column("id", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("day", Text, nullable=False),
    Column("opened_us", BigInteger, nullable=False),
    Column("lease_us", BigInteger, nullable=False),
    Column("owner", Text, nullable=False),
    Column("scopes", Text, nullable=False),
    *amounts(),
    Column("rate_tokens", BigInteger, nullable=False, default=0),
    Column("extends", Integer, nullable=False, default=0),
    Column("prompt_tokens", BigInteger, nullable=False, default=0),
    Column("cached_tokens", BigInteger, nullable=False, default=0),
    Column("completion_tokens", BigInteger, nullable=False, default=0),
    Column("price", Text, nullable=False),
    Column("sunk", Text, nullable=False, default="[]"),
    Column("facts", Text, nullable=False),
    CheckConstraint("state IN ('open', 'settled', 'expired')", name="reservation_state"),
)
Index("reservation_open", reservation.c.lease_us, sqlite_where=reservation.c.state == "open",
      postgresql_where=reservation.c.state == "open")  # fmt: skip
"""What is held for a request. ``price`` is the whole price version and ``facts`` who asked for what, both as
JSON: enough to settle it without the process that opened it. The tokens are the progress last renewed."""

charge = Table(
    "charge",
    metadata,
    Column("reservation", Text, primary_key=True),
    Column("n", Integer, primary_key=True),
    Column("txn", Text, ForeignKey("txn.id"), nullable=False),
    Column("day", Text, nullable=False),
    Column("at_us", BigInteger, nullable=False),
    Column("outcome", Text, nullable=False),
    *(
        Column(name, Text)
        for name in ("tenant", "org", "team", "user", "key", "session", "plan", "api", "model", "provider")
    ),
    Column("tags", Text, nullable=False, default="[]"),
    *(
        Column(name, BigInteger, nullable=False, default=0)
        for name in (
            "requests",
            "prompt_tokens",
            "cached_tokens",
            "cache_write_tokens",
            "completion_tokens",
            "reasoning_tokens",
            "cost_pico",
            "revenue_pico",
            "cache_saved_pico",
            "route_saved_pico",
            "batch_saved_pico",
            "speculation_saved_pico",
        )
    ),
    Column("price_version", Text, nullable=False),
    Column("estimated", Integer, nullable=False, default=0),
)
Index("charge_day", charge.c.day)
"""One row a settled request, for reports: the same sums as its lines, with the names to group by. A later
correction is a further row with ``n`` above 0 and differences, which may be negative. ``tags`` is a JSON list
of ``key=value``."""

counter = Table(
    "counter",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("span", Text, primary_key=True),
    *amounts("spent_"),
    *amounts("reserved_"),
    CheckConstraint("reserved_pico >= 0 AND reserved_tokens >= 0", name="counter_reserved"),
    CheckConstraint("reserved_requests >= 0 AND reserved_slots >= 0", name="counter_reserved_more"),
    CheckConstraint("spent_pico >= 0 AND spent_tokens >= 0 AND spent_requests >= 0", name="counter_spent"),
    sqlite_with_rowid=False,
)
"""Sums of the lines of ``spent:<scope>`` and ``reserved:<scope>`` over a day, a month or all time (``span``),
kept so that admission need not add up. ``galley ledger check`` adds up and compares."""

bucket = Table(
    "bucket",
    metadata,
    Column("scope", Text, primary_key=True),
    Column("resource", Text, primary_key=True),
    Column("level", BigInteger, nullable=False),
    Column("at_us", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
"""Rates of the last minute; not money, and no part of a replay."""

APPEND_ONLY = ("txn", "line", "charge", "price_version")

POSTING = """
CREATE VIEW posting AS
SELECT txn, n, target AS account, pico, tokens, requests, slots, price_version, kind FROM line
UNION ALL
SELECT txn, n, source AS account, -pico, -tokens, -requests, -slots, price_version, kind FROM line
"""
event.listen(metadata, "after_create", ddl(POSTING))

for _name in APPEND_ONLY:
    for _verb in ("UPDATE", "DELETE"):
        event.listen(
            metadata,
            "after_create",
            ddl(
                f"CREATE TRIGGER {_name}_no_{_verb.lower()} BEFORE {_verb} ON {_name} "
                f"BEGIN SELECT RAISE(ABORT, '{_name} is append-only'); END"
            ).execute_if(dialect="sqlite"),
        )
event.listen(
    metadata,
    "after_create",
    ddl(
        "CREATE FUNCTION galley_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION '%% is append-only', TG_TABLE_NAME; END $$"
    ).execute_if(dialect="postgresql"),
)
for _name in APPEND_ONLY:
    event.listen(
        metadata,
        "after_create",
        ddl(
            f"CREATE TRIGGER {_name}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {_name} "
            "FOR EACH STATEMENT EXECUTE FUNCTION galley_append_only()"
        ).execute_if(dialect="postgresql"),
    )
