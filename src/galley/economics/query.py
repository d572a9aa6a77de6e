"""Questions to the ledger: what was spent, by whom and on what; every sum in exact integers."""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, select

from galley.economics import schema
from galley.economics.store import Store

__all__ = ["GROUPS", "SUMMED", "Spend", "charges", "check_groups", "gather", "lines", "spend"]

GROUPS = (
    "day", "month", "tenant", "org", "team", "user", "key", "session", "plan", "api", "model", "provider",
    "tag", "outcome", "price_version",
)  # fmt: skip
"""What spending can be broken down by. A request with several tags is in several rows of ``tag``."""
SUMMED = (
    "requests", "prompt_tokens", "cached_tokens", "cache_write_tokens", "completion_tokens",
    "reasoning_tokens", "cost_pico", "revenue_pico", "cache_saved_pico", "route_saved_pico",
    "batch_saved_pico", "speculation_saved_pico",
)  # fmt: skip


class Spend(msgspec.Struct, kw_only=True):
    """Sums over the charges of one group. ``key`` holds the group's names in the order asked for; None where
    a request had none. Money in pico-dollars."""

    key: tuple[str | None, ...]
    charges: int = 0
    """Requests settled (corrections not counted)."""
    estimated: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cost_pico: int = 0
    revenue_pico: int = 0
    cache_saved_pico: int = 0
    route_saved_pico: int = 0
    batch_saved_pico: int = 0
    speculation_saved_pico: int = 0

    @property
    def fresh_tokens(self) -> int:
        """Prompt tokens that were neither read from a cache nor written to one."""
        return self.prompt_tokens - self.cached_tokens - self.cache_write_tokens

    @property
    def saved_pico(self) -> int:
        """Against all counterfactuals."""
        return (
            self.cache_saved_pico
            + self.route_saved_pico
            + self.batch_saved_pico
            + self.speculation_saved_pico
        )


def spend(
    store: Store, by: Sequence[str] = (), *, since: str | None = None, until: str | None = None
) -> list[Spend]:
    """Spending by group, sorted by its names; one row of all without ``by``.

    Args:
        by: names of GROUPS.
        since, until: UTC days such as ``2026-11-01``: from the first, before the last.

    O(charges in the period). Added up here, in unbounded integers. Raises ValueError for an unknown group,
    LedgerUnavailable.
    """
    check_groups(by)
    with store.reading() as db:
        return gather(db, by, since=since, until=until)


def check_groups(by: Sequence[str]) -> None:
    """Raises ValueError for what spending cannot be broken down by."""
    unknown = [name for name in by if name not in GROUPS]
    if unknown:
        raise ValueError(f"cannot group by {', '.join(unknown)}; there are {', '.join(GROUPS)}")


def gather(db: Connection, by: Sequence[str], *, since: str | None, until: str | None) -> list[Spend]:
    """``spend`` within a transaction."""
    table = schema.charge
    columns: dict[str, Any] = {**dict(table.c), "month": table.c.day, "tag": table.c.tags}
    names = list(dict.fromkeys(by))
    wanted = select(
        *(columns[name].label(f"by_{name}") for name in names),
        table.c.n,
        table.c.estimated,
        *(table.c[name] for name in SUMMED),
    )
    found: dict[tuple[str | None, ...], Spend] = {}
    for row in db.execute(between(wanted, since, until)):
        values = row._mapping
        for key in keys(names, values):
            group = found.setdefault(key, Spend(key=key))
            group.charges += values["n"] == 0
            group.estimated += values["estimated"] if values["n"] == 0 else 0
            for name in SUMMED:
                setattr(group, name, getattr(group, name) + values[name])
    return sorted(
        found.values(), key=lambda group: tuple((part is not None, part or "") for part in group.key)
    )


def charges(store: Store, *, since: str | None = None, until: str | None = None) -> Iterable[dict[str, Any]]:
    """Every charge and correction of a period as it is stored, oldest first; ``tags`` as a list."""
    table = schema.charge
    with store.reading() as db:
        ordered = between(select(table), since, until).order_by(table.c.at_us, table.c.reservation, table.c.n)
        for row in db.execute(ordered):
            yield {**row._mapping, "tags": msgspec.json.decode(row.tags)}


def lines(store: Store, reservation: str) -> list[dict[str, Any]]:
    """Every line of a request's transactions, in the order written."""
    table, txn = schema.line, schema.txn
    wanted = (
        select(table, txn.c.kind.label("step"), txn.c.at_us)
        .join(txn, txn.c.id == table.c.txn)
        .where(txn.c.reservation == reservation)
        .order_by(txn.c.at_us, txn.c.id, table.c.n)
    )
    with store.reading() as db:
        return [dict(row._mapping) for row in db.execute(wanted)]


def between(wanted: Any, since: str | None, until: str | None) -> Any:
    """Only charges of a period."""
    if since is not None:
        wanted = wanted.where(schema.charge.c.day >= since)
    if until is not None:
        wanted = wanted.where(schema.charge.c.day < until)
    return wanted


def keys(names: Sequence[str], row: Any) -> list[tuple[str | None, ...]]:
    """The groups a charge belongs to; several where it has several tags."""
    found: list[tuple[str | None, ...]] = [()]
    for name in names:
        value = row[f"by_{name}"]
        options: list[str | None] = [value[:7] if name == "month" else value]
        if name == "tag":
            options = list(msgspec.json.decode(value)) or [None]
        found = [(*key, option) for key in found for option in options]
    return found
