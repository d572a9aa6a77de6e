"""Any interleaving of reserve, extend, stream, renew, settle, cancel, crash and expire by 1 to 8 workers.

A model in plain integers says what each step must do: who is let in (committed + reserved <= budget, to the
last digit), what the counters hold, and what is owed at the end. Both databases run the same machine.
"""

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from galley.economics.acts import Extension, Grant, QuotaExceeded, RateExceeded, Renewal
from galley.economics.amount import ZERO, Amount
from galley.economics.board import Progress
from galley.economics.check import check, replay
from galley.economics.limits import Limits, Rule
from galley.economics.reaper import settlement as reaped
from galley.economics.scope import Party, windows
from galley.economics.store import Store
from tests.ledger import DAY, PRICE, counters, fresh_database, opening, settlement
from tests.postgres import missing, postgres

PARTIES = [
    Party(tenant=tenant, org=org, user=user, key=key, session=session)
    for tenant, org, user, key, session in (
        ("t", "acme", "alice", "k1", None),
        ("t", "acme", "bob", "k1", "run"),
        ("u", None, "alice", "k2", None),
        ("u", "zeta", None, None, "run"),
    )
]
SCOPES = ["server:all", "org:acme", "user:alice", "key:k1", "session:run"]
DAYS = [DAY, "2026-11-22", "2026-12-01"]
LIMITS = ["money_day", "money_month", "money_total", "tokens_day", "requests_total", "concurrency"]


