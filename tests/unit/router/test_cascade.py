"""Cascades: what is read off an answer, how it is judged, and what client and receipt see of it."""

import asyncio
import json
import math
import random

import httpx
import msgspec
import numpy as np
import pytest

from galley.audit.receipts import ReceiptStore
from galley.cli.main import invoke
from galley.economics.price import version
from galley.endpoint.app import build_app
from galley.errors import ConfigError, GalleyError, InvalidRequest, PolicyRefused, Upstream
from galley.evals.calibrate import Answers, auroc, calibrate, ece, graded, read_answers
from galley.router.cascade import FLOOR, SIGNALS, TOP, Calibration, Watch
from galley.router.catalog import Catalog, Document
from galley.router.outside import open_providers
from galley.router.router import Router
from galley.types import Request, SamplingParams, TokenLogprob
from tests.unit.endpoint.fake import FakeProvider, Ledger
from tests.upstream import WORDS, MockUpstream

TEXT = "".join(WORDS)


def calibration(**changes):
    """Confidence is the sigmoid of the mean log-probability plus 2: -0.25 is 0.85, -4 is 0.12."""
    knots = [x / 10 for x in range(-60, 61)]
    fields = {
        "version": 1, "model": "fake-1b", "weights": "", "tokens": 0, "signals": list(SIGNALS),
        "centre": [0.0] * 6, "spread": [1.0] * 6, "slopes": [1.0, 0, 0, 0, 0, 0], "intercept": 2.0,
        "knots": knots, "shares": [1 / (1 + math.exp(-x)) for x in knots],
        "thresholds": {"accept50": 0.7, "right90": 0.9}, "rows": 100, "good": 0.5, "ece": 0.0, "auroc": 0.9,
        "brier": 0.1, "source": "made up",
    }  # fmt: skip
    return Calibration(**(fields | changes))


class Sure(FakeProvider):
    """Says its words with the log-probabilities given, the last one from then on."""

    def __init__(self, logprobs=(-0.25,), **options):
        super().__init__(**options)
        self.values = logprobs

    async def start(self, prepared, meter):
        run = await super().start(prepared, meter)
        inner, values = run.deltas, self.values

        async def deltas():
            at = 0
            async for delta in inner():
                if delta.logprobs:
                    value = values[min(at, len(values) - 1)]
                    at += 1
                    top = [(5, value), *((i, value - i) for i in range(1, prepared.params.logprobs))]
                    yield msgspec.structs.replace(delta, logprobs=[TokenLogprob(5, value, 1, top)])
                else:
                    yield delta

        run.deltas = deltas
        return run


def build(small, ups, *, options=None, file=None, policy=None, big=None):
    """A route ``auto``: the fake model on this machine first, then ``big`` elsewhere."""
    prices = [{"input": "1", "output": "2"}]
    document = msgspec.convert(
        {
            "policy": {"location": "any", "hedge_share": 0.0, "retries": 1} | (policy or {}),
            "model": [{"id": "fake-1b", "quality": 0.2}, {"id": "big", "context": 8192} | (big or {})],
            "provider": [
                {"name": up.name, "kind": "openai", "url": up.url, "first_s": 0.5, "idle_s": 0.5,
                 "offer": [{"model": "big", "price": prices}]}
                for up in ups
            ],
            "route": [
                {"name": "auto", "policy": "cascade", "models": ["fake-1b", "big"],
                 "options": {"file": "x", **(options or {})}}
            ],
        },
        Document,
    )  # fmt: skip
    catalog = Catalog(None, document)
    ledger = Ledger()
    router = Router(
        [small, *open_providers(catalog, lambda _: None)],
        ledger,
        catalog=catalog,
        rng=random.Random(3),
        read=lambda _: msgspec.msgpack.encode(file or calibration()),
    )
    return router, ledger


