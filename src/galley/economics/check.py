"""Does the ledger add up? Everything is computed again from the lines and compared to the last digit."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import msgspec
from sqlalchemy import Connection, select, text

from galley.economics import schema
from galley.economics.amount import ZERO, Amount
from galley.economics.scope import windows
from galley.economics.store import Store

__all__ = ["Audit", "check", "replay"]

PART = 10**9
"""Sums are taken in two parts, because a database's own overflow at 64 bits."""
SHOWN = 20
"""Problems named; further ones are counted."""


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """Findings. ``sums`` are pico-dollars by kind of account."""

    transactions: int
    lines: int
    reservations_open: int
    charges: int
    problems: list[str]
    problem_count: int
    sums: dict[str, str]

    @property
    def good(self) -> bool:
        """Nothing was found wrong."""
        return self.problem_count == 0


def check(store: Store) -> Audit:
    """Read the whole ledger in one transaction. O(lines) time, O(counters) memory.

    Every transaction balances and has the lines it says; counters are what a replay of the lines gives;
    reserved is what open reservations hold; every settled reservation has one charge, whose sums are those of
    its lines; every price named is stored.
    """
    found: list[str] = []
    count = 0

    def problem(words: str) -> None:
        nonlocal count
        count += 1
        if len(found) < SHOWN:
            found.append(words)

    with store.reading() as db:
        for words in itertools.chain(
            unbalanced(db), counters_off(db), reserved_off(db), charges_off(db), prices_missing(db)
        ):
            problem(words)
        sums: dict[str, int] = defaultdict(int)
        for account, high, low in db.execute(
            text(
                f"SELECT account, SUM(pico / {PART}), SUM(pico % {PART}) FROM posting WHERE pico <> 0 "
                "GROUP BY account"
            )
        ):
            sums[account.partition(":")[0]] += int(high) * PART + int(low)

        def number(table: Any) -> int:
            return int(db.execute(text(f"SELECT COUNT(*) FROM {table}")).scalar_one())

        return Audit(
            transactions=number("txn"),
            lines=number("line"),
            reservations_open=number("reservation WHERE state = 'open'"),
            charges=number("charge"),
            problems=found,
            problem_count=count,
            sums={kind: str(pico) for kind, pico in sorted(sums.items())},
        )


def replay(db: Connection) -> dict[tuple[str, str], tuple[Amount, Amount]]:
    """Counters computed from the lines alone: (scope, span) to (spent, reserved)."""
    table, txn = schema.line, schema.txn
    rows = db.execute(
        select(txn.c.day, table.c.source, table.c.target, table.c.pico, table.c.tokens, table.c.requests,
               table.c.slots).join(txn, txn.c.id == table.c.txn)
        .where(table.c.kind.in_(("hold", "release", "spend")))
    )  # fmt: skip
    sides: dict[str, dict[tuple[str, str], Amount]] = {
        "spent": defaultdict(lambda: ZERO),
        "reserved": defaultdict(lambda: ZERO),
    }
    for day, source, target, *amounts in rows:
        amount = Amount(*amounts)
        for account, sign in ((target, 1), (source, -1)):
            side, _, scope = account.partition(":")
            if side in sides:
                for span in windows(scope, day):
                    old = sides[side][scope, span]
                    sides[side][scope, span] = old + amount if sign > 0 else old - amount
    keys = {*sides["spent"], *sides["reserved"]}
    return {key: (sides["spent"][key], sides["reserved"][key]) for key in keys}


def unbalanced(db: Connection) -> Iterator[str]:
    """Transactions whose postings do not add up to nothing, or that lack lines or have too many."""
    for row in db.execute(
        text(
            f"SELECT txn FROM posting GROUP BY txn HAVING SUM(pico / {PART}) <> 0 "
            f"OR SUM(pico % {PART}) <> 0 OR SUM(tokens) <> 0 "
            "OR SUM(requests) <> 0 OR SUM(slots) <> 0"
        )
    ):
        yield f"transaction {row.txn}: its postings do not add up to 0"
    for row in db.execute(
        text(
            "SELECT txn.id AS id, txn.lines AS said, COUNT(line.n) AS n FROM txn LEFT JOIN line "
            "ON line.txn = txn.id GROUP BY txn.id, txn.lines HAVING COUNT(line.n) <> txn.lines"
        )
    ):
        yield f"transaction {row.id}: {row.said} lines were written, {row.n} are there"