class LedgerMachine(RuleBasedStateMachine):
    url = ""

    @initialize(workers=st.integers(1, 8))
    def begin(self, workers: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        where = self.url or f"sqlite:///{self.folder / 'ledger.db'}"
        self.url_now = fresh_database(where) if self.url else where
        self.stores = [Store(self.url_now, tries_s=60.0, busy_s=30.0) for _ in range(workers)]
        self.names = itertools.count()
        self.rules: dict[str, Limits] = {}
        self.spent: dict[tuple[str, str], Amount] = {}
        self.held: dict[tuple[str, str], Amount] = {}
        self.open: dict[str, dict] = {}
        self.orphans: dict[str, dict] = {}
        self.expired: dict[str, dict] = {}
        self.ended: list[str] = []

    def store(self, worker: int) -> Store:
        return self.stores[worker % len(self.stores)]

    def keys(self, one: dict) -> Iterator[tuple[str, str]]:
        for scope in one["scopes"]:
            for span in windows(scope, one["day"]):
                yield scope, span

    def fits(self, scopes: tuple[str, ...], day: str, need: Amount) -> bool:
        for scope in scopes:
            limits = self.rules.get(scope, Limits())
            for _, _, unit, window, most in limits.counted():
                span = {"day": day, "month": day[:7], "total": "total"}[window]
                if span not in windows(scope, day):
                    continue
                used = self.spent.get((scope, span), ZERO) + self.held.get((scope, span), ZERO)
                asked = getattr(need, unit)
                if asked and getattr(used, unit) + asked > most:
                    return False
            running = self.held.get((scope, "total"), ZERO).slots
            if limits.concurrency is not None and need.slots and running + 1 > limits.concurrency:
                return False
        return True

    def hold(self, one: dict, amount: Amount) -> None:
        for key in self.keys(one):
            self.held[key] = self.held.get(key, ZERO) + amount

    def spend(self, one: dict, amount: Amount) -> None:
        for key in self.keys(one):
            self.spent[key] = self.spent.get(key, ZERO) + amount
            self.held[key] = self.held[key] - one["need"]

    @rule(scope=st.sampled_from(SCOPES), name=st.sampled_from(LIMITS), most=st.integers(0, 400),
          worker=st.integers(0, 7))  # fmt: skip
    def limit(self, scope: str, name: str, most: int, worker: int) -> None:
        most = most // 40 if name in ("requests_total", "concurrency") else most
        limits = Limits(**{name: most})
        self.store(worker).set_rule(scope, lambda _: Rule(hard=limits))
        self.rules[scope] = limits

    @rule(scope=st.sampled_from(SCOPES), worker=st.integers(0, 7))
    def unlimit(self, scope: str, worker: int) -> None:
        self.store(worker).set_rule(scope, lambda _: None)
        self.rules.pop(scope, None)

    @rule(asks=st.lists(st.tuples(st.sampled_from(PARTIES), st.integers(0, 120), st.integers(1, 60)),
                        min_size=1, max_size=4),
          day=st.sampled_from(DAYS), worker=st.integers(0, 7))  # fmt: skip
    def reserve(self, asks: list[tuple[Party, int, int]], day: str, worker: int) -> None:
        acts = [
            opening(f"r{next(self.names)}", party, Amount(pico, tokens, 1, 1), day=day)
            for party, pico, tokens in asks
        ]
        results = self.store(worker).apply(acts)
        for act, result in zip(acts, results, strict=True):
            scopes = act.subject.party.scopes()
            if self.fits(scopes, day, act.need):
                assert isinstance(result, Grant), result
                one = {"scopes": scopes, "day": day, "need": act.need, "worker": worker}
                one |= {"out": 0, "renewed": 0, "extends": 0}
                self.open[act.id] = one
                self.hold(one, act.need)
            else:
                assert isinstance(result, QuotaExceeded | RateExceeded), result

    @precondition(lambda self: self.open)
    @rule(data=st.data(), more=st.integers(0, 100), worker=st.integers(0, 7))
    def extend(self, data, more: int, worker: int) -> None:
        id = data.draw(st.sampled_from(sorted(self.open)))
        one = self.open[id]
        number = one["extends"] + 1
        act = Extension(
            id=id,
            number=number,
            need=Amount(more),
            price=PRICE,
            provider="q",
            model="m",
            local=True,
            now_us=1,
        )
        (result,) = self.store(worker).apply([act])
        assert isinstance(result, Grant) == self.fits(one["scopes"], one["day"], Amount(more)), result
        if isinstance(result, Grant):
            one["extends"] = number
            self.hold(one, Amount(more))
            one["need"] += Amount(more)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), tokens=st.integers(1, 9))
    def stream(self, data, tokens: int) -> None:
        self.open[data.draw(st.sampled_from(sorted(self.open)))]["out"] += tokens

    @precondition(lambda self: self.open)
    @rule(data=st.data(), worker=st.integers(0, 7))
    def renew(self, data, worker: int) -> None:
        id = data.draw(st.sampled_from(sorted(self.open)))
        out = self.open[id]["renewed"] = self.open[id]["out"]
        act = Renewal(id=id, lease_us=1 << 60, prompt_tokens=1, cached_tokens=0, completion_tokens=out)
        assert self.store(worker).apply([act]) == [True]

    @precondition(lambda self: self.open)
    @rule(data=st.data(), pico=st.integers(0, 150), tokens=st.integers(0, 70), twice=st.booleans(),
          worker=st.integers(0, 7))  # fmt: skip
    def settle(self, data, pico: int, tokens: int, twice: bool, worker: int) -> None:
        """Also more than was reserved, which an upstream's bill may be; and a cancelled one's nothing."""
        id = data.draw(st.sampled_from(sorted(self.open)))
        spent = Amount(pico, tokens, int(tokens > 0))
        acts = [settlement(id, spent)] * (1 + twice)
        results = self.store(worker).apply(acts)
        assert [result.first for result in results] == [True, False][: 1 + twice]
        one = self.open.pop(id)
        self.spend(one, spent)
        self.ended.append(id)

    @precondition(lambda self: self.open)
    @rule(worker=st.integers(0, 7), board=st.booleans())
    def crash(self, worker: int, board: bool) -> None:
        """A worker dies with what it had open; its board may have been on another machine."""
        for id in [id for id, one in self.open.items() if one["worker"] == worker]:
            self.orphans[id] = self.open.pop(id) | {"board": board}

    @precondition(lambda self: self.orphans)
    @rule(worker=st.integers(0, 7))
    def expire(self, worker: int) -> None:
        store = self.store(worker)
        acts = []
        for row in store.open_reservations():
            one = self.orphans.get(row["id"])
            if one is None:
                continue
            seen = Progress(1, 0, 0, one["out"]) if one["board"] else None
            acts.append(reaped(row, seen, 5, stale_us=None))
        for act, result in zip(acts, store.apply(acts), strict=True):
            assert result.first
            one = self.orphans.pop(act.id)
            known = one["out"] if one["board"] else one["renewed"]
            assert act.spent.pico == PRICE.price(act.usage) and act.usage.completion_tokens == known
            self.spend(one, act.spent)
            self.expired[act.id] = one | {"billed": act.spent}
        assert not self.orphans

    @precondition(lambda self: self.expired)
    @rule(data=st.data(), pico=st.integers(0, 150), tokens=st.integers(1, 70), worker=st.integers(0, 7))
    def come_back(self, data, pico: int, tokens: int, worker: int) -> None:
        """The process was only slow."""
        id = data.draw(st.sampled_from(sorted(self.expired)))
        one, spent = self.expired.pop(id), Amount(pico, tokens, 1)
        (result,) = self.store(worker).apply([settlement(id, spent)])
        assert result.adjusted
        for key in self.keys(one):
            self.spent[key] = self.spent[key] + spent - one["billed"]
        self.ended.append(id)

    @precondition(lambda self: self.ended)
    @rule(data=st.data(), worker=st.integers(0, 7))
    def settle_again(self, data, worker: int) -> None:
        id = data.draw(st.sampled_from(self.ended))
        (result,) = self.store(worker).apply([settlement(id, Amount(999, 99, 1))])
        assert not result.first

    @invariant()
    def counters_are_the_models(self) -> None:
        if not hasattr(self, "stores"):
            return
        found = {key: sums for key, sums in counters(self.stores[0]).items() if sums != (ZERO, ZERO)}
        keys = {*self.spent, *self.held}
        wanted = {key: (self.spent.get(key, ZERO), self.held.get(key, ZERO)) for key in keys}
        assert found == {key: sums for key, sums in wanted.items() if sums != (ZERO, ZERO)}

    def teardown(self) -> None:
        if not hasattr(self, "stores"):
            return
        self.orphans |= {id: one | {"board": True} for id, one in self.open.items()}
        self.open = {}
        if self.orphans:
            self.expire(0)
        store = self.stores[0]
        audit = check(store)
        assert audit.good, audit.problems
        assert audit.reservations_open == 0 and audit.charges >= len(self.ended)
        sums = counters(store)
        assert all(held == ZERO for _, held in sums.values()), "after quiescence nothing is reserved"
        with store.reading() as db:
            rebuilt = replay(db)
        assert {key: value for key, value in rebuilt.items() if value != (ZERO, ZERO)} == {
            key: value for key, value in sums.items() if value != (ZERO, ZERO)
        }
        for each in self.stores:
            each.close()
        shutil.rmtree(self.folder)


def run(machine: type[LedgerMachine], examples: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples * int(os.environ.get("SOAK", "1")),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_LedgerMachine_on_sqlite() -> None:
    run(LedgerMachine, 12)


def test_LedgerMachine_on_postgresql() -> None:
    why = missing()
    if why is not None:
        pytest.skip(why)
    with postgres() as server:
        run(type("OnPostgres", (LedgerMachine,), {"url": server}), 6)
