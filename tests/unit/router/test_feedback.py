"""Feedback by receipt: what the bandit learns from it, and what it says of policies that were not used."""

import json
import random
from collections import Counter

import httpx
import msgspec
import pytest

from galley.audit.assemble import assemble, receipt_id
from galley.audit.feedback import Feedback, FeedbackStore
from galley.audit.receipts import ReceiptStore
from galley.cli.main import invoke
from galley.economics.price import version
from galley.endpoint.app import build_app
from galley.endpoint.feedback import FeedbackPage
from galley.errors import InvalidRequest
from galley.evals.logs import drawn, judge
from galley.router.catalog import Catalog, Document
from galley.router.router import Router
from galley.types import Request, Route, SamplingParams
from tests.unit.endpoint.fake import FakeProvider, Ledger

WORTH = {"good": 0.9, "bad": 0.2}


def named(name):
    provider = FakeProvider(name=name, context=4000)
    provider.name = f"at-{name}"
    return provider


def build(receipts, *, epsilon=0.2, location="local-only", seed=3):
    document = {
        "policy": {"location": location},
        "model": [{"id": "bad", "quality": 0.6}, {"id": "good", "quality": 0.5}],
        "route": [
            {
                "name": "auto",
                "policy": "bandit",
                "models": ["bad", "good"],
                "options": {"epsilon": epsilon, "price": 0.0},
            }
        ],
    }
    catalog = Catalog(None, msgspec.convert(document, Document))
    return Router([named("bad"), named("good")], receipts, catalog=catalog, rng=random.Random(seed))


def request(**changes):
    fields = {
        "id": "r", "api": "x", "model": "auto", "params": SamplingParams(), "created": 1.0,
        "messages": [{"role": "user", "content": "hi"}],
    }  # fmt: skip
    return Request(**(fields | changes))


async def test_the_door_teaches_the_bandit(tmp_path):
    store = ReceiptStore(tmp_path / "r.db", batch_s=0.001)
    router = build(store)
    page = FeedbackPage(router, store, FeedbackStore(tmp_path / "feedback.db"))
    transport = httpx.ASGITransport(build_app(router, store, feedback=page))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        served = Counter()
        for _ in range(80):
            body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
            answer = await http.post("/v1/chat/completions", json=body)
            model, id = answer.json()["model"], answer.headers["x-galley-receipt"]
            served[model] += 1
            given = await http.post("/v1/feedback", json={"receipt": id, "reward": WORTH[model]})
            assert given.status_code == 201 and given.json()["learned"] is True
        assert router.decide(request()).choice.scores["good"] > router.decide(request()).choice.scores["bad"]
        assert served["good"] > 40, "the one declared worse proved better"
        for body, status in (
            ({"receipt": "rcp_none", "reward": 1}, 404),
            ({"receipt": id, "reward": 1.5}, 400),
            ({"receipt": id, "reward": "1"}, 400),
            ({"receipt": id}, 400),
            ({"reward": 1}, 400),
        ):
            assert (await http.post("/v1/feedback", json=body)).status_code == status, body
        again = await http.post("/v1/feedback", json={"receipt": id, "reward": 0.5, "comment": "hm"})
        assert again.status_code == 201 and again.json()["learned"] is False, "corrected, not taught twice"
    kept = FeedbackStore(tmp_path / "feedback.db")
    assert kept.get(id).reward == 0.5 and kept.get(id).comment == "hm" and len(kept.since()) == 80
    # A new process, and a reload, know what was learned.
    other = build(store)
    assert other.decide(request()).choice.scores["good"] < other.decide(request()).choice.scores["bad"]
    told = []
    await FeedbackPage(other, store, kept).keep_up(told.append)
    assert other.decide(request()).choice.scores["good"] > other.decide(request()).choice.scores["bad"]
    document = other.catalog.document
    other.reload(Catalog(None, document), [named("bad"), named("good")])
    assert other.decide(request()).choice.scores["good"] > other.decide(request()).choice.scores["bad"]
    (tmp_path / "broken.db").write_text("no database")
    await FeedbackPage(other, store, FeedbackStore(tmp_path / "broken.db")).keep_up(told.append)
    assert "not taken up" in told[0]
    store.close()


async def test_another_keys_receipt_is_not_there(tmp_path):
    store = ReceiptStore(tmp_path / "r.db", batch_s=0.001)
    router = build(store)
    page = FeedbackPage(router, store, FeedbackStore(tmp_path / "feedback.db"))
    transport = httpx.ASGITransport(build_app(router, store, keys=["one", "two"], feedback=page))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
        one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        id = (await http.post("/v1/chat/completions", json=body, headers=one)).headers["x-galley-receipt"]
        given = {"receipt": id, "reward": 1}
        assert (await http.post("/v1/feedback", json=given)).status_code == 401
        assert (await http.post("/v1/feedback", json=given, headers=two)).status_code == 404
        assert (await http.post("/v1/feedback", json=given, headers=one)).status_code == 201
    store.close()