def counters_off(db: Connection) -> Iterator[str]:
    """Counters that are not the sum of their lines."""
    right = replay(db)
    for row in db.execute(select(schema.counter)):
        spent = Amount(row.spent_pico, row.spent_tokens, row.spent_requests, row.spent_slots)
        held = Amount(row.reserved_pico, row.reserved_tokens, row.reserved_requests, row.reserved_slots)
        if right.pop((row.scope, row.span), (ZERO, ZERO)) != (spent, held):
            yield f"counter {row.scope} {row.span}: its lines add up to something else"
    for (scope, span), sums in right.items():
        if sums != (ZERO, ZERO):
            yield f"counter {scope} {span} is missing"


def reserved_off(db: Connection) -> Iterator[str]:
    """Scopes that hold something else than their open reservations do."""
    wanted: dict[str, Amount] = defaultdict(lambda: ZERO)
    table = schema.reservation
    for row in db.execute(select(table).where(table.c.state == "open")):
        for scope in msgspec.json.decode(row.scopes):
            wanted[scope] += Amount(row.pico, row.tokens, row.requests, row.slots)
    counter = schema.counter
    for row in db.execute(select(counter).where(counter.c.span == "total")):
        held = Amount(row.reserved_pico, row.reserved_tokens, row.reserved_requests, row.reserved_slots)
        if wanted[row.scope] != held:
            yield f"{row.scope}: holds {held}, but its open requests hold {wanted[row.scope]}"


def charges_off(db: Connection) -> Iterator[str]:
    """Settled reservations without exactly one charge, and charges that are not the sum of their lines."""
    for row in db.execute(
        text(
            "SELECT r.id AS id FROM reservation r LEFT JOIN charge c ON c.reservation = r.id AND c.n = 0 "
            "WHERE (r.state = 'open') <> (c.reservation IS NULL)"
        )
    ):
        yield f"request {row.id}: settled without a charge, or charged and still open"
    sums = (
        "SELECT c.reservation AS id, c.cost AS cost, c.revenue AS revenue, l.cost AS lines_cost, "
        "l.revenue AS lines_revenue FROM (SELECT reservation, SUM(cost_pico) AS cost, "
        "SUM(revenue_pico) AS revenue FROM charge GROUP BY reservation) c LEFT JOIN "
        "(SELECT txn.reservation AS reservation, "
        "SUM(CASE WHEN account LIKE 'expense:%' THEN pico ELSE 0 END) AS cost, "
        "SUM(CASE WHEN account LIKE 'receivable:%' THEN pico ELSE 0 END) AS revenue "
        "FROM posting JOIN txn ON txn.id = posting.txn GROUP BY txn.reservation) l "
        "ON l.reservation = c.reservation WHERE c.cost <> COALESCE(l.cost, 0) "
        "OR c.revenue <> COALESCE(l.revenue, 0)"
    )
    for row in db.exec_driver_sql(sums.replace("%", "%%") if db.dialect.name == "postgresql" else sums):
        yield (
            f"request {row.id}: charged {row.cost} and {row.revenue}, its lines say {row.lines_cost} and "
            f"{row.lines_revenue}"
        )


def prices_missing(db: Connection) -> Iterator[str]:
    """Lines whose price is not stored."""
    for row in db.execute(
        text(
            "SELECT DISTINCT kind, price_version FROM line WHERE price_version NOT IN "
            "(SELECT id FROM price_version)"
        )
    ):
        yield f"price {row.price_version!r} of {row.kind} lines is not stored"