def request(**changes):
    fields = {
        "id": "req_1", "api": "chat.completions", "model": "auto", "params": SamplingParams(), "created": 1.0,
        "messages": [{"role": "user", "content": "Six by seven?"}], "stream": True,
    }  # fmt: skip
    return Request(**(fields | changes))


async def ask(router, **changes):
    async with router.open(request(**changes)) as answer:
        deltas = [delta async for delta in answer.deltas()]
    return "".join(delta.text for delta in deltas), deltas


def test_signals_follow_their_definitions():
    watch = Watch()
    half, rest = math.log(0.5), math.log(0.25)
    watch.add([TokenLogprob(1, half, 1, [(1, half), (2, rest)])])
    watch.add([TokenLogprob(1, -3.0, 2, [(2, -0.1), (1, -3.0)]), TokenLogprob(9, -float("inf"), 9, [])])
    mean, least, unsure, entropy, margin, tokens = watch.signals()
    assert mean == pytest.approx((half - 3.0 + FLOOR) / 3) and least == FLOOR
    assert unsure == pytest.approx(2 / 3) and tokens == pytest.approx(math.log(3))
    assert entropy == pytest.approx(0.5 * math.log(2) + 2 * 0.25 * math.log(4)), "the rest counts as one"
    assert margin == pytest.approx(math.log(2))
    brief = Watch(2)
    brief.add([TokenLogprob(1, -1.0, 1, [])] * 5)
    assert brief.full and brief.tokens == 2
    with pytest.raises(ValueError, match="no token"):
        Watch().signals()


async def test_a_sure_answer_is_kept_and_nobody_else_is_asked():
    async with MockUpstream("a") as a:
        small = Sure()
        router, ledger = build(small, [a])
        text, deltas = await ask(router)
        assert text == "Hello wörld" and sum(a.calls.values()) == 0
        assert small.seen[-1].params.logprobs == TOP, "asked for what the judge reads"
        assert all(delta.logprobs is None for delta in deltas), "which the client did not ask for"
    [receipt] = ledger.receipts
    judged = receipt.judgement
    assert receipt.status == "ok" and receipt.route.model == "fake-1b" and receipt.route.rule == "cascade"
    assert not judged.escalated and judged.first == "fake-1b@fake" and judged.tokens == 3
    assert judged.confidence == pytest.approx(1 / (1 + math.exp(-1.75)), abs=1e-3)
    assert judged.signals["mean"] == -0.25 and receipt.params["logprobs"] is None
    assert small.running == 0 and router.health("fake-1b@fake").inflight == 0


async def test_an_unsure_answer_is_seen_by_nobody_and_both_attempts_are_on_the_receipt():
    async with MockUpstream("a") as a:
        small = Sure((-4.0,))
        router, ledger = build(small, [a])
        text, _ = await ask(router)
        assert text == TEXT, "not a word of the first answer"
    [receipt] = ledger.receipts
    judged = receipt.judgement
    assert judged.escalated and (judged.first, judged.to) == ("fake-1b@fake", "big@a")
    assert judged.confidence < judged.needed and judged.usage.completion_tokens == 3
    assert judged.usage.prompt_tokens > 0 and judged.resources.prefill_flop > 0
    assert [(x.model, x.outcome) for x in receipt.attempts] == [("fake-1b", "escalated"), ("big", "won")]
    assert receipt.route.model == "big" and receipt.usage.completion_tokens == len(WORDS)
    assert small.running == 0
    assert router.health("fake-1b@fake").inflight == router.health("big@a").inflight == 0


def priced(router):
    """The first model is no longer free: 3 and 5 USD a million tokens."""
    offer = router.catalog.offers["fake-1b"][0]
    router.catalog.offers["fake-1b"][0] = msgspec.structs.replace(offer, price_id="x")
    router.catalog.prices.declare("fake", "fake-1b", [version({"input": "3", "output": "5"}, "fake/fake-1b")])