@pytest.mark.parametrize(("location", "session"), [("any", None), ("any", "s"), ("local-first", None)])
def test_the_logged_propensity_is_the_real_one_whatever_overrules_the_draw(location, session):
    """Counted over many decisions of the same question: with a conversation that stays, and local first."""
    router = build(Ledger(), epsilon=0.4, location=location)
    if location == "local-first":
        offers = router.catalog.offers["bad"]
        offers[0] = msgspec.structs.replace(offers[0], location="cloud")
        router.catalog.prices.declare("at-bad", "bad", [version({"input": "1", "output": "1"}, "x")])
    seen = Counter()
    logged = {}
    for _ in range(3000):
        if session:
            router.chooser._sessions[session] = ("good", "at-good", 100)
        decision = router.decide(request(session=session))
        first = decision.sequence[0].offer.model
        seen[first] += 1
        logged.setdefault(first, set()).add(round(decision.choice.propensity, 9))
    for model, count in seen.items():
        [propensity] = logged[model]
        assert count / 3000 == pytest.approx(propensity, abs=0.03), (model, logged)


def log(n, *, seed=0):
    """Receipts of a bandit that draws ``bad`` four times in five, and what the answers were worth."""
    rng = random.Random(seed)
    pairs = []
    for i in range(n):
        kind = rng.choice(["code", "maths"])
        chosen = "bad" if rng.random() < 0.8 else "good"
        other = "good" if chosen == "bad" else "bad"
        route = Route(
            model=chosen, provider="p", rule="bandit", asked="auto", kind=kind,
            propensity=0.8 if chosen == "bad" else 0.2, candidates=[f"{chosen}@p", f"{other}@p"],
        )  # fmt: skip
        # ``good`` is better at code and worse at maths
        worth = {("good", "code"): 0.9, ("good", "maths"): 0.3, ("bad", "code"): 0.5, ("bad", "maths"): 0.6}
        reward = float(rng.random() < worth[chosen, kind])
        receipt = assemble(
            receipt_id=receipt_id(1000 + i), request=request(id=str(i)), route=route, digests=None,
            meters={}, status="ok",
        )  # fmt: skip
        pairs.append((receipt, Feedback(receipt=receipt.id, reward=reward, at=0.0)))
    return pairs


def test_estimates_from_logs_find_what_other_policies_earn():
    shown = judge(drawn(log(4000)), resamples=200)
    truth = {"always good": 0.6, "always bad": 0.55, "best of each kind": 0.75}
    assert set(shown["policies"]) == set(truth) and shown["rows"] == 4000
    for name, value in truth.items():
        found = shown["policies"][name]
        for figure in (found.ips, found.snips, found.dr):
            assert figure.low - 0.02 <= value <= figure.high + 0.02, (name, figure)
    rare = shown["policies"]["always good"]
    assert rare.dr.high - rare.dr.low < rare.ips.high - rare.ips.low, "DR is the tighter one where it matters"
    assert shown["policies"]["best of each kind"].dr.low > shown["policies"]["always bad"].logged.high
    covered = 0
    for seed in range(40):
        found = judge(drawn(log(400, seed=seed)), resamples=200)["policies"]["always good"]
        covered += found.snips.low <= 0.6 <= found.snips.high
    assert covered >= 34, f"a 95 % interval held the truth {covered} times in 40"


def test_what_was_certain_tells_nothing_of_others():
    pairs = log(30)
    certain = [(msgspec.structs.replace(r, route=msgspec.structs.replace(r.route, propensity=1.0)), f)
               for r, f in pairs]  # fmt: skip
    assert drawn(certain) == [] and drawn(pairs, "other") == [] and len(drawn(pairs, "auto")) == 30
    with pytest.raises(InvalidRequest, match="20 at least"):
        judge(drawn(certain))


def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GALLEY_HOME", str(tmp_path))
    store = ReceiptStore(tmp_path / "receipts.db", batch_s=0.001)
    for receipt, one in log(40):
        store.record(receipt)
        last = receipt.id
        FeedbackStore(tmp_path / "feedback.db").add(receipt.id, one.reward)
    store.flush(10)
    store.close()
    assert invoke(["route", "eval", "--logs", "--json", "--resamples", "50"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["rows"] == 40 and {"value", "low", "high"} == set(shown["policies"]["always good"]["ips"])
    assert invoke(["route", "eval", "--logs"]) == 0 and "best of each kind" in capsys.readouterr().out
    assert invoke(["route", "feedback", last, "0.25"]) == 0
    assert FeedbackStore(tmp_path / "feedback.db").get(last).reward == 0.25
    assert invoke(["route", "feedback", "rcp_none", "1"]) == 2
    assert invoke(["route", "feedback", last, "2"]) == 2
    assert invoke(["route", "eval"]) == 2 and invoke(["route", "eval", "x.csv", "--logs"]) == 2
    assert invoke(["route", "eval", "--logs", "--route", "none"]) == 2
