"""A report as tables of text, as CSV and as JSON: three forms of the same exact figures."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import msgspec

from galley.economics.amount import dollars
from galley.economics.query import SUMMED, Spend
from galley.economics.report import Report

__all__ = ["Sheet", "as_csv", "as_json", "sheets"]

TOTAL = "total"
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet would take for a formula at the start of a cell."""


class Sheet(msgspec.Struct, frozen=True):
    """A table. ``totals``: how many of the last rows are sums."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    totals: int = 0
    note: str = ""


def money(pico: int | None) -> str:
    """Dollars to the last digit, or ``-``."""
    return "-" if pico is None else ("-$" if pico < 0 else "$") + dollars(abs(pico))


def percent(points: int | None) -> str:
    """Ten-thousandths as per cent."""
    return "-" if points is None else f"{points / 100:.2f} %"


def named(key: Sequence[str | None]) -> tuple[str, ...]:
    """The names of a group; ``-`` where there is none."""
    return tuple("-" if part is None else part for part in key)


def sums(spend: Spend) -> tuple[str, ...]:
    """The columns of a group after its names."""
    tokens = (
        spend.fresh_tokens, spend.cached_tokens, spend.cache_write_tokens, spend.completion_tokens,
        spend.reasoning_tokens,
    )  # fmt: skip
    amounts = (spend.cost_pico, spend.revenue_pico, spend.saved_pico)
    return (str(spend.charges), *map(str, tokens), *map(money, amounts))


HEAD = ("REQUESTS", "INPUT", "CACHED", "CACHE WRITE", "OUTPUT", "REASONING", "COST", "REVENUE", "SAVED")


def sheets(report: Report) -> list[Sheet]:
    """Everything a report says, for people."""
    by = report.by
    padded = (TOTAL, *[""] * (len(by) - 1))
    spending = Sheet(
        f"Spending from {report.since} to before {report.until}",
        ((*(name.upper() for name in by),) if by else ("",)) + HEAD,
        [*((*named(each.key), *sums(each)) for each in report.groups), (*padded, *sums(report.total))],
        totals=1,
        note="A request with several tags is in several rows, but once in the total." if "tag" in by else "",
    )
    found = [
        spending,
        Sheet(
            "Savings",
            ("BY", "AGAINST", "SAVED"),
            [
                *((each.by, each.against, money(each.pico)) for each in report.savings),
                (TOTAL, "", money(report.total.saved_pico)),
            ],
            totals=1,
        ),
        Sheet(
            "Plans",
            ("PLAN", "REQUESTS", "COST", "REVENUE", "MARGIN", "SHARE"),
            [
                (
                    each.plan or "-",
                    str(each.requests),
                    money(each.cost_pico),
                    money(each.revenue_pico),
                    money(each.margin_pico),
                    percent(each.margin_points),
                )
                for each in report.plans
            ],
        ),
        Sheet(
            f"Movers since the period from {report.compared}",
            (*(name.upper() for name in report.movers_by), "NOW", "BEFORE", "CHANGE"),
            [
                (*named(each.key), money(each.now_pico), money(each.before_pico), money(each.change_pico))
                for each in report.movers
            ],
        ),
    ]
    return [each for each in found if len(each.rows) > each.totals or each is spending] + [facts(report)]


def facts(report: Report) -> Sheet:
    """What is one figure: forecast, cost of a success, prices, proof."""
    ahead, proof = report.forecast, report.proof
    if ahead is None:
        outlook = "none: it takes two complete days with spending"
    else:
        outlook = (
            f"{money(ahead.estimate)} ({money(ahead.low)} to {money(ahead.high)}, 90 %), "
            f"{money(ahead.spent)} so far; from {ahead.days} days"
        )
    wrong = f"{proof.problem_count} things are wrong: {proof.problems[0]}" if not proof.good else ""
    equal = "equal" if report.exact else "NOT EQUAL"
    rows: list[tuple[str, ...]] = [
        ("forecast of the month", outlook),
        ("cost per successful request", f"{money(report.success_pico)} ({report.succeeded} succeeded)"),
        ("unpriced requests", str(report.unpriced)),
        ("at the ceiling price", str(report.ceiling)),
        ("own engine without prices", str(report.unlisted)),
        ("estimated", str(report.total.estimated)),
        (
            "ledger's lines",
            f"{equal}: cost {money(report.ledger['cost'])}, revenue {money(report.ledger['revenue'])}, "
            f"saved {money(report.ledger['saved'])}",
        ),
        (
            "ledger check",
            wrong
            or f"everything adds up: {proof.transactions} transactions, {proof.lines} lines, "
            f"{proof.charges} charges",
        ),
    ]
    if report.checkpoint is not None:
        said = report.checkpoint
        rows.append(("audit checkpoint", f"{said['origin']}, {said['size']} entries, root {said['root']}"))
    return Sheet("Facts", ("WHAT", "FIGURE"), rows)


def as_csv(report: Report) -> str:
    """One row a group and a last one of all, RFC 4180. ``row`` is ``group`` or ``total``; money is given in
    whole pico-dollars and in dollars, both exact. A name that a spreadsheet would take for a formula gets a
    quote in front."""
    out = io.StringIO()
    writer = csv.writer(out)
    paid = [name for name in SUMMED if name.endswith("_pico")]
    counted = [name for name in SUMMED if not name.endswith("_pico")]
    usd = [name.replace("_pico", "_usd") for name in paid]
    writer.writerow(["row", *report.by, "charges", "estimated", *counted, *paid, *usd])
    for row, each in [*(("group", each) for each in report.groups), (TOTAL, report.total)]:
        names = [safe(part or "") for part in each.key] or [""] * len(report.by)
        amounts = [getattr(each, name) for name in paid]
        writer.writerow(
            [
                row, *names, each.charges, each.estimated, *(getattr(each, name) for name in counted),
                *amounts, *map(dollars, amounts),
            ]
        )  # fmt: skip
    return out.getvalue()


def safe(name: str) -> str:
    """A cell that is text to every reader."""
    return "'" + name if name.startswith(FORMULA) else name


def as_json(report: Report) -> dict[str, Any]:
    """Every figure. Money as strings, of pico-dollars (``…_pico``) and of dollars (``…_usd``), because few
    readers keep 64 bits."""
    ahead = report.forecast
    return {
        "since": report.since,
        "until": report.until,
        "by": list(report.by),
        "groups": [spent(each, report.by) for each in report.groups],
        "total": spent(report.total, ()),
        "ledger": paid({f"{name}_pico": pico for name, pico in report.ledger.items()}),
        "exact": report.exact,
        "savings": [paid({"by": e.by, "against": e.against, "saved_pico": e.pico}) for e in report.savings],
        "plans": [
            paid(
                {
                    "plan": each.plan,
                    "requests": each.requests,
                    "cost_pico": each.cost_pico,
                    "revenue_pico": each.revenue_pico,
                    "margin_pico": each.margin_pico,
                    "margin_points": each.margin_points,
                }
            )
            for each in report.plans
        ],
        "forecast": None
        if ahead is None
        else paid(
            {
                "month": ahead.month,
                "days": ahead.days,
                "interval_percent": 90,
                "spent_pico": ahead.spent,
                "estimate_pico": ahead.estimate,
                "low_pico": ahead.low,
                "high_pico": ahead.high,
            }
        ),
        "compared_since": report.compared,
        "movers": [
            paid(
                {
                    "key": dict(zip(report.movers_by, each.key, strict=True)),
                    "now_pico": each.now_pico,
                    "before_pico": each.before_pico,
                    "change_pico": each.change_pico,
                }
            )
            for each in report.movers
        ],
        "succeeded": report.succeeded,
        **paid({"cost_per_success_pico": report.success_pico}),
        "unpriced": report.unpriced,
        "ceiling": report.ceiling,
        "unlisted": report.unlisted,
        "proof": {**msgspec.to_builtins(report.proof), "good": report.proof.good},
        "audit_checkpoint": report.checkpoint,
        "good": report.good,
    }


def spent(each: Spend, by: Sequence[str]) -> dict[str, Any]:
    """A group."""
    fields = {name: getattr(each, name) for name in ("charges", "estimated", *SUMMED)}
    amounts = paid({**fields, "saved_pico": each.saved_pico, "fresh_tokens": each.fresh_tokens})
    return {"key": dict(zip(by, each.key, strict=True)), **amounts} if by else amounts


def paid(fields: dict[str, Any]) -> dict[str, Any]:
    """With each ``x_pico`` as a string, and ``x_usd`` beside it."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if not name.endswith("_pico"):
            found[name] = value
            continue
        found[name] = None if value is None else str(value)
        found[name.removesuffix("_pico") + "_usd"] = None if value is None else dollars(value)
    return found
