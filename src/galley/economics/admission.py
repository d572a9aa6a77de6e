"""The decision: do all limits of all scopes of a request cover its worst case? Pure arithmetic, no store."""

from collections.abc import Mapping, Sequence

import msgspec

from galley.economics.acts import Rate, RateExceeded, quota_exceeded
from galley.economics.amount import Amount, dollars
from galley.economics.bucket import MINUTE_US, Bucket
from galley.economics.limits import Resource, Rule, Rules
from galley.economics.scope import resets_s

__all__ = ["Gauge", "Verdict", "admit"]


class Gauge(msgspec.Struct):
    """What a scope has spent and holds over one window."""

    spent: Amount
    reserved: Amount
    dirty: bool = False

    def columns(self) -> dict[str, int]:
        """By column of the counter table."""
        return {f"spent_{unit}": value for unit, value in self.spent.parts().items()} | {
            f"reserved_{unit}": value for unit, value in self.reserved.parts().items()
        }


class Verdict(msgspec.Struct, frozen=True):
    """Let in. ``buckets`` are the rates after taking its share, not yet stored."""

    warnings: tuple[str, ...]
    rates: tuple[Rate, ...]
    buckets: dict[tuple[str, str], Bucket]
    left_pico: int | None


def admit(
    rules: Rules,
    scopes: Sequence[str],
    plan: str | None,
    need: Amount,
    *,
    rate_tokens: int,
    gauges: Mapping[tuple[str, str], Gauge],
    buckets: Mapping[tuple[str, str], Bucket],
    day: str,
    now_us: int,
    enforce: bool,
) -> Verdict:
    """All or nothing, O(scopes). Changes nothing given.

    Args:
        need: worst case.
        rate_tokens: likely tokens, taken from the rates of a minute; settling corrects them.
        enforce: False lets it in whatever is left, and still takes its share.

    Raises QuotaExceeded, RateExceeded naming the scope.
    """
    span = {"day": day, "month": day[:7], "total": "total"}
    warnings: list[str] = []
    rates: list[Rate] = []
    taken: dict[tuple[str, str], Bucket] = {}
    left: int | None = None
    for scope in scopes:
        rule = rules.of(scope, plan)
        if rule is None:
            continue
        for name, resource, unit, window, most in rule.hard.counted():
            gauge = gauges.get((scope, span[window]))
            if gauge is None:  # a session has no calendar
                continue
            spent, held = getattr(gauge.spent, unit), getattr(gauge.reserved, unit)
            asked = getattr(need, unit)
            if enforce and asked and spent + held + asked > most:
                raise quota_exceeded(
                    scope=scope,
                    name=name,
                    most=most,
                    spent=spent,
                    held=held,
                    asked=asked,
                    shown=money if resource == "money" else str,
                    resets_s=resets_s(window, now_us / 1e6),
                )
            rest = most - spent - held - asked
            if resource == "money":
                left = rest if left is None else min(left, rest)
            else:
                until = resets_s(window, now_us / 1e6)
                rates.append(rate(resource, scope, most, rest, until or 0.0))
        warnings += soft(rule, scope, need, gauges, span)
        _concurrency(rule, scope, need, gauges, enforce=enforce)
        for resource, units in (("requests", need.requests), ("tokens", rate_tokens)):
            per_minute = getattr(rule.hard, f"{resource}_minute")
            if per_minute is None or not units:
                continue
            bucket = _take(
                buckets.get((scope, resource)),
                scope,
                resource,
                per_minute,
                units,
                now_us=now_us,
                enforce=enforce,
            )
            taken[scope, resource] = bucket
            full_us = -(-(per_minute * MINUTE_US - bucket.level) // per_minute)
            rates.append(rate(resource, scope, per_minute, bucket.remaining(), full_us / 1e6))
    return Verdict(tuple(warnings), tightest(rates), taken, left)


def _concurrency(
    rule: Rule, scope: str, need: Amount, gauges: Mapping[tuple[str, str], Gauge], *, enforce: bool
) -> None:
    most = rule.hard.concurrency
    running = gauges[scope, "total"].reserved.slots
    if enforce and most is not None and need.slots and running + need.slots > most:
        raise RateExceeded(
            f"{scope} may have {most} requests under way, and has {running}.",
            retry_after_s=1.0,
            extra={"scope": scope, "limit": "concurrency", "most": str(most)},
        )


def _take(
    known: Bucket | None,
    scope: str,
    resource: str,
    per_minute: int,
    units: int,
    *,
    now_us: int,
    enforce: bool,
) -> Bucket:
    """The bucket after its share; more than a minute's worth takes the whole of it, and the rest when
    settled."""
    if known is None:
        bucket = Bucket.full(per_minute, now_us)
    else:
        bucket = Bucket(per_minute, known.level, known.at_us)
        bucket.refill(now_us)
    wanted = min(units, per_minute)
    waits = bucket.waits_us(wanted)
    if enforce and waits > 0:
        error = RateExceeded(
            f"{scope} may have {per_minute} {resource} a minute; {bucket.remaining()} are left now and "
            f"{wanted} are needed.",
            retry_after_s=max(0.001, waits / 1e6),
            extra={"scope": scope, "limit": f"{resource}_minute", "most": str(per_minute)},
        )
        error.type = resource
        full_us = -(-(per_minute * MINUTE_US - bucket.level) // per_minute)
        error.rates = (rate(resource, scope, per_minute, bucket.remaining(), full_us / 1e6),)
        raise error
    bucket.take(wanted)
    return bucket


def soft(
    rule: Rule, scope: str, need: Amount, gauges: Mapping[tuple[str, str], Gauge], span: Mapping[str, str]
) -> list[str]:
    """Soft limits that worst cases cross, in words."""
    found = []
    for name, resource, unit, window, most in rule.soft.counted():
        gauge = gauges.get((scope, span[window]))
        if gauge is None:
            continue
        used = getattr(gauge.spent, unit) + getattr(gauge.reserved, unit) + getattr(need, unit)
        if used > most:
            show = money if resource == "money" else str
            found.append(f"{scope}: {name} {show(used)} of {show(most)}")
    running = gauges[scope, "total"].reserved.slots + need.slots
    if rule.soft.concurrency is not None and running > rule.soft.concurrency:
        found.append(f"{scope}: concurrency {running} of {rule.soft.concurrency}")
    return found


def rate(resource: Resource | str, scope: str, limit: int, remaining: int, reset_s: float) -> Rate:
    """For the headers."""
    kind = "tokens" if resource == "tokens" else "requests"
    return Rate(resource=kind, scope=scope, limit=limit, remaining=max(0, remaining), reset_s=reset_s)  # type: ignore[arg-type]


def tightest(rates: Sequence[Rate]) -> tuple[Rate, ...]:
    """Of each resource the one with the least left."""
    least: dict[str, Rate] = {}
    for each in rates:
        if each.resource not in least or each.remaining < least[each.resource].remaining:
            least[each.resource] = each
    return tuple(least.values())


def money(pico: int) -> str:
    """In dollars, to the last digit."""
    return f"${dollars(pico)}"