async def test_what_the_first_attempt_cost_is_on_the_receipt_too():
    """The price lines are of both, and each says whose it is."""
    async with MockUpstream("a") as a:
        router, ledger = build(Sure((-4.0,)), [a])
        priced(router)
        assert (await ask(router))[0] == TEXT
    [receipt] = ledger.receipts
    first = sum(line["pico"] for line in receipt.price_lines if line.get("attempt") == "fake-1b@fake")
    second = sum(line["pico"] for line in receipt.price_lines if "attempt" not in line)
    prompt = receipt.judgement.usage.prompt_tokens
    assert first == prompt * 3_000_000 + 3 * 5_000_000 and second == 11 * 1_000_000 + 6 * 2_000_000


async def test_the_decision_may_come_before_the_end():
    """With a limit of tokens a sure answer is streamed from there, and an unsure one is cut short."""
    words = tuple(f"w{i} " for i in range(10))
    async with MockUpstream("a") as a:
        small = Sure((-0.25, -0.25, -9.0), words=words)
        router, ledger = build(small, [a], file=calibration(tokens=2))
        async with router.open(request()) as answer:
            assert small.steps == 2, "two tokens were enough to decide"
            text = "".join([delta.text async for delta in answer.deltas()])
        assert text == "".join(words) and ledger.receipts[0].judgement.tokens == 2
        small = Sure((-5.0,), words=words, step_s=0.01)
        router, ledger = build(small, [a], file=calibration(tokens=2))
        assert (await ask(router))[0] == TEXT
        assert small.running == 0 and ledger.receipts[0].judgement.escalated
        stopped = small.steps
        await asyncio.sleep(0.1)
        assert small.steps == stopped < 10, "nothing of it runs on"


@pytest.mark.parametrize("keep", [True, False])
async def test_when_nobody_can_take_it(keep):
    async with MockUpstream("a", weights={"refuse": 1}) as a:
        router, ledger = build(Sure((-4.0,)), [a], options={"keep": keep})
        if keep:
            assert (await ask(router))[0] == "Hello wörld"
            judged = ledger.receipts[0].judgement
            assert not judged.escalated and "kept all the same" in judged.reason
            assert ledger.receipts[0].status == "ok" and ledger.receipts[0].route.model == "fake-1b"
        else:
            with pytest.raises(Upstream):
                await ask(router)
            assert ledger.receipts[0].status == "error"
        assert sum(a.calls.values()) >= 1
        assert router.health("fake-1b@fake").inflight == 0 and router.health("fake-1b@fake").failures == 0


async def test_a_first_answer_that_breaks_off_is_not_seen():
    async with MockUpstream("a") as a:
        fault = GalleyError("the kernel fell over", code="engine_fault")
        router, ledger = build(Sure(fault=fault, fault_at=2), [a])
        assert (await ask(router))[0] == TEXT
        assert "broke off" in ledger.receipts[0].judgement.reason
        router, ledger = build(Sure(fault=fault, fault_at=2), [])
        with pytest.raises(GalleyError, match="kernel"):
            await ask(router)


async def test_a_slow_first_model_does_not_eat_the_deadline():
    async with MockUpstream("a") as a:
        router, ledger = build(Sure(step_s=5.0), [a], options={"share": 0.2}, policy={"deadline_s": 2.0})
        began = asyncio.get_running_loop().time()
        assert (await ask(router))[0] == TEXT
        assert asyncio.get_running_loop().time() - began < 1.9
        assert "not done within" in ledger.receipts[0].judgement.reason
        router.health("big@a").latency.note(60.0)  # it is known to take a minute
        router.catalog.provider("fake").step_s = 0.0
        router.catalog.provider("fake").values = (-4.0,)
        assert (await ask(router))[0] == "Hello wörld"
        assert "too few" in ledger.receipts[1].judgement.reason


