"""What one transaction of the ledger has in hand: rows locked and loaded, changed in memory, written at once.

Locks are taken in one order (reservations by id, then counters by key), so that two transactions seldom meet
the wrong way round; where they do, the store tries again.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, bindparam, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.dialects.sqlite import insert as lite_insert

from galley.economics import schema
from galley.economics.admission import Gauge
from galley.economics.amount import Amount
from galley.economics.bucket import Bucket
from galley.economics.price import PriceVersion
from galley.economics.scope import windows

__all__ = ["UNITS", "Page", "Row"]

UNITS = ("pico", "tokens", "requests", "slots")
COUNTED = [f"{side}_{unit}" for side in ("spent", "reserved") for unit in UNITS]
Row = dict[str, Any]


class Page:
    """Loaded, changed, written; the caller begins and commits.

    Args:
        known: ids and digests of price versions stored before.

    Attributes:
        reservations: by id. gauges: by scope and span. buckets: by scope and resource.
        prices: versions written by ``write``; known for good once the caller has committed.
    """

    def __init__(self, db: Connection, known: set[tuple[str, str]]) -> None:
        self.reservations: dict[str, Row] = {}
        self.gauges: dict[tuple[str, str], Gauge] = {}
        self.buckets: dict[tuple[str, str], Bucket] = {}
        self.prices: dict[tuple[str, str], bytes] = {}
        self._db = db
        self._known = known
        self._insert: Any = lite_insert if db.dialect.name == "sqlite" else pg_insert
        self._new: dict[str, list[Row]] = {}
        self._fresh: set[str] = set()
        self._touched: set[str] = set()
        self._rated: set[tuple[str, str]] = set()

    # ---- loading

    def lock_reservations(self, ids: Iterable[str]) -> None:
        """Those that exist."""
        found = self._db.execute(RESERVATIONS, {"ids": sorted(set(ids))})
        self.reservations = {row.id: dict(row._mapping) for row in found}

    def lock_gauges(self, keys: Sequence[tuple[str, str]]) -> None:
        """Counters, made where missing, locked in order. ``keys`` are sorted."""
        if not keys:
            return
        self._gauge(keys)
        missing = sorted(set(keys) - set(self.gauges))
        if missing:
            rows = [{"scope": scope, "span": span, **dict.fromkeys(COUNTED, 0)} for scope, span in missing]
            self._db.execute(self._insert(schema.counter).on_conflict_do_nothing(), rows)
            self._gauge(keys)

    def _gauge(self, keys: Sequence[tuple[str, str]]) -> None:
        for row in self._db.execute(COUNTERS, {"keys": keys}):
            self.gauges[row.scope, row.span] = Gauge(
                Amount(row.spent_pico, row.spent_tokens, row.spent_requests, row.spent_slots),
                Amount(row.reserved_pico, row.reserved_tokens, row.reserved_requests, row.reserved_slots),
            )

    def load_buckets(self, keys: Sequence[tuple[str, str]]) -> None:
        """Levels of rates. The locks of their scopes' counters guard them."""
        if not keys:
            return
        table = schema.bucket
        wanted = select(table).where(tuple_(table.c.scope, table.c.resource).in_(keys))
        for row in self._db.execute(wanted):
            self.buckets[row.scope, row.resource] = Bucket(0, row.level, row.at_us)

    def charged(self, id: str) -> Row:
        """The charge that a reaper made."""
        table = schema.charge
        return dict(
            self._db.execute(select(table).where(table.c.reservation == id, table.c.n == 0)).one()._mapping
        )

    def money_lines(self, txn: str) -> list[Row]:
        """A transaction's lines outside any scope, in order."""
        table = schema.line
        wanted = select(table).where(
            table.c.txn == txn, table.c.source.not_like("budget:%"), table.c.source.not_like("reserved:%")
        )
        return [dict(row._mapping) for row in self._db.execute(wanted.order_by(table.c.n))]

    # ---- changing

    def add_reservation(self, row: Row) -> None:
        """A new one."""
        self.reservations[row["id"]] = row
        self._fresh.add(row["id"])

    def touch(self, id: str) -> None:
        """A reservation was changed."""
        self._touched.add(id)

    def set_bucket(self, key: tuple[str, str], bucket: Bucket) -> None:
        """A rate's new level."""
        self.buckets[key] = bucket
        self._rated.add(key)

    def hold(self, scopes: Iterable[str], day: str, amount: Amount) -> None:
        """Reserved in all of them. Raises AmountTooLarge, before anything has changed."""
        every = [self.gauges[scope, span] for scope in scopes for span in windows(scope, day)]
        sums = [(gauge.reserved + amount).checked() for gauge in every]
        for gauge, total in zip(every, sums, strict=True):
            gauge.reserved, gauge.dirty = total, True

    def spend(self, scopes: Iterable[str], day: str, amount: Amount, release: Amount) -> None:
        """Spent in all of them, and ``release`` reserved no longer. Raises AmountTooLarge likewise."""
        every = [self.gauges[scope, span] for scope in scopes for span in windows(scope, day)]
        sums = [(gauge.spent + amount).checked() for gauge in every]
        for gauge, total in zip(every, sums, strict=True):
            gauge.spent, gauge.reserved, gauge.dirty = total, gauge.reserved - release, True

    def post(
        self, id: str, kind: str, *, now_us: int, day: str, lines: Sequence[Row], price: PriceVersion
    ) -> None:
        """A transaction of the reservation ``id``."""
        name = f"{id}:{kind}"
        kind = kind.partition(":")[0]
        row = {"id": name, "reservation": id, "kind": kind, "day": day, "at_us": now_us, "lines": len(lines)}
        self._new.setdefault("txn", []).append(row)
        self._new.setdefault("line", []).extend(
            {"price_version": price.id, **line, "txn": name, "n": number} for number, line in enumerate(lines)
        )
        self.keep(price)

    def keep(self, price: PriceVersion) -> None:
        """Store a price that lines name."""
        key = (price.id, price.digest)
        if key not in self._known:
            self.prices[key] = msgspec.json.encode(price)

    def charge(self, row: Row) -> None:
        """A row for the reports."""
        self._new.setdefault("charge", []).append(row)

    # ---- writing

    def write(self) -> None:
        """Everything changed, in few statements."""
        db = self._db
        if self.prices:
            rows = [
                {"id": id, "digest": digest, "body": body.decode()}
                for (id, digest), body in sorted(self.prices.items())
            ]
            db.execute(self._insert(schema.price).on_conflict_do_nothing(), rows)
        fresh = [self.reservations[id] for id in sorted(self._fresh)]
        if fresh:
            db.execute(INSERTS["reservation"], fresh)
        changed = [self.reservations[id] for id in sorted(self._touched - self._fresh)]
        if changed:
            db.execute(RESERVATION_UPDATE, [bound(row) for row in changed])
        for name in ("txn", "line", "charge"):
            if self._new.get(name):
                db.execute(INSERTS[name], self._new[name])
        dirty = [
            bound({"scope": scope, "span": span, **gauge.columns()})
            for (scope, span), gauge in sorted(self.gauges.items())
            if gauge.dirty
        ]
        if dirty:
            db.execute(COUNTER_UPDATE, dirty)
        rates = [
            {"scope": key[0], "resource": key[1], "level": bucket.level, "at_us": bucket.at_us}
            for key, bucket in sorted(self.buckets.items())
            if key in self._rated
        ]
        if rates:
            statement = self._insert(schema.bucket)
            changes = {"level": statement.excluded.level, "at_us": statement.excluded.at_us}
            db.execute(
                statement.on_conflict_do_update(index_elements=["scope", "resource"], set_=changes), rates
            )


