"""Money at the endpoint: every API is metered at one point, limits refuse by name, receipts have the cost."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from galley.economics.check import check
from galley.economics.ledger import Ledger
from galley.economics.limits import Limits, Rule
from galley.economics.price import own_price
from galley.economics.query import charges, spend
from galley.economics.store import Store
from galley.errors import GalleyError
from tests.ledger import counters
from tests.unit.endpoint.conftest import Desk
from tests.unit.endpoint.fake import FAULT, FakeProvider

PRICE = own_price("input=0.10,output=0.40,cached=0.01,batch=0.5")
PROMPT, OUTPUT = 8, 3
COST = PROMPT * 100_000 + OUTPUT * 400_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'ledger.db'}", busy_s=30.0)
    yield store
    store.close()


@pytest.fixture
def open_bank(open_desk: Callable[..., Desk], tmp_path: Path) -> Callable[..., Desk]:
    """A desk whose every request is entered in a ledger, local tokens priced."""

    def make(provider: FakeProvider | None = None, **options: object) -> Desk:
        ledger = Ledger(
            Store(f"sqlite:///{tmp_path / 'ledger.db'}", busy_s=30.0),
            tmp_path / "boards",
            tell=lambda line: None,
            **options.pop("ledger", {}),
        )
        return open_desk(provider or FakeProvider(), ledger=ledger, own=PRICE, **options)

    return make


async def test_every_api_is_metered_at_one_point(open_bank: Callable[..., Desk], store: Store) -> None:
    desk = open_bank()
    asked = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
        "/v1/completions": {"prompt": "hi"},
        "/v1/responses": {"input": "hi"},
        "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    }
    for path, body in asked.items():
        for stream in (False, True):
            answer = await desk.http.post(path, json={"model": "fake-1b", "stream": stream, **body})
            assert answer.status_code == 200, answer.text
            receipt = await desk.receipt(answer)
            money = receipt["money"]
            assert money["txn"] == receipt["id"] + ":settle" and money["revenue_pico"] == money["cost_pico"]
            assert sum(line["pico"] for line in receipt["price_lines"]) == money["cost_pico"] > 0
            if not stream:
                assert float(answer.headers["x-galley-cost-usd"]) == pytest.approx(money["cost_pico"] / 1e12)
    await desk.ledger.settled()
    apis = {row.key[0]: row.charges for row in spend(store, ["api"])}
    assert apis == {"chat.completions": 2, "completions": 2, "responses": 2, "messages": 2}
    (total,) = spend(store)
    receipts = (await desk.http.get("/v1/receipts")).json()["data"]
    assert total.cost_pico == sum(receipt["money"]["cost_pico"] for receipt in receipts)
    assert check(store).good and check(store).reservations_open == 0


async def test_a_spent_budget_is_429_insufficient_quota_naming_the_scope(
    open_bank: Callable[..., Desk], store: Store
) -> None:
    store.set_rule("user:alice", lambda _: Rule(hard=Limits(money_month=2 * COST)))
    desk = open_bank()
    for _ in range(2):
        answer = await desk.chat(user="alice", max_tokens=OUTPUT)
        assert answer.status_code == 200
    refused = await desk.chat(user="alice", max_tokens=OUTPUT)
    assert refused.status_code == 429
    assert refused.headers["x-should-retry"] == "false"
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert error["scope"] == "user:alice" and error["limit"] == "money_month"
    assert "user:alice" in error["message"] and error["spent"] == str(2 * COST)
    assert len(desk.provider.seen) == 3 and desk.provider.steps == 2 * OUTPUT, "nothing was run"
    assert (await desk.receipt(refused))["error"]["code"] == "insufficient_quota"
    other = await desk.chat(user="bob", max_tokens=OUTPUT)
    assert other.status_code == 200
    client = openai.AsyncOpenAI(api_key="x", base_url="http://127.0.0.1/v1", http_client=desk.http)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(
            model="fake-1b", messages=[{"role": "user", "content": "hi"}], user="alice", max_tokens=OUTPUT
        )
    assert caught.value.code == "insufficient_quota"
    assert len(desk.provider.seen) == 5, "asked once: the client does not try again"


async def test_rate_limits_are_in_the_headers_and_refuse_for_a_while(
    open_bank: Callable[..., Desk], store: Store
) -> None:
    store.set_rule("user:*", lambda _: Rule(hard=Limits(requests_minute=2, tokens_minute=1000)))
    desk = open_bank()
    first = await desk.chat(max_tokens=5)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"] == "30s"
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    assert first.headers["x-ratelimit-remaining-tokens"] == str(1000 - PROMPT - 5)
    assert first.headers["x-galley-ratelimit-scope-requests"] == "user:local"
    await desk.chat(max_tokens=5)
    refused = await desk.chat(max_tokens=5)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["x-should-retry"] == "true"
    assert 0 < int(refused.headers["retry-after-ms"]) <= 30_000
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"


async def test_concurrency_is_limited_while_a_request_runs(
    open_bank: Callable[..., Desk], store: Store
) -> None:
    store.set_rule("server:all", lambda _: Rule(hard=Limits(concurrency=1)))
    desk = open_bank(FakeProvider(step_s=0.3))
    running = asyncio.ensure_future(desk.chat())
    while not desk.provider.seen or not any(
        sums[1].slots for sums in (await asyncio.to_thread(counters, store)).values()
    ):
        await asyncio.sleep(0.01)
    refused = await desk.chat()
    assert refused.status_code == 429 and refused.json()["error"]["limit"] == "concurrency"
    assert (await running).status_code == 200
    assert (await desk.chat()).status_code == 200


async def test_soft_limits_warn_in_header_and_receipt(open_bank: Callable[..., Desk], store: Store) -> None:
    store.set_rule("user:local", lambda _: Rule(soft=Limits(money_day=1)))
    desk = open_bank()
    answer = await desk.chat(max_tokens=OUTPUT)
    assert answer.status_code == 200
    assert answer.headers["x-galley-budget-warning"].startswith("user:local: money_day $0.000002 of $")
    assert (await desk.receipt(answer))["money"]["warnings"]


async def test_an_output_cap_fills_in_and_refuses_never_cuts_in_silence(
    open_bank: Callable[..., Desk], store: Store
) -> None:
    store.set_rule("user:local", lambda _: Rule(hard=Limits(max_output=2)))
    desk = open_bank()
    await desk.ledger.settled()
    answer = await desk.chat()
    assert answer.json()["usage"]["completion_tokens"] == 2
    assert "output cap of user:local" in answer.headers["x-galley-clamped"]
    assert "max_tokens" in (await desk.receipt(answer))["clamped"]
    refused = await desk.chat(max_tokens=3)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "max_tokens_above_cap"


async def test_an_agents_session_has_an_iteration_cap(open_bank: Callable[..., Desk], store: Store) -> None:
    store.set_rule("session:*", lambda _: Rule(hard=Limits(requests_total=2)))
    desk = open_bank()
    desk.http.headers["x-galley-session"] = "run-7"
    assert [(await desk.chat()).status_code for _ in range(3)] == [200, 200, 429]
    refused = await desk.chat()
    assert refused.json()["error"]["scope"] == "session:run-7"
    desk.http.headers["x-galley-session"] = "run-8"
    assert (await desk.chat()).status_code == 200


async def test_a_keys_organisation_and_team_have_budgets(
    open_bank: Callable[..., Desk], store: Store
) -> None:
    store.set_rule("team:red", lambda _: Rule(hard=Limits(requests_day=1)))
    desk = open_bank()
    _, secret = desk.state.keys.create("alice", org="acme", team="red")
    desk.http.headers["authorization"] = f"Bearer {secret}"
    assert (await desk.chat(metadata={"project": "apollo"})).status_code == 200
    refused = await desk.chat()
    assert refused.status_code == 429 and refused.json()["error"]["scope"] == "team:red"
    await desk.ledger.settled()
    (row,) = charges(store)
    assert (row["org"], row["team"], row["tenant"], row["tags"]) == (
        "acme",
        "red",
        "alice",
        ["project=apollo"],
    )


async def test_faults_cancels_and_refusals_release_what_was_held(
    open_bank: Callable[..., Desk], store: Store
) -> None:
    store.set_rule("server:all", lambda _: Rule(hard=Limits(money_day=10**9)))
    desk = open_bank(FakeProvider(step_s=0.05, fault=FAULT, fault_at=2))
    assert (await desk.chat()).status_code == 500
    desk.provider.fault = None
    task = asyncio.ensure_future(desk.chat(stream=True))
    while desk.provider.steps < 4:
        await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    desk.provider.full = True
    assert (await desk.chat()).status_code == 503
    assert (await desk.chat(max_tokens=4000)).status_code == 400
    await desk.ledger.settled()
    assert all(held.pico == held.slots == held.tokens == 0 for _, held in counters(store).values())
    found = check(store)
    assert found.good and found.reservations_open == 0
    outcomes = {row.key[0]: row.completion_tokens for row in spend(store, ["outcome"])}
    assert outcomes["error"] == 2, "the tokens before the fault are billed"


async def test_lines_of_a_batch_cost_less_where_the_price_says_so(
    open_bank: Callable[..., Desk], store: Store
) -> None:
    from galley.endpoint.chat import ChatDoor
    from galley.endpoint.generate import Generate
    from galley.endpoint.generate import Limits as Bounds
    from galley.endpoint.keys import Principal

    desk = open_bank()
    door = Generate(desk.router, ChatDoor(), limits=Bounds(), capture=False)
    outcome = await door.once(
        {"model": "fake-1b", "messages": [{"role": "user", "content": "hi"}]},
        request_id="req_1",
        principal=Principal(),
        metadata={"batch_id": "b"},
    )
    assert outcome.status == 200
    await desk.ledger.settled()
    (total,) = spend(store)
    assert (total.cost_pico, total.batch_saved_pico) == (COST // 2, COST // 2)
    assert check(store).good


async def test_without_a_ledger_only_what_a_limit_may_refuse_is_refused(
    open_bank: Callable[..., Desk], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = open_bank()
    down = GalleyError("disk full", code="x")
    from galley.economics.store import LedgerUnavailable

    store.refresh()
    await desk.ledger.settled()
    working = desk.ledger.store.apply

    def fail(acts: object) -> object:
        raise LedgerUnavailable(down.message)

    monkeypatch.setattr(desk.ledger.store, "apply", fail)
    assert (await desk.chat()).status_code == 200
    while desk.ledger.fault is None:
        await asyncio.sleep(0.01)
    answer = await desk.chat()
    assert answer.status_code == 200 and (await desk.receipt(answer))["money"]["late"] is True
    store.set_rule("user:bob", lambda _: Rule(hard=Limits(money_day=1)))
    desk.ledger.store.refresh()
    refused = await desk.chat()
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "ledger_unavailable"
    monkeypatch.setattr(desk.ledger.store, "apply", working)
    store.set_rule("user:bob", lambda _: None)
    await desk.ledger.settled()
    (total,) = spend(store)
    assert total.charges == 2 and total.cost_pico == 2 * COST, "entered once it could be"
    assert check(store).good and not desk.ledger.owed


async def test_strict_refuses_everything_without_a_ledger(
    open_bank: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    from galley.economics.store import LedgerUnavailable

    desk = open_bank(ledger={"strict": True})

    def fail(acts: object) -> object:
        raise LedgerUnavailable("disk full")

    monkeypatch.setattr(desk.ledger.store, "apply", fail)
    assert (await desk.chat()).status_code == 503
    monkeypatch.undo()
