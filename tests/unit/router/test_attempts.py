"""Router and real HTTP upstreams together: retries, fallbacks, hedges, and what the receipt says of them."""

import asyncio
import random

import pytest

from galley.errors import (
    DeadlineExceeded,
    GalleyError,
    ModelNotFound,
    PolicyRefused,
    TooManyRequests,
    Upstream,
)
from galley.router.catalog import Catalog, Document
from galley.router.outside import open_providers
from galley.router.router import Router
from galley.types import Request, SamplingParams
from tests.unit.endpoint.fake import FakeProvider, Ledger
from tests.upstream import WORDS, MockUpstream

import msgspec  # isort: skip

TEXT = "".join(WORDS)
PRICE = [{"input": "1", "output": "2"}]


def request(**changes):
    fields = {
        "id": "req_1",
        "api": "chat.completions",
        "model": "big",
        "params": SamplingParams(),
        "created": 1.0,
        "messages": [{"role": "user", "content": "Six by seven?"}],
    }
    return Request(**(fields | changes))


def build(ups, *, local=False, models=None, **policy):
    """A router over upstreams that all offer ``big``."""
    policy = {"location": "any", "hedge_share": 0.0} | policy
    offered = [{"model": "big", "price": PRICE}]
    document = msgspec.convert(
        {
            "policy": policy,
            "model": models or [{"id": "big", "quality": 0.9, "context": 8192}],
            "provider": [
                {
                    "name": up.name,
                    "kind": "openai",
                    "url": up.url,
                    "first_s": 0.5,
                    "idle_s": 0.5,
                    "region": "eu",
                    "offer": offered,
                }
                for up in ups
            ],
        },
        Document,
    )
    catalog = Catalog(None, document)
    ledger = Ledger()
    providers = open_providers(catalog, lambda _: None)
    if local:
        providers.append(FakeProvider())
    return Router(providers, ledger, catalog=catalog, rng=random.Random(1), breaker_s=0.2), ledger


async def ask(router, **changes):
    async with router.open(request(**changes)) as answer:
        return "".join([delta.text async for delta in answer.deltas()])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "bad", ["refuse", "overload", "limit", "stall", "garbage", "error200", "empty", "drop", "auth"]
)
async def test_a_failure_before_the_commit_point_is_invisible(bad, stream):
    async with MockUpstream("a", weights={bad: 1}) as a, MockUpstream("b") as b:
        router, ledger = build([a, b])
        assert await ask(router, stream=stream) == TEXT
    [receipt] = ledger.receipts
    assert receipt.status == "ok" and receipt.route.provider == "b"
    assert [x.outcome for x in receipt.attempts] == ["failed", "won"] and receipt.attempts[0].kind
    assert receipt.route.candidates == ["big@a", "big@b"]
    served = [line for line in receipt.price_lines if "attempt" not in line]
    assert {line["kind"]: line["pico"] for line in served} == {
        "input": 11 * 1_000_000,
        "output": 6 * 2_000_000,
    }
    # What failed after the prompt had been taken is billed by its upstream, and shown.
    lost = [line["pico"] for line in receipt.price_lines if line.get("attempt") == "big@a"]
    assert sum(lost) == receipt.attempts[0].pico
    assert bool(lost) == (receipt.attempts[0].kind in ("timeout", "protocol"))


async def test_client_errors_are_not_retried():
    async with MockUpstream("a", weights={"bad": 1}) as a, MockUpstream("b") as b:
        router, ledger = build([a, b])
        with pytest.raises(Upstream) as caught:
            await ask(router)
    assert caught.value.status == 400 and sum(b.calls.values()) == 0
    assert ledger.receipts[0].status == "error"


async def test_after_the_commit_point_nothing_is_retried_and_the_end_is_an_error():
    async with MockUpstream("a", weights={"cut": 1}) as a, MockUpstream("b") as b:
        router, ledger = build([a, b])
        with pytest.raises(Upstream) as caught:
            await ask(router, stream=True)
        assert caught.value.kind == "cut" and sum(b.calls.values()) == 0
        assert router.health("big@a").failures == 1
    [receipt] = ledger.receipts
    assert receipt.status == "error" and receipt.usage.completion_tokens > 0 and receipt.price_lines
    assert "estimated" in receipt.clamped["usage"]


async def test_all_keys_dead_is_our_fault_not_the_clients():
    async with MockUpstream("a", weights={"auth": 1}) as a, MockUpstream("b", weights={"auth": 1}) as b:
        router, _ = build([a, b])
        with pytest.raises(Upstream) as caught:
            await ask(router)
    assert caught.value.status == 502 and caught.value.code == "upstream_credentials_exhausted"


async def test_with_everything_failing_extra_calls_stay_within_the_budget():
    async with MockUpstream("a", weights={"refuse": 1}) as a, MockUpstream("b", weights={"refuse": 1}) as b:
        router, ledger = build([a, b], retries=3, patience_s=0.05)
        for _ in range(300):
            with pytest.raises(GalleyError):
                await ask(router)
        calls = sum(a.calls.values()) + sum(b.calls.values())
        assert calls <= 1.2 * 300, f"{calls} calls for 300 requests"
        with pytest.raises(Upstream) as caught:
            for _ in range(20):
                await ask(router)
        assert caught.value.kind == "open" and caught.value.status == 503 and caught.value.retry_after_s >= 1
    assert len(ledger.receipts) >= 300 and all(r.status == "error" for r in ledger.receipts)


