"""Budgets as people set and read them: dollars in, what is used and what is left out."""

from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Literal

import msgspec
from sqlalchemy import select

from galley.economics import schema
from galley.economics.limits import Limits, Margin, Rule, Rules
from galley.economics.scope import check_scope
from galley.economics.store import Store
from galley.errors import InvalidRequest

__all__ = ["Standing", "changed", "read_limits", "read_margin", "standing"]

NOT_SOFT = ("requests_minute", "tokens_minute", "max_output")
"""Limits that cannot merely warn."""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """One limit of a scope and how it stands. Money in pico-dollars."""

    limit: str
    kind: Literal["hard", "soft"]
    most: int
    spent: int | None = None
    """None for limits that are not counted over a window."""
    reserved: int | None = None
    left: int | None = None


def read_limits(given: Mapping[str, str | None], *, soft: bool = False) -> dict[str, int | None]:
    """Limits by name from text: money in dollars (``2.50``), the rest whole; ``none`` takes a limit away.
    Raises InvalidRequest."""
    found: dict[str, int | None] = {}
    for name, text in given.items():
        if text is None:
            continue
        if soft and name in NOT_SOFT:
            raise InvalidRequest(f"{name} cannot be a soft limit.", param=name)
        if text.strip().lower() == "none":
            found[name] = None
            continue
        try:
            amount = Decimal(text.strip())
        except InvalidOperation as error:
            raise InvalidRequest(f"{name}: {text!r} is no number.", param=name) from error
        if name.startswith("money_"):
            amount = amount * 10**12 if amount.is_finite() else amount
        if not amount.is_finite() or amount != amount.to_integral_value() or amount < 0:
            raise InvalidRequest(f"{name}: {text!r} is no exact amount of 0 or more.", param=name)
        found[name] = int(amount)
    return found


def read_margin(text: str | None) -> Margin | None:
    """``0.6`` is 60 % of what is charged; ``free`` charges nothing. Raises InvalidRequest."""
    if text is None:
        return None
    if text == "free":
        return Margin(None)
    try:
        points = Decimal(text) * 10_000
    except InvalidOperation as error:
        raise InvalidRequest(f"margin: {text!r} is neither a share nor 'free'.", param="margin") from error
    if not points.is_finite() or points != points.to_integral_value() or not 0 <= points < 10_000:
        raise InvalidRequest("margin lies in 0 to 0.9999, with at most four decimals.", param="margin")
    return Margin(int(points))


def changed(
    rule: Rule | None,
    scope: str,
    rules: Rules,
    *,
    limits: Mapping[str, int | None],
    soft: bool,
    plan: str | None,
    margin: Margin | None,
) -> Rule:
    """A scope's rule with these limits changed and the others as they were. Raises InvalidRequest."""
    check_scope(scope)
    rule = rule or (rules.get(scope) if scope.startswith("plan:") else None) or Rule()
    side = "soft" if soft else "hard"
    before: Limits = getattr(rule, side)
    after = msgspec.structs.replace(before, **limits).check()
    if scope.startswith("session:") and any(
        getattr(after, f"{what}_{window}") is not None
        for what in ("money", "tokens", "requests")
        for window in ("day", "month")
    ):
        raise InvalidRequest("A session has no calendar: limit it in all (…-total).", param="scope")
    if plan is not None:
        if scope.startswith(("plan:", "tag:", "session:")):
            raise InvalidRequest("A plan is for a user, key, team, organisation or everybody.", param="plan")
        rules.plan_rule(plan)
    if margin is not None and not scope.startswith("plan:"):
        raise InvalidRequest("A margin belongs to a plan (plan:NAME).", param="margin")
    return Rule(
        hard=rule.hard if soft else after,
        soft=after if soft else rule.soft,
        plan=plan or rule.plan,
        margin=margin or rule.margin,
    )


def standing(store: Store, scope: str, rule: Rule, *, day: str | None = None) -> list[Standing]:
    """Every limit of the rule, with what the scope has used of it on a UTC day (default: today) and in its
    month."""
    day = day or datetime.now(UTC).date().isoformat()
    spans = {"day": day, "month": day[:7], "total": "total"}
    table = schema.counter
    template = scope.startswith("plan:") or scope.endswith(":*")
    with store.reading() as db:
        rows = {row.span: row._mapping for row in db.execute(select(table).where(table.c.scope == scope))}
    found: list[Standing] = []
    for kind, limits in (("hard", rule.hard), ("soft", rule.soft)):
        for name, _, unit, window, most in limits.counted():
            row = rows.get(spans[window])
            spent = int(row[f"spent_{unit}"]) if row is not None else 0
            held = int(row[f"reserved_{unit}"]) if row is not None else 0
            one = Standing(limit=name, kind=kind, most=most)  # type: ignore[arg-type]
            if not template:
                one = msgspec.structs.replace(one, spent=spent, reserved=held, left=most - spent - held)
            found.append(one)
        if limits.concurrency is not None:
            row = rows.get("total")
            running = int(row["reserved_slots"]) if row is not None else 0
            one = Standing(limit="concurrency", kind=kind, most=limits.concurrency)  # type: ignore[arg-type]
            if not template:
                left = limits.concurrency - running
                one = msgspec.structs.replace(one, reserved=running, left=left)
            found.append(one)
        for name in NOT_SOFT:
            most_now = getattr(limits, name)
            if most_now is not None:
                found.append(Standing(limit=name, kind=kind, most=most_now))  # type: ignore[arg-type]
    return found
