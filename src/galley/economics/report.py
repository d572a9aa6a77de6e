"""What the ledger says of a period: spending, revenue, savings, margins, movers, and the proof of it.

Sums come from the charges; ``Report.ledger`` has the same sums from the lines, so that a reader can see that
they are equal. Everything but the proof is read in one transaction. Whole pico-dollars.
"""

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any

import msgspec
from sqlalchemy import Connection, func, or_, select, text

from galley.economics import schema
from galley.economics.check import PART, Audit, check
from galley.economics.forecast import Forecast, forecast
from galley.economics.price import PriceVersion
from galley.economics.query import Spend, check_groups, gather
from galley.economics.store import Store

__all__ = ["Mover", "PlanMargin", "Report", "Saving", "report"]

MOVERS = 10
CALENDAR = ("day", "month")


class Saving(msgspec.Struct, frozen=True, kw_only=True):
    """What was saved by something, and against what."""

    by: str
    """``cache``, ``route``, ``batch`` or ``speculation``."""
    against: str
    """The counterfactual: ``uncached``, ``interactive``, ``undrafted``, or the dearest eligible offer."""
    pico: int


class PlanMargin(msgspec.Struct, frozen=True, kw_only=True):
    """Of the users of one plan; None is no plan."""

    plan: str | None
    requests: int
    cost_pico: int
    revenue_pico: int

    @property
    def margin_pico(self) -> int:
        """Revenue less cost; negative where a plan is not charged."""
        return self.revenue_pico - self.cost_pico

    @property
    def margin_points(self) -> int | None:
        """Ten-thousandths of the revenue, rounded half to even; None without revenue."""
        return rounded(self.margin_pico * 10_000, self.revenue_pico)


