"""The rules of the ledger: what opening, extending, renewing and settling change."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from galley.economics.acts import (
    Act,
    Entry,
    Extension,
    Grant,
    Opening,
    Renewal,
    Settled,
    Settlement,
    Subject,
)
from galley.economics.admission import admit
from galley.economics.amount import Amount
from galley.economics.limits import Rules
from galley.economics.page import Page, Row
from galley.economics.scope import windows
from galley.errors import GalleyError

__all__ = ["Book"]


class Book:
    """Applies acts to a page.

    Args:
        rules: in force.
    """

    def __init__(self, page: Page, rules: Rules) -> None:
        self._page = page
        self._rules = rules

    def apply(self, acts: Sequence[Act]) -> list[Any]:
        """The outcome of each, in order: Grant, Settled, bool (of a renewal) or None; a GalleyError for one
        that is refused, which changes nothing. O(acts * scopes)."""
        self._load(acts)
        results: list[Any] = []
        for act in acts:
            try:
                results.append(self._one(act))
            except GalleyError as refusal:
                results.append(refusal)
        self._page.write()
        return results

    def _load(self, acts: Sequence[Act]) -> None:
        page = self._page
        page.lock_reservations(act.id for act in acts)
        keys: set[tuple[str, str]] = set()
        rates: set[tuple[str, str]] = set()
        for act in acts:
            row = page.reservations.get(act.id)
            if row is not None:
                scopes, day = msgspec.json.decode(row["scopes"]), row["day"]
            else:
                opening = act if isinstance(act, Opening) else getattr(act, "opening", None)
                if opening is None:
                    continue
                scopes, day = opening.subject.party.scopes(self._rules.tags), opening.day
            keys.update((scope, span) for scope in scopes for span in windows(scope, day))
            rates.update((scope, resource) for scope in scopes for resource in ("requests", "tokens"))
        page.lock_gauges(sorted(keys))
        page.load_buckets(sorted(key for key in rates if self._rules.rated(*key)))

    def _one(self, act: Act) -> Any:
        if isinstance(act, Opening):
            return self._open(act)
        if isinstance(act, Extension):
            return self._extend(act)
        if isinstance(act, Renewal):
            return self._renew(act)
        return self._settle(act)

    def _open(self, act: Opening) -> Grant:
        scopes = act.subject.party.scopes(self._rules.tags)
        plan = self._rules.plan(scopes)
        subject = msgspec.structs.replace(act.subject, plan=plan, margin=self._rules.margin(plan))
        grant = Grant(txn=f"{act.id}:reserve", subject=subject, scopes=scopes)
        if act.id in self._page.reservations:  # a commit whose answer was lost: it is done already
            return grant
        act.need.checked()
        verdict = admit(
            self._rules,
            scopes,
            plan,
            act.need,
            rate_tokens=act.rate_tokens,
            gauges=self._page.gauges,
            buckets=self._page.buckets,
            day=act.day,
            now_us=act.now_us,
            enforce=act.enforce,
        )
        self._page.hold(scopes, act.day, act.need)
        for key, bucket in verdict.buckets.items():
            self._page.set_bucket(key, bucket)
        self._page.add_reservation(
            {
                "id": act.id,
                "state": "open",
                "day": act.day,
                "opened_us": act.now_us,
                "lease_us": act.lease_us,
                "owner": act.owner,
                "scopes": msgspec.json.encode(scopes).decode(),
                **act.need.parts(),
                "rate_tokens": act.rate_tokens,
                "extends": 0,
                "prompt_tokens": act.prompt_tokens,
                "cached_tokens": 0,
                "completion_tokens": 0,
                "price": msgspec.json.encode(act.price).decode(),
                "sunk": "[]",
                "facts": msgspec.json.encode(subject).decode(),
            }
        )
        lines = moves(scopes, act.need, "budget", "reserved")
        self._page.post(act.id, "reserve", now_us=act.now_us, day=act.day, lines=lines, price=act.price)
        return msgspec.structs.replace(
            grant, warnings=verdict.warnings, rates=verdict.rates, left_pico=verdict.left_pico
        )

    def _extend(self, act: Extension) -> Grant:
        row = self._page.reservations.get(act.id)
        if row is None or row["state"] != "open":
            raise GalleyError(f"{act.id} holds no reservation to extend.", code="reservation_gone")
        scopes = tuple(msgspec.json.decode(row["scopes"]))
        subject = msgspec.json.decode(row["facts"], type=Subject)
        subject = msgspec.structs.replace(subject, provider=act.provider, model=act.model, local=act.local)
        grant = Grant(txn=f"{act.id}:extend:{act.number}", subject=subject, scopes=scopes)
        if row["extends"] >= act.number:
            return grant
        (held(row) + act.need).checked()
        verdict = admit(
            self._rules,
            scopes,
            subject.plan,
            act.need,
            rate_tokens=0,
            gauges=self._page.gauges,
            buckets=self._page.buckets,
            day=row["day"],
            now_us=act.now_us,
            enforce=True,
        )
        self._page.hold(scopes, row["day"], act.need)
        row.update((held(row) + act.need).parts())
        row["extends"] = act.number
        row["price"] = msgspec.json.encode(act.price).decode()
        row["facts"] = msgspec.json.encode(subject).decode()
        row["sunk"] = msgspec.json.encode(act.sunk).decode()
        self._page.touch(act.id)
        lines = moves(scopes, act.need, "budget", "reserved")
        kind = f"extend:{act.number}"
        self._page.post(act.id, kind, now_us=act.now_us, day=row["day"], lines=lines, price=act.price)
        return msgspec.structs.replace(grant, warnings=verdict.warnings, left_pico=verdict.left_pico)

    def _renew(self, act: Renewal) -> bool:
        row = self._page.reservations.get(act.id)
        if row is None or row["state"] != "open":
            return False
        for name in ("lease_us", "prompt_tokens", "cached_tokens", "completion_tokens"):
            row[name] = max(row[name], getattr(act, name))
        self._page.touch(act.id)
        return True

    def _settle(self, act: Settlement) -> Settled | None:
        row = self._page.reservations.get(act.id)
        act.spent.checked()
        if row is None:
            if act.opening is None:
                return None
            self._open(msgspec.structs.replace(act.opening, enforce=False))
            row = self._page.reservations[act.id]
        if row["state"] == "settled":
            return Settled(txn=f"{act.id}:settle", first=False)
        stale = act.stale_us is None or row["lease_us"] < act.stale_us
        if act.outcome == "expired" and (row["state"] == "expired" or not stale):
            return None
        scopes, day = tuple(msgspec.json.decode(row["scopes"])), row["day"]
        subject = msgspec.json.decode(row["facts"], type=Subject)
        for price in act.prices:
            self._page.keep(price)
        if row["state"] == "expired":
            return self._adjust(act, row, scopes, subject)
        release = held(row)
        self._page.spend(scopes, day, act.spent, release)
        self._true_up(scopes, subject.plan, row["rate_tokens"], act)
        lines = moves(scopes, release, "reserved", "budget") + moves(scopes, act.spent, "budget", "spent")
        lines += [entry_line(entry) for entry in act.entries if entry.pico]
        self._page.post(act.id, "settle", now_us=act.now_us, day=day, lines=lines, price=act.price)
        row["state"] = act.outcome
        self._page.touch(act.id)
        self._page.charge(charge_row(act, subject, day))
        return Settled(txn=f"{act.id}:settle")

    def _true_up(self, scopes: Iterable[str], plan: str | None, taken: int, act: Settlement) -> None:
        """Rates of tokens were taken by estimate: give back, or go into debt."""
        for scope in scopes:
            bucket, rule = self._page.buckets.get((scope, "tokens")), self._rules.of(scope, plan)
            per_minute = rule.hard.tokens_minute if rule is not None else None
            if bucket is None or per_minute is None:
                continue
            bucket.per_minute = per_minute
            bucket.refill(act.now_us)
            bucket.take(act.spent.tokens - min(taken, per_minute))
            self._page.set_bucket((scope, "tokens"), bucket)

    def _adjust(self, act: Settlement, row: Row, scopes: tuple[str, ...], subject: Subject) -> Settled:
        """The process was only slow, and a reaper had billed what it knew: post the difference."""
        before, day = self._page.charged(act.id), row["day"]
        tokens = before["prompt_tokens"] + before["completion_tokens"]
        delta = act.spent - Amount(before["cost_pico"], tokens, before["requests"])
        self._page.spend(scopes, day, delta, Amount())
        up = Amount(*(max(0, part) for part in delta.parts().values()))
        down = Amount(*(max(0, -part) for part in delta.parts().values()))
        lines = moves(scopes, up, "budget", "spent") + moves(scopes, down, "spent", "budget")
        lines += [reversal(line) for line in self._page.money_lines(f"{act.id}:settle")]
        lines += [entry_line(entry) for entry in act.entries if entry.pico]
        self._page.post(act.id, "adjust", now_us=act.now_us, day=day, lines=lines, price=act.price)
        row["state"] = "settled"
        self._page.touch(act.id)
        self._page.charge(charge_row(act, subject, day, before))
        return Settled(txn=f"{act.id}:adjust", adjusted=True)


def held(row: Mapping[str, Any]) -> Amount:
    """What a reservation holds."""
    return Amount(row["pico"], row["tokens"], row["requests"], row["slots"])


def move(source: str, target: str, amount: Amount, kind: str) -> Row:
    """A line."""
    return {"source": source, "target": target, **amount.parts(), "kind": kind}


def moves(scopes: Iterable[str], amount: Amount, source: str, target: str) -> list[Row]:
    """The same line in every scope; none for nothing."""
    if not amount:
        return []
    kind = {"reserved": "hold", "budget": "release", "spent": "spend"}[target]
    return [move(f"{source}:{scope}", f"{target}:{scope}", amount, kind) for scope in scopes]


def entry_line(entry: Entry) -> Row:
    """The line of an entry."""
    return {
        **move(entry.source, entry.target, Amount(entry.pico), entry.kind),
        "price_version": entry.version,
    }


def reversal(line: Row) -> Row:
    """The line that takes another one back."""
    back = move(line["target"], line["source"], Amount(line["pico"]), f"reversal of {line['kind']}")
    return {**back, "price_version": line["price_version"]}


def charge_row(act: Settlement, subject: Subject, day: str, before: Row | None = None) -> Row:
    """What the reports add up: sums of a settlement, or, after ``before``, the differences."""

    def total(prefix: str) -> int:
        return sum(entry.pico for entry in act.entries if entry.target.startswith(prefix))

    usage, party = act.usage, subject.party
    sums = {
        "requests": act.spent.requests,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "completion_tokens": usage.completion_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "cost_pico": total("expense:"),
        "revenue_pico": total("receivable:"),
        **{
            f"{what}_saved_pico": total(f"saving:{what}")
            for what in ("cache", "route", "batch", "speculation")
        },
    }
    if before is not None:
        sums = {name: value - before[name] for name, value in sums.items()}
    return {
        "reservation": act.id,
        "n": 0 if before is None else 1,
        "txn": f"{act.id}:{'settle' if before is None else 'adjust'}",
        "day": day,
        "at_us": act.now_us,
        "outcome": act.outcome if act.outcome == "expired" else act.status,
        "tenant": party.tenant,
        "org": party.org,
        "team": party.team,
        "user": party.user or party.tenant,
        "key": party.key,
        "session": party.session,
        "plan": subject.plan,
        "api": subject.api,
        "model": act.model,
        "provider": act.provider,
        "tags": msgspec.json.encode(party.tags).decode(),
        **sums,
        "price_version": act.price.id,
        "estimated": int(act.estimated),
    }