async def test_an_escalation_never_widens_what_is_eligible():
    async with MockUpstream("a") as a:
        router, ledger = build(Sure((-4.0,)), [a])
        assert (await ask(router, metadata={"galley.local_only": "true"}))[0] == "Hello wörld"
        assert sum(a.calls.values()) == 0 and "big@a" in ledger.receipts[0].route.refused
        assert (await ask(router, metadata={"galley.residency": "eu"}))[0] == "Hello wörld"
        # 1,024 tokens at 2 USD a million are 0.002 USD: one attempt may cost that, and the first is free.
        limits = {"0.0021": TEXT, "0.001": "Hello wörld"}
        for limit, text in limits.items():
            assert (await ask(router, metadata={"galley.max_usd": limit}))[0] == text
        assert sum(a.calls.values()) == 1


async def test_both_attempts_together_stay_within_the_budget():
    """What the first one took is taken off the limit before another is asked."""
    async with MockUpstream("a") as a:
        router, ledger = build(Sure((-4.0,)), [a], options={"keep": False})
        priced(router)
        params = SamplingParams(max_tokens=50)
        # The other alone is at most 9 x 1 + 50 x 2 = 109 micro-dollars; the first took about 22 more.
        table = {"input": "1", "output": "1"}
        router.catalog.prices.declare("fake", "fake-1b", [version(table, "fake/fake-1b")])
        with pytest.raises(PolicyRefused, match="both attempts"):
            await ask(router, params=params, metadata={"galley.max_usd": "0.000120"})
        assert sum(a.calls.values()) == 0
        assert (await ask(router, params=params, metadata={"galley.max_usd": "0.000140"}))[0] == TEXT
        assert len(ledger.receipts) == 2


async def test_what_cannot_be_judged_begins_with_the_others():
    async with MockUpstream("a") as a:
        router, ledger = build(Sure(), [a])
        decision = router.decide(request(model="fake-1b"))
        assert decision.choice.judge is None, "a model asked for by name is not judged"
        found = build(Sure(), [a], big={"capabilities": ["chat", "n"]})[0]
        found.catalog.models["fake-1b"] = msgspec.structs.replace(
            found.catalog.models["fake-1b"], capabilities=["chat", "n"]
        )
        decision = found.decide(request(params=SamplingParams(n=2)))
        assert decision.choice.order == ["big", "fake-1b"] and "several choices" in decision.choice.reason
        router, ledger = build(Sure(), [a], file=calibration(weights="other"))
        assert (await ask(router))[0] == TEXT
        assert "other weights" in ledger.receipts[0].judgement.reason
        assert ledger.receipts[0].judgement.confidence is None


async def test_a_client_that_asked_for_logprobs_gets_what_it_asked_for():
    async with MockUpstream("a") as a:
        router, ledger = build(Sure(), [a], big={"capabilities": ["chat", "logprobs"]})
        router.catalog.models["fake-1b"] = msgspec.structs.replace(
            router.catalog.models["fake-1b"], capabilities=["chat", "logprobs"]
        )
        _, deltas = await ask(router, params=SamplingParams(logprobs=2))
        assert all(len(delta.logprobs[0].top) == 2 for delta in deltas if delta.logprobs)
        assert any(delta.logprobs for delta in deltas) and ledger.receipts[0].params["logprobs"] == 2


async def test_leaving_while_it_is_judged_stops_everything():
    async with MockUpstream("a") as a:
        small = Sure(step_s=0.2)
        router, ledger = build(small, [a])

        async def work():
            await ask(router)

        task = asyncio.ensure_future(work())
        while not small.running:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert small.running == 0 and ledger.receipts[0].status == "cancelled"
        assert router.health("fake-1b@fake").inflight == 0