# Built once: putting a statement together costs more than running it.
RESERVATIONS = (
    select(schema.reservation)
    .where(schema.reservation.c.id.in_(bindparam("ids", expanding=True)))
    .order_by(schema.reservation.c.id)
    .with_for_update()
)
COUNTERS = (
    select(schema.counter)
    .where(tuple_(schema.counter.c.scope, schema.counter.c.span).in_(bindparam("keys", expanding=True)))
    .order_by(schema.counter.c.scope, schema.counter.c.span)
    .with_for_update()
)
INSERTS = {name: schema.metadata.tables[name].insert() for name in ("reservation", "txn", "line", "charge")}
CHANGING = (
    *UNITS, "state", "lease_us", "extends", "prompt_tokens", "cached_tokens", "completion_tokens", "price",
    "sunk", "facts",
)  # fmt: skip
RESERVATION_UPDATE = (
    update(schema.reservation)
    .where(schema.reservation.c.id == bindparam("b_id"))
    .values({name: bindparam(f"b_{name}") for name in CHANGING})
)
COUNTER_UPDATE = (
    update(schema.counter)
    .where(schema.counter.c.scope == bindparam("b_scope"), schema.counter.c.span == bindparam("b_span"))
    .values({name: bindparam(f"b_{name}") for name in COUNTED})
)


def bound(row: Mapping[str, Any]) -> Row:
    """Named as the updates above want it."""
    return {f"b_{name}": value for name, value in row.items()}