class Mover(msgspec.Struct, frozen=True, kw_only=True):
    """A group whose cost is not what it was in the period before."""

    key: tuple[str | None, ...]
    now_pico: int
    before_pico: int

    @property
    def change_pico(self) -> int:
        """More than before."""
        return self.now_pico - self.before_pico


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A period of UTC days, ``since`` included and ``until`` not.

    Attributes:
        groups: sums by ``by``. By tag, a request with several is in several, so they may exceed the total.
        total: of every charge of the period.
        ledger: the same from the lines: ``cost``, ``revenue``, ``saved``.
        days: of the period and those before it that the forecast rests on.
        compared: the first day of as long a period before, which the movers are compared with. Of a period
            that is not over, as much as has passed.
        unpriced: requests with tokens whose price is not in the ledger; must be 0.
        ceiling: requests whose price was not known, charged at the declared ceiling.
        unlisted: requests of our own engines without a price list.
        succeeded: requests that ended well.
        proof: the check of the whole ledger.
    """

    since: str
    until: str
    by: tuple[str, ...]
    groups: list[Spend]
    total: Spend
    ledger: dict[str, int]
    savings: list[Saving]
    plans: list[PlanMargin]
    days: list[Spend]
    forecast: Forecast | None
    movers_by: tuple[str, ...]
    movers: list[Mover]
    compared: str
    unpriced: int
    ceiling: int
    unlisted: int
    succeeded: int
    proof: Audit
    checkpoint: Mapping[str, str] | None = None
    """Of the audit log, beside which the report was made: ``origin``, ``size``, ``root`` (base64)."""

    @property
    def exact(self) -> bool:
        """Whether the charges are what the lines say, to the last digit."""
        charged = {
            "cost": self.total.cost_pico,
            "revenue": self.total.revenue_pico,
            "saved": self.total.saved_pico,
        }
        named = sum(each.pico for each in self.savings)
        return charged == self.ledger and named == self.ledger["saved"]

    @property
    def good(self) -> bool:
        """Exact, nothing without a price, and the whole ledger adds up."""
        return self.exact and not self.unpriced and self.proof.good

    @property
    def success_pico(self) -> int | None:
        """Cost of all requests, failed ones included, for each that ended well; rounded half to even."""
        return rounded(self.total.cost_pico, self.succeeded)


def report(store: Store, by: Sequence[str], *, since: str, until: str, today: date) -> Report:
    """Answer for a period of UTC days, ``until`` not included.

    O(charges of the period, of the one before and of the month) and O(lines of the ledger) for the proof.
    Raises ValueError for an unknown group or a period that does not end after it begins, LedgerUnavailable.
    """
    check_groups(by)
    if until <= since:
        raise ValueError(f"the period must end after it begins: {since} to {until}")
    names = tuple(dict.fromkeys(by))
    movers_by = tuple(name for name in names if name not in CALENDAR) or ("user",)
    first = date.fromisoformat(since)
    passed = max(1, (min(date.fromisoformat(until), today + timedelta(days=1)) - first).days)
    compared = (first - timedelta(days=min(passed, first.toordinal() - 1))).isoformat()
    looked = min(since, (today - timedelta(days=62)).isoformat())
    with store.reading() as db:
        totals = gather(db, (), since=since, until=until)
        prices = price_kinds(db, since, until)
        ended = gather(db, ("outcome",), since=since, until=until)
        days = gather(db, ("day",), since=looked, until=max(until, (today + timedelta(days=1)).isoformat()))
        now = gather(db, movers_by, since=since, until=until)
        before = gather(db, movers_by, since=compared, until=since)
        found = Report(
            since=since,
            until=until,
            by=names,
            groups=gather(db, names, since=since, until=until) if names else [],
            total=totals[0] if totals else Spend(key=()),
            ledger=ledger_sums(db, since, until),
            savings=savings(db, since, until),
            plans=[
                PlanMargin(
                    plan=each.key[0],
                    requests=each.charges,
                    cost_pico=each.cost_pico,
                    revenue_pico=each.revenue_pico,
                )
                for each in gather(db, ("plan",), since=since, until=until)
            ],
            days=days,
            forecast=forecast({str(each.key[0]): each.cost_pico for each in days}, today),
            movers_by=movers_by,
            movers=movers(now, before),
            compared=compared,
            **prices,
            succeeded=sum(each.charges for each in ended if each.key[0] == "ok"),
            proof=NOTHING,
        )
    return msgspec.structs.replace(found, proof=check(store))


NOTHING = Audit(
    transactions=0,
    lines=0,
    reservations_open=0,
    charges=0,
    problems=["not checked"],
    problem_count=1,
    sums={},
)


def movers(now: Sequence[Spend], before: Sequence[Spend]) -> list[Mover]:
    """The groups whose cost changed most, either way, at most ``MOVERS``."""
    new, old = ({each.key: each.cost_pico for each in side} for side in (now, before))
    found = [Mover(key=key, now_pico=new.get(key, 0), before_pico=old.get(key, 0)) for key in {**new, **old}]
    found = [each for each in found if each.change_pico]
    return sorted(found, key=lambda each: (-abs(each.change_pico), str(each.key)))[:MOVERS]


def ledger_sums(db: Connection, since: str, until: str) -> dict[str, int]:
    """Cost, revenue and savings of a period from the lines alone."""
    sums = {"expense": 0, "receivable": 0, "saving": 0}
    rows = db.execute(
        text(
            f"SELECT posting.account, SUM(posting.pico / {PART}), SUM(posting.pico % {PART}) FROM posting "
            "JOIN txn ON txn.id = posting.txn WHERE posting.pico <> 0 AND txn.day >= :since "
            "AND txn.day < :until GROUP BY posting.account"
        ),
        {"since": since, "until": until},
    )
    for account, high, low in rows:
        kind = account.partition(":")[0]
        if kind in sums:
            sums[kind] += int(high) * PART + int(low)
    return {"cost": sums["expense"], "revenue": sums["receivable"], "saved": sums["saving"]}


def savings(db: Connection, since: str, until: str) -> list[Saving]:
    """By what and against what, from the lines; a correction's reversals taken off."""
    line, txn = schema.line, schema.txn
    sums: dict[tuple[str, str], int] = {}
    wanted = select(line.c.source, line.c.target, line.c.pico)
    rows = db.execute(
        wanted.join(txn, txn.c.id == line.c.txn).where(
            txn.c.day >= since,
            txn.c.day < until,
            or_(line.c.source.startswith("saving:"), line.c.target.startswith("saving:")),
        )
    )
    for source, target, pico in rows:
        forward = target.startswith("saving:")
        saving, other = (target, source) if forward else (source, target)
        key = (saving.partition(":")[2], other.partition(":")[2])
        sums[key] = sums.get(key, 0) + (pico if forward else -pico)
    return [Saving(by=by, against=against, pico=pico) for (by, against), pico in sorted(sums.items()) if pico]


def price_kinds(db: Connection, since: str, until: str) -> dict[str, Any]:
    """How many requests with tokens had no price, an assumed one, or none because they ran here."""
    charge, price = schema.charge, schema.price
    stored: dict[str, list[PriceVersion]] = {}
    for id, body in db.execute(select(price.c.id, price.c.body)):
        stored.setdefault(id, []).append(msgspec.json.decode(body, type=PriceVersion))
    counts = {"unpriced": 0, "ceiling": 0, "unlisted": 0}
    rows = db.execute(
        select(charge.c.price_version, func.count())
        .where(
            charge.c.n == 0,
            charge.c.day >= since,
            charge.c.day < until,
            charge.c.prompt_tokens + charge.c.completion_tokens > 0,
        )
        .group_by(charge.c.price_version)
    )
    for id, count in rows:
        versions = stored.get(id, [])
        if not versions:
            counts["unpriced"] += count
        elif any(each.quality == "ceiling" for each in versions):
            counts["ceiling"] += count
        elif all(each.quality == "own" and each.free for each in versions):
            counts["unlisted"] += count
    return counts


def rounded(amount: int, parts: int) -> int | None:
    """``amount / parts`` as a whole number, half to even; None for no parts. O(1), exact."""
    if not parts:
        return None
    whole, left = divmod(amount, parts)
    return whole + (2 * left > parts or (2 * left == parts and whole % 2 == 1))
