"""One receipt on every path."""

import asyncio

import pytest

from galley.errors import ContextLengthExceeded, ModelNotFound, Overloaded
from galley.router.catalog import Catalog
from galley.router.router import Router
from galley.types import Request, SamplingParams
from tests.unit.endpoint.fake import FAULT, FakeProvider, Ledger


def request(**changes: object) -> Request:
    fields = {
        "id": "req_1",
        "api": "completions",
        "model": "fake-1b",
        "params": SamplingParams(),
        "created": 1.0,
        "prompts": ["hi"],
    }
    return Request(**(fields | changes))


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def router(ledger: Ledger, **options: object) -> Router:
    return Router([FakeProvider(**options)], ledger)


async def test_finish(ledger):
    heard = []
    way = Router([FakeProvider()], ledger, listeners=[heard.append])
    async with way.open(request()) as answer:
        text = "".join([d.text async for d in answer.deltas()])
        assert way.active == 1
        assert answer.usage().completion_tokens == 3
    assert text == "Hello wörld" and way.active == 0
    [receipt] = ledger.receipts
    assert heard == [receipt] == [answer.receipt]
    assert receipt.status == "ok" and receipt.route.rule == "fixed" and receipt.digests.weights == "w"
    assert receipt.times.ttft_s is not None and receipt.times.total_s > 0 and receipt.error is None


@pytest.mark.parametrize(
    ("options", "changes", "error"),
    [
        ({}, {"model": "other"}, ModelNotFound),
        ({}, {"prompts": ["x" * 101]}, ContextLengthExceeded),
        ({"full": True}, {}, Overloaded),
    ],
)
async def test_refusal_on_entry(ledger, options, changes, error):
    way = router(ledger, **options)
    with pytest.raises(error):
        async with way.open(request(**changes)):
            raise AssertionError("unreachable")
    [receipt] = ledger.receipts
    assert receipt.status == "error" and receipt.error["code"] == error.code and way.active == 0


async def test_fault_mid_way(ledger):
    with pytest.raises(type(FAULT)):
        async with router(ledger, fault=FAULT, fault_at=1).open(request()) as answer:
            async for _ in answer.deltas():
                pass
    [receipt] = ledger.receipts
    assert receipt.status == "error" and receipt.usage.completion_tokens == 1


@pytest.mark.parametrize("gone", [False, True])
async def test_can1_leaving_early(ledger, gone):
    way = router(ledger)
    async with way.open(request(), gone=lambda: gone) as answer:
        async for _ in answer.deltas():
            break
    [receipt] = ledger.receipts
    assert receipt.status == ("disconnected" if gone else "cancelled")
    assert receipt.usage.completion_tokens == 1 and way.catalog.providers()[0].running == 0


async def test_cancelled_task(ledger):
    way = router(ledger, step_s=10)
    entered = asyncio.Event()

    async def work() -> None:
        async with way.open(request()) as answer:
            entered.set()
            async for _ in answer.deltas():
                pass

    task = asyncio.ensure_future(work())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [r.status for r in ledger.receipts] == ["cancelled"] and way.catalog.providers()[0].running == 0


async def test_cancelled_while_preparing(ledger):
    way = router(ledger)
    way.catalog.providers()[0].prepare = lambda _: asyncio.sleep(10)

    async def work() -> None:
        async with way.open(request()):
            raise AssertionError("unreachable")

    task = asyncio.ensure_future(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [r.status for r in ledger.receipts] == ["cancelled"] and way.active == 0


async def test_loading_and_draining(ledger):
    way = Router([], ledger)
    with pytest.raises(Overloaded, match="loading"):
        async with way.open(request()):
            pass
    way.add(FakeProvider())
    way.drain()
    with pytest.raises(Overloaded, match="shutting"):
        async with way.open(request()):
            pass
    assert [r.error["code"] for r in ledger.receipts] == ["model_loading", "shutting_down"]


async def test_broken_receipt_store_does_not_break_the_answer(capsys):
    class Broken:
        def record(self, receipt: object) -> None:
            raise RuntimeError("no ink")

    async with Router([FakeProvider()], Broken()).open(request()) as answer:
        assert len([d async for d in answer.deltas()]) == 3
    told = capsys.readouterr().err
    assert "NO RECEIPT" in told and answer.receipt_id in told


def test_catalog_names_the_nearest_and_follows_aliases():
    catalog = Catalog({"small": "smollm2-135m"})
    for name in ("smollm2-135m", "qwen3-4b"):
        catalog.add(FakeProvider(name=name))
    assert catalog.find("small")[0].id == "smollm2-135m"
    with pytest.raises(ModelNotFound, match="Nearest: smollm2-135m"):
        catalog.find("SmolLM-135M")
    with pytest.raises(ModelNotFound, match="qwen3-4b"):
        catalog.find("zzzz")
