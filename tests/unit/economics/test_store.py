"""The ledger on SQLite and on PostgreSQL: exact, append-only, settled once, never overspent."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

from galley.economics.acts import Extension, Grant, QuotaExceeded, RateExceeded, Renewal, Settled
from galley.economics.amount import Amount, AmountTooLarge
from galley.economics.check import check
from galley.economics.ledger import Ledger
from galley.economics.limits import Limits, Rule
from galley.economics.query import charges, lines, spend
from galley.economics.scope import Party
from galley.economics.store import Store
from galley.errors import ConfigError, GalleyError
from tests.ledger import DAY, PRICE, counters, opening, settlement

ALICE = Party(tenant="t", org="acme", team="red", user="alice", key="key_1")


def test_a_request_is_reserved_in_every_scope_and_settled_once(store: Store) -> None:
    (grant,) = store.apply([opening("a", ALICE, Amount(100, 20, 1, 1))])
    assert isinstance(grant, Grant) and grant.txn == "a:reserve"
    assert grant.scopes == ("server:all", "org:acme", "team:red", "user:alice", "key:key_1")
    held = {key: value[1] for key, value in counters(store).items()}
    assert held == {
        (scope, span): Amount(100, 20, 1, 1) for scope in grant.scopes for span in (DAY, DAY[:7], "total")
    }
    first, second = store.apply([settlement("a", Amount(70, 9, 1)), settlement("a", Amount(80, 9, 1))])
    assert (first.first, second.first) == (True, False)
    assert set(counters(store).values()) == {(Amount(70, 9, 1), Amount())}
    found = check(store)
    assert found.good and found.transactions == 2 and found.charges == 1 and found.reservations_open == 0
    assert found.sums["expense"] == "70" and found.sums["payable"] == "-70"


def test_one_scope_that_is_spent_refuses_in_all(store: Store) -> None:
    store.set_rule("team:red", lambda _: Rule(hard=Limits(money_month=150)))
    ok, refused = store.apply([opening(id, ALICE, Amount(100, 20, 1, 1)) for id in "ab"])
    assert isinstance(ok, Grant) and ok.left_pico == 50
    assert isinstance(refused, QuotaExceeded) and refused.status == 429 and not refused.retryable
    assert refused.extra["scope"] == "team:red" and refused.extra["limit"] == "money_month"
    assert refused.extra["reserved"] == "100" and "team:red" in refused.message
    assert set(counters(store).values()) == {(Amount(), Amount(100, 20, 1, 1))}, "nothing of the refused one"
    store.apply([settlement("a", Amount(10, 2, 1))])
    (again,) = store.apply([opening("b", ALICE, Amount(100, 20, 1, 1))])
    assert isinstance(again, Grant) and check(store).good


def test_every_kind_of_limit_refuses_by_name(store: Store) -> None:
    need = Amount(100, 20, 1, 1)
    cases: list[tuple[str, Limits]] = [
        ("money_day", Limits(money_day=99)),
        ("money_total", Limits(money_total=99)),
        ("tokens_day", Limits(tokens_day=19)),
        ("tokens_month", Limits(tokens_month=19)),
        ("requests_total", Limits(requests_total=0)),
        ("concurrency", Limits(concurrency=0)),
    ]
    for name, limits in cases:
        store.set_rule("key:key_1", lambda _, limits=limits: Rule(hard=limits))
        (refused,) = store.apply([opening("a", ALICE, need)])
        assert isinstance(refused, GalleyError) and refused.extra["limit"] == name, (name, refused)
        assert refused.extra["scope"] == "key:key_1"
        store.set_rule("key:key_1", lambda _, limits=limits: Rule(soft=limits))
        (warned,) = store.apply([opening(f"soft {name}", ALICE, need)])
        assert isinstance(warned, Grant) and any(name in words for words in warned.warnings), name
        store.apply([settlement(f"soft {name}", Amount())])
    assert check(store).good


def test_a_sessions_iterations_are_capped_for_good(store: Store) -> None:
    store.set_rule("session:*", lambda _: Rule(hard=Limits(requests_total=2)))
    agent = Party(session="run-1")
    for turn in range(2):
        store.apply([opening(f"{turn}", agent, Amount(0, 5, 1, 1)), settlement(f"{turn}", Amount(0, 5, 1))])
    refused, other = store.apply(
        [opening("2", agent, Amount(0, 5, 1, 1)), opening("3", Party(session="run-2"), Amount(0, 5, 1, 1))]
    )
    assert isinstance(refused, QuotaExceeded) and refused.extra["scope"] == "session:run-1"
    assert isinstance(other, Grant)


def test_rates_refill_and_are_trued_up(store: Store) -> None:
    store.set_rule("user:alice", lambda _: Rule(hard=Limits(requests_minute=2, tokens_minute=60)))
    now = 10**15
    ask = Amount(0, 50, 1, 1)
    (first,) = store.apply([opening("a", ALICE, ask, now_us=now)])
    assert {rate.resource: (rate.limit, rate.remaining) for rate in first.rates} == {
        "requests": (2, 1),
        "tokens": (60, 10),
    }
    (refused,) = store.apply([opening("b", ALICE, ask, now_us=now)])
    assert isinstance(refused, RateExceeded) and refused.type == "tokens" and refused.retryable
    assert refused.retry_after_s == pytest.approx(40.0), "40 of 60 tokens a minute are lacking"
    store.apply([settlement("a", Amount(0, 20, 1), now_us=now)])  # 30 fewer than taken
    (second,) = store.apply([opening("b", ALICE, ask, now_us=now + 10_000_000)])
    assert isinstance(second, Grant), "10 left, 30 given back, 10 flowed in"
    (third,) = store.apply([opening("c", ALICE, Amount(0, 0, 1, 1), now_us=now + 10_000_000)])
    assert isinstance(third, RateExceeded) and third.extra["limit"] == "requests_minute"


def test_plans_are_templates_for_their_users(store: Store) -> None:
    store.set_rule("org:acme", lambda _: Rule(plan="saas"))
    store.set_rule("plan:saas", lambda _: Rule(hard=Limits(money_month=100)))
    grant, refused = store.apply([opening(id, ALICE, Amount(60, 1, 1, 1)) for id in "ab"])
    assert grant.subject.plan == "saas"
    assert refused.extra["scope"] == "user:alice"
    (bob,) = store.apply([opening("c", msgspec.structs.replace(ALICE, user="bob"), Amount(60, 1, 1, 1))])
    assert isinstance(bob, Grant), "a budget for each user"
    store.set_rule("user:alice", lambda _: Rule(hard=Limits(money_month=500)))
    (own,) = store.apply([opening("d", ALICE, Amount(60, 1, 1, 1))])
    assert isinstance(own, Grant), "her own rule stands alone"


def test_another_attempt_extends_the_reservation(store: Store) -> None:
    store.set_rule("user:alice", lambda _: Rule(hard=Limits(money_day=150)))
    store.apply([opening("a", ALICE, Amount(100, 20, 1, 1))])

    def more(number: int, pico: int) -> Extension:
        return Extension(
            id="a",
            number=number,
            need=Amount(pico),
            price=PRICE,
            provider="q",
            model="m",
            local=True,
            now_us=1,
        )

    (ok,) = store.apply([more(1, 40)])
    (again,) = store.apply([more(1, 40)])
    (refused,) = store.apply([more(2, 40)])
    assert isinstance(ok, Grant) and isinstance(again, Grant) and isinstance(refused, QuotaExceeded)
    assert counters(store)["user:alice", "total"] == (Amount(), Amount(140, 20, 1, 1)), "the same one once"
    store.apply([settlement("a", Amount(130, 20, 1))])
    assert check(store).good


def test_what_expired_is_corrected_by_its_own_process(store: Store) -> None:
    store.apply([opening("a", ALICE, Amount(100, 20, 1, 1))])
    (reaped,) = store.apply([settlement("a", Amount(30, 5, 1), outcome="expired")])
    (twice,) = store.apply([settlement("a", Amount(99, 5, 1), outcome="expired")])
    (late,) = store.apply([settlement("a", Amount(50, 9, 1))])
    (later,) = store.apply([settlement("a", Amount(60, 9, 1))])
    assert reaped.first and twice is None
    assert isinstance(late, Settled) and late.adjusted and not later.first
    assert counters(store)["user:alice", DAY] == (Amount(50, 9, 1), Amount())
    (sums,) = spend(store)
    assert (sums.charges, sums.requests, sums.cost_pico, sums.prompt_tokens) == (1, 1, 50, 9)
    assert check(store).good


def test_a_lease_that_was_renewed_is_not_reaped(store: Store) -> None:
    store.apply([opening("a", ALICE, Amount(100, 20, 1, 1), lease_us=10)])
    assert [row["id"] for row in store.open_reservations(lease_before_us=20)] == ["a"]
    renewal = Renewal(id="a", lease_us=30, prompt_tokens=7, cached_tokens=1, completion_tokens=3)
    assert store.apply([renewal]) == [True]
    assert store.apply([settlement("a", Amount(), outcome="expired", stale_us=20)]) == [None]
    assert store.apply([settlement("a", Amount(), outcome="expired", stale_us=40)])[0].first
    assert store.apply([renewal]) == [False]


def test_the_database_itself_refuses_to_forget(store: Store) -> None:
    store.apply([opening("a", ALICE, Amount(100, 20, 1, 1)), settlement("a", Amount(70, 9, 1))])
    for words in (
        "UPDATE line SET pico = 1",
        "DELETE FROM line",
        "UPDATE txn SET day = 'x'",
        "DELETE FROM txn",
        "DELETE FROM charge",
        "UPDATE price_version SET body = 'x'",
        "INSERT INTO line VALUES ('a:settle', 99, 'x', 'x', 1, 0, 0, 0, 'v', 'k')",
        "INSERT INTO line VALUES ('a:settle', 99, 'x', 'y', -1, 0, 0, 0, 'v', 'k')",
        "INSERT INTO line VALUES ('no such', 1, 'x', 'y', 1, 0, 0, 0, 'v', 'k')",
        "INSERT INTO txn VALUES ('a:settle', 'a', 'settle', '2026-11-21', 1, 0)",
    ):
        with pytest.raises((DBAPIError, IntegrityError)), store._engine.connect() as db, db.begin():
            db.execute(text(words))
    assert check(store).good


def test_check_finds_what_was_tampered_with(store: Store) -> None:
    store.apply([opening("a", ALICE, Amount(100, 20, 1, 1)), settlement("a", Amount(70, 9, 1))])
    store.apply([opening("b", ALICE, Amount(100, 20, 1, 1))])
    for words, named in (
        ("UPDATE counter SET spent_pico = spent_pico + 1 WHERE scope = 'user:alice'", "counter user:alice"),
        ("INSERT INTO line VALUES ('a:settle', 99, 'x:y', 'y:x', 1, 0, 0, 0, 'v', 'k')", "a:settle"),
        ("UPDATE reservation SET pico = 1 WHERE id = 'b'", "user:alice: holds"),
        ("UPDATE reservation SET state = 'open' WHERE id = 'a'", "request a"),
    ):
        with store._engine.connect() as db, db.begin() as undone:
            db.execute(text(words))
            from galley.economics import check as module

            found = [*module.unbalanced(db), *module.counters_off(db), *module.reserved_off(db)]
            found += [*module.charges_off(db), *module.prices_missing(db)]
            assert any(named in problem for problem in found), (words, found)
            undone.rollback()
    assert check(store).good


def test_an_amount_beyond_64_bits_is_refused_and_changes_nothing(store: Store) -> None:
    huge = Amount(2**63 - 1, 1, 1, 1)
    first, second = store.apply([opening("a", ALICE, huge), opening("b", ALICE, huge)])
    assert isinstance(first, Grant) and isinstance(second, AmountTooLarge)
    assert counters(store)["server:all", DAY][1] == huge and check(store).good


def test_spending_by_every_group_adds_up(store: Store) -> None:
    store.set_rule("tag:project=x", lambda _: Rule(soft=Limits(money_month=10**6)))
    for number in range(6):
        party = msgspec.structs.replace(ALICE, user=f"u{number % 2}", tags=("project=x", "env=prod"))
        party = party if number else ALICE
        store.apply([opening(f"{number}", party, Amount(100, 20, 1, 1))])
        store.apply([settlement(f"{number}", Amount(10 + number, 9, 1))])
    total = sum(10 + number for number in range(6))
    for by in ("day", "month", "user", "model", "provider", "tenant", "org", "key", "api", "outcome"):
        assert sum(row.cost_pico for row in spend(store, [by])) == total, by
    users = {row.key[0]: row.cost_pico for row in spend(store, ["user"])}
    assert users == {"alice": 10, "u0": 12 + 14, "u1": 11 + 13 + 15}
    tags = {row.key[0]: row.cost_pico for row in spend(store, ["tag"])}
    assert tags == {None: 10, "env=prod": total - 10, "project=x": total - 10}
    assert counters(store)["tag:project=x", DAY][0].pico == total - 10
    assert not any(scope == "tag:env=prod" for scope, _ in counters(store)), "only tags with a limit count"
    assert [row["cost_pico"] for row in charges(store, since=DAY)] == [10 + number for number in range(6)]
    assert spend(store, until=DAY) == []
    assert {line["kind"] for line in lines(store, "0")} == {"hold", "release", "spend", "input", "revenue"}
    assert all(line["price_version"] for line in lines(store, "0"))
    with pytest.raises(ValueError, match="cannot group by colour"):
        spend(store, ["colour"])


def test_two_hundred_clients_on_a_nearly_spent_budget_overspend_by_nothing(
    opened: Callable[[], Store], tmp_path: Path
) -> None:
    stores = [opened() for _ in range(4)]
    most, each = 1000, 30
    stores[0].set_rule("org:acme", lambda _: Rule(hard=Limits(money_day=most)))
    stores[0].apply([opening("before", ALICE, Amount(700, 1, 1, 1)), settlement("before", Amount(700, 1, 1))])
    outcomes: list[object] = []
    seen: list[int] = []

    def process(number: int, store: Store) -> None:
        ledger = Ledger(store, tmp_path / f"boards{number}", tell=lambda line: None)

        async def client(name: str) -> None:
            try:
                await ledger.reserve(opening(name, ALICE, Amount(each, 2, 1, 1), owner=ledger.board.owner))
            except QuotaExceeded as refused:
                outcomes.append(refused)
                return
            outcomes.append(name)
            await asyncio.wrap_future(ledger.settle(settlement(name, Amount(each, 2, 1)), lambda: None))

        async def clients() -> None:
            await asyncio.gather(*(client(f"{number}.{turn}") for turn in range(50)))
            await ledger.settled()

        asyncio.run(clients())
        seen.append(ledger.groups)
        ledger.close()

    threads = [threading.Thread(target=process, args=pair) for pair in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    granted = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(outcomes) == 200 and len(granted) == (most - 700) // each == 10
    assert counters(stores[0])["org:acme", DAY] == (Amount(1000, 21, 11), Amount())
    assert check(stores[0]).good and len(seen) == 4


def test_a_url_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    for url in ("mysql://x/y", "nonsense", "oracle+nothing://x"):
        with pytest.raises(ConfigError, match=r"ledger\.url"):
            Store(url)
    with pytest.raises(GalleyError, match="cannot be used"):
        Store(f"sqlite:////proc/none/{tmp_path.name}.db", tries_s=0.1).refresh()


def test_a_newer_schema_is_refused(store: Store, opened: Callable[[], Store]) -> None:
    store.refresh()
    with store._engine.connect().execution_options(writing=True) as db, db.begin():
        db.execute(text("UPDATE meta SET value = 99 WHERE name = 'version'"))
    with pytest.raises(GalleyError, match="schema version 99"):
        opened().refresh()