async def test_header_receipt_and_command_line_name_it(tmp_path, capsys, monkeypatch):
    async with MockUpstream("a") as a:
        for values, word in (((-4.0,), "escalated to big@a"), ((-0.1,), "kept")):
            router, _ = build(Sure(values), [a])
            monkeypatch.setenv("GALLEY_HOME", str(tmp_path))
            store = ReceiptStore(tmp_path / "receipts.db", batch_s=0.001)
            router.receipts = store
            transport = httpx.ASGITransport(build_app(router, store))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
                answer = await http.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200 and word in answer.headers["x-galley-cascade"]
                assert answer.headers["x-galley-cascade"].startswith("fake-1b@fake ")
                streamed = await http.post("/v1/chat/completions", json=body | {"stream": True})
                assert word in streamed.headers["x-galley-cascade"]
                receipt = (await http.get(f"/v1/receipts/{answer.headers['x-galley-receipt']}")).json()
                assert receipt["judgement"]["escalated"] == (word != "kept")
            store.close()
            capsys.readouterr()
            assert invoke(["receipt", receipt["id"]]) == 0
            assert f"fake-1b@fake {word}" in capsys.readouterr().out


def made_up(n=600, seed=0):
    """Answers that are good with a probability that the signals tell."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, len(SIGNALS)))
    p = 1 / (1 + np.exp(-(1.5 * x[:, 0] - 1.0 * x[:, 3])))
    return x, (rng.random(n) < p).astype(float), p


def test_the_calibration_is_calibrated_and_the_file_says_the_same():
    x, good, _ = made_up()
    found = calibrate(Answers(x, good, list(range(len(good)))), model="m", weights="w", tokens=0, source="s")
    fresh, truth, p = made_up(4000, 1)
    said = np.array([found.confidence(row) for row in fresh])
    assert ece(said, truth) < 0.05 and auroc(said, truth) > 0.97 * auroc(p, truth) > 0.8
    assert abs(found.ece - ece(said, truth)) < 0.05 and abs(found.auroc - auroc(said, truth)) < 0.05
    share = (said >= found.thresholds["accept25"]).mean()
    assert share == pytest.approx(0.25, abs=0.06)
    assert truth[said >= found.thresholds["right80"]].mean() == pytest.approx(0.8, abs=0.06)
    again = Calibration.decode(msgspec.msgpack.encode(found))
    assert again == found and all(0 < share < 1 for share in found.shares)
    assert found.shares == sorted(found.shares) and found.knots == sorted(found.knots)
    for raw in (b"x", msgspec.msgpack.encode(msgspec.structs.replace(found, version=9))):
        with pytest.raises(ConfigError):
            Calibration.decode(raw)


def test_figures_by_hand():
    assert auroc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([0.0, 0, 1, 1])) == pytest.approx(3.5 / 4)
    assert ece(np.array([0.5] * 10), np.array([1.0] * 8 + [0] * 2), bins=1) == pytest.approx(0.3)
    assert graded("so 3 and 4 make $1,007.", "x\n#### 1007") and not graded("1007 or 8", "1007")
    assert graded("It is Paris, of course", "paris") and not graded("Parisian", "Paris")


def test_calibrating_from_the_command_line(tmp_path, capsys):
    x, good, _ = made_up(200)
    data, file = tmp_path / "a.jsonl", tmp_path / "a.cascade"
    rows = [
        {"signals": dict(zip(SIGNALS, row, strict=True)), "good": g} for row, g in zip(x, good, strict=True)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    assert invoke(["route", "calibrate", str(data), "-o", str(file), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rows"] == 200 and 0 < shown["ece"] < 0.3 and "accept50" in shown["thresholds"]
    assert Calibration.read(file).rows == 200
    data.write_text('{"signals": {"mean": 1}, "good": 1}')
    with pytest.raises(InvalidRequest, match="line 1"):
        read_answers(data)
    assert invoke(["route", "calibrate", str(data), "-o", str(file)]) == 2
    data.write_text("\n".join(map(json.dumps, rows[:20])))
    assert invoke(["route", "calibrate", str(data), "-o", str(file)]) == 2


def test_a_wrong_route_is_a_config_error():
    for options in (
        {"target": "none"},
        {"threshold": 2},
        {"keep": 1},
        {"target": "accept50", "threshold": 0.5},
    ):
        with pytest.raises(ConfigError):
            build(Sure(), [], options=options)
