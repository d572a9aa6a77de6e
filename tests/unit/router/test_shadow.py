"""Shadow traffic: the client never notices, the budget holds, and receipts say what they are."""

import asyncio
import random

import msgspec
import pytest

from galley.errors import ConfigError
from galley.router.catalog import Catalog, Document
from galley.router.outside import open_providers
from galley.router.router import Router
from galley.types import Request, SamplingParams
from tests.unit.endpoint.fake import FakeProvider, Ledger
from tests.upstream import MockUpstream


def build(ups, *, local=None, location="any", **shadow):
    """Requests for ``fake-1b`` are mirrored to ``big``, which the upstreams offer."""
    document = {
        "policy": {"location": location, "hedge_share": 0.0},
        "model": [{"id": "fake-1b"}, {"id": "big", "context": 8192}],
        "provider": [
            {
                "name": up.name,
                "kind": "openai",
                "url": up.url,
                "first_s": 0.5,
                "offer": [{"model": "big", "price": [{"input": "1", "output": "2"}]}],
            }
            for up in ups
        ],
        "shadow": [{"of": "fake-1b", "to": "big", "share": 1.0, "max_usd_day": "1"} | shadow],
    }
    catalog = Catalog(None, msgspec.convert(document, Document))
    ledger, heard = Ledger(), []
    router = Router(
        [local or FakeProvider(), *open_providers(catalog, lambda _: None)],
        ledger,
        catalog=catalog,
        rng=random.Random(5),
        listeners=[heard.append],
    )
    return router, ledger, heard


def request(**changes):
    fields = {
        "id": "req_1", "api": "chat.completions", "model": "fake-1b", "params": SamplingParams(max_tokens=50),
        "created": 1.0, "messages": [{"role": "user", "content": "hi"}], "tenant": "alice", "user": "u",
    }  # fmt: skip
    return Request(**(fields | changes))


async def ask(router, **changes):
    async with router.open(request(**changes)) as answer:
        return "".join([delta.text async for delta in answer.deltas()])


async def settled(router):
    for _ in range(200):
        if not any(router.shadows._tasks.values()):
            return
        await asyncio.sleep(0.02)
    raise AssertionError("shadows still run")


async def test_a_share_is_mirrored_and_marked():
    async with MockUpstream("a") as a:
        router, ledger, heard = build([a], share=0.25)
        for _ in range(100):
            assert await ask(router) == "Hello wörld"
            await settled(router)
        plain = [receipt for receipt in ledger.receipts if receipt.shadow_of is None]
        shadows = [receipt for receipt in ledger.receipts if receipt.shadow_of is not None]
        assert len(plain) == 100 and 12 <= len(shadows) <= 40 and len(shadows) == router.shadows.mirrored
        assert heard == plain, "metrics and their like hear of no shadow"
        assert {receipt.shadow_of for receipt in shadows} <= {receipt.id for receipt in plain}
        one = shadows[0]
        assert one.status == "ok" and one.route.rule == "shadow" and one.route.model == "big"
        assert (one.tenant, one.user, one.key) == ("shadow", None, None), "nobody is charged for it"
        assert sum(line["pico"] for line in one.price_lines) == 11 * 10**6 + 6 * 2 * 10**6
        assert plain[0].price_lines == [] and plain[0].attempts[0].model != "big"


@pytest.mark.parametrize("behaviour", ["refuse", "stall", "cut", "drop", "garbage"])
async def test_a_failing_shadow_changes_nothing(behaviour):
    async with MockUpstream("a", weights={behaviour: 1}) as a:
        router, ledger, _ = build([a])
        began = asyncio.get_running_loop().time()
        for _ in range(3):
            assert await ask(router) == "Hello wörld"
        assert asyncio.get_running_loop().time() - began < 0.4, "nobody waits for it"
        await settled(router)
        health = router.health("big@a")
        assert (health.failures, health.calls, health.inflight, health.breaker.state) == (0, 0, 0, "closed")
        shadows = [receipt for receipt in ledger.receipts if receipt.shadow_of]
        assert shadows and all(receipt.status == "error" and receipt.error for receipt in shadows)
        plain = [receipt for receipt in ledger.receipts if not receipt.shadow_of]
        assert len(plain) == 3 and all(receipt.status == "ok" for receipt in plain)


async def test_the_days_budget_holds():
    async with MockUpstream("a") as a:
        # At most 1 token in three characters of 2 and 50 out: about 105 micro-dollars; it then costs 23.
        router, ledger, _ = build([a], max_usd_day="0.00025")
        for _ in range(40):
            await ask(router)
            await settled(router)
        shadows = [receipt for receipt in ledger.receipts if receipt.shadow_of]
        spent = sum(line["pico"] for receipt in shadows for line in receipt.price_lines)
        assert 0 < spent <= 250 * 10**6 and len(shadows) >= 4
        assert router.shadows.skipped["the day's budget is spent"] == 40 - len(shadows)
        tomorrow = router.shadows._today().replace(year=2100)
        router.shadows._today = lambda: tomorrow
        await ask(router)
        await settled(router)
        assert sum(receipt.shadow_of is not None for receipt in ledger.receipts) == len(shadows) + 1
        router, ledger, _ = build([a], max_usd_day="0")
        await ask(router)
        assert router.shadows.mirrored == 0, "without a budget only what is free is mirrored"


async def test_it_leaves_nothing_that_the_request_may_not_leave():
    async with MockUpstream("a") as a:
        router, _, _ = build([a], location="local-only")
        await ask(router)
        router, _, _ = build([a])
        await ask(router, metadata={"galley.local_only": "true"})
        await ask(router, metadata={"galley.residency": "eu"})
        await ask(router, metadata={"galley.max_usd": "0.00001"})
        assert sum(a.calls.values()) == 0 and router.shadows.skipped == {"not eligible": 3}


async def test_only_so_many_at_once_and_none_outlive_the_server():
    async with MockUpstream("a", weights={"stall": 1}) as a:
        router, ledger, _ = build([a], at_once=2)
        for _ in range(5):
            await ask(router)
        assert router.shadows.mirrored == 2 and router.shadows.skipped == {"too many at once": 3}
        router.drain()
        await settled(router)
        shadows = [receipt for receipt in ledger.receipts if receipt.shadow_of]
        assert [receipt.status for receipt in shadows] == ["cancelled"] * 2


async def test_on_our_own_engine_it_runs_behind_everybody():
    async with MockUpstream("a") as a:
        local = FakeProvider()
        router, _, _ = build([a], local=local, of="big", to="fake-1b")
        await ask(router, model="big")
        await settled(router)
        assert local.seen[-1].service_tier == "flex" and local.seen[-1].priority > 0
        assert local.seen[-1].id != "req_1"


def test_a_wrong_table_is_a_config_error():
    for wrong in ({"to": "none"}, {"of": "none"}, {"share": 0.0}, {"share": 2.0}, {"max_usd_day": "x"}):
        with pytest.raises(ConfigError):
            build([], **wrong)