async def test_a_dead_provider_is_left_alone_and_taken_back_when_it_lives():
    async with MockUpstream("a") as a, MockUpstream("b") as b:
        router, _ = build([a, b])
        await ask(router)
        await a.kill()
        breaker = router.health("big@a").breaker
        for _ in range(500):  # how often the dead one is drawn at all is chance
            assert await ask(router) == TEXT
            if breaker.state == "open":
                break
        assert breaker.state == "open"
        await router.probe()
        await a.start()
        await asyncio.sleep(0.6)
        await router.probe()
        for _ in range(500):  # a busy machine is slow to draw it twice
            assert await ask(router) == TEXT
            await asyncio.sleep(0.02)
            if breaker.state == "closed":
                break
        assert router.health("big@a").breaker.state == "closed"


async def test_hedge_takes_the_faster_and_cancels_the_slower():
    async with MockUpstream("a", weights={"slow": 1}, slow_s=0.4) as a, MockUpstream("b") as b:
        router, ledger = build([a, b], hedge_share=0.05, hedge_after_s=0.05)
        assert await ask(router, stream=True) == TEXT
        for _ in range(100):
            if not a.open:
                break
            await asyncio.sleep(0.02)
        assert not a.open, "the loser's connection is cut; kept alive it would still be open"
        [receipt] = ledger.receipts
        assert receipt.route.provider == "b"
        assert sorted((x.provider, x.outcome, x.hedge) for x in receipt.attempts) == [
            ("a", "lost", False),
            ("b", "won", True),
        ]
        for _ in range(40):
            await ask(router)
        hedged = sum(x.hedge for r in ledger.receipts for x in r.attempts)
        assert hedged <= 1 + 0.05 * 41, "the hedge budget"
        assert router.health("big@a").inflight == router.health("big@b").inflight == 0


async def test_one_deadline_for_all_attempts():
    async with MockUpstream("a", weights={"stall": 1}) as a, MockUpstream("b", weights={"stall": 1}) as b:
        router, _ = build([a, b], deadline_s=0.7)
        began = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineExceeded):
            await ask(router)
        assert asyncio.get_running_loop().time() - began < 3


async def test_local_first_and_the_cloud_when_the_local_engine_is_full():
    models = [{"id": "fake-1b"}, {"id": "big", "fallback": ["fake-1b"]}]
    async with MockUpstream("a") as a:
        router, ledger = build([a], local=True, models=models, location="local-first")
        async with router.open(request(model="big")) as answer:
            [_ async for _ in answer.deltas()]
        assert ledger.receipts[0].route.location == "local" and sum(a.calls.values()) == 0
        router.catalog.provider("fake").full = True
        assert await ask(router, model="big") == TEXT


async def test_a_full_local_engine_alone_is_asked_once():
    """Its gate has said when to come back (CAN-5)."""
    calls = []

    class Full(FakeProvider):
        async def prepare(self, request):
            calls.append(request.id)
            raise TooManyRequests("full", retry_after_s=2.0)

    router = Router([Full()], Ledger())
    with pytest.raises(TooManyRequests) as refused:
        async with router.open(request(model="fake-1b")):
            pass
    assert len(calls) == 1 and refused.value.retry_after_s == 2.0


async def test_local_only_refuses_with_reasons_and_calls_nobody():
    async with MockUpstream("a") as a:
        router, ledger = build([a], location="local-only")
        with pytest.raises(PolicyRefused, match="local-only"):
            await ask(router)
        router, _ = build([a])
        with pytest.raises(PolicyRefused, match="request is local-only"):
            await ask(router, metadata={"galley.local_only": "true"})
        with pytest.raises(PolicyRefused, match="region"):
            await ask(router, metadata={"galley.residency": "us"})
        with pytest.raises(PolicyRefused, match="may cost"):
            await ask(router, metadata={"galley.max_usd": "0.000001"})
        assert sum(a.calls.values()) == 0
    assert ledger.receipts[0].error["refused"]


async def test_a_removed_provider_is_found_no_more_and_may_come_back():
    first, second = FakeProvider(), FakeProvider(name="other-1b")
    router = Router([first, second], Ledger())
    router.catalog.remove(second)
    assert [card.id for card in router.catalog.cards()] == ["fake-1b"]
    with pytest.raises(ModelNotFound):
        router.decide(request(model="other-1b"))
    assert router.decide(request(model="fake-1b")).sequence
    router.catalog.add(second)
    assert router.decide(request(model="other-1b")).sequence


async def test_reload_keeps_answers_under_way_and_a_wrong_catalog_changes_nothing():
    async with MockUpstream("a", gap_s=0.03) as a, MockUpstream("b") as b:
        router, _ = build([a])
        async with router.open(request(stream=True)) as answer:
            pieces = [await anext(answer.deltas())]
            other, _ = build([b])
            router.reload(Catalog(None, other.catalog.document), other.catalog.providers())
            pieces += [delta async for delta in answer.deltas()]
        assert "".join(delta.text for delta in pieces) == TEXT
        assert await ask(router) == TEXT and b.calls["ok"] == 1
