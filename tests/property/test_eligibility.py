"""No decision ever leaves what policy, request and catalog allow: judged by rules written a second time."""

import os
import random
from datetime import UTC, date, datetime

import msgspec
import pytest

from galley.errors import GalleyError
from galley.providers.base import ModelCard
from galley.providers.described import Described
from galley.router.catalog import Catalog, Document
from galley.router.decision import Chooser
from galley.router.facts import CAPABILITIES
from galley.router.health import Health
from galley.router.outside import open_providers
from galley.types import Request, SamplingParams, StructuredOutputs
from tests.unit.router.test_cascade import calibration

REGIONS = ["eu", "us", ""]
JUDGE = msgspec.msgpack.encode(calibration())
TODAY = datetime.now(UTC).date()


def catalog(rng):
    names = [f"m{i}" for i in range(rng.randint(1, 4))]
    models = [
        {
            "id": name,
            "capabilities": [c for c in CAPABILITIES if rng.random() < 0.7],
            "context": rng.choice([64, 512, 4096]),
            "quality": rng.random(),
            "fallback": rng.sample(names, rng.randint(0, len(names) - 1)),
            "tags": rng.sample(["code", "summary"], 1),
        }
        for name in names
    ]
    providers = []
    for i in range(rng.randint(0, 3)):
        offers = []
        for name in rng.sample(names, rng.randint(1, len(names))):
            price = [{"input": str(rng.randint(0, 9)), "output": str(rng.randint(0, 30))}]
            offers.append({"model": name, **({"price": price} if rng.random() < 0.7 else {})})
        providers.append(
            {
                "name": f"p{i}",
                "kind": rng.choice(["openai", "anthropic"]),
                "url": "http://127.0.0.1:9/v1",
                "location": rng.choice(["site", "cloud"]),
                "region": rng.choice(REGIONS),
                "extended": rng.random() < 0.5,
                "lacks": [c for c in ("tools", "json", "logprobs", "n") if rng.random() < 0.1],
                "offer": offers,
            }
        )
    policy = {
        "location": rng.choice(["local-only", "local-first", "any", "any"]),
        "regions": rng.sample(["eu", "us"], rng.randint(0, 1)),
    }
    if rng.random() < 0.3:
        policy["ceiling"] = {"input": "50", "output": "50"}
    if rng.random() < 0.3:
        policy["max_usd"] = rng.choice(["0.0001", "0.01"])
    kinds = ["fixed", "specialised", "factors", "bandit", *(["cascade"] if len(names) > 1 else [])]
    kind = rng.choice(kinds)
    options = {"file": "x"} if kind == "cascade" else {}
    routes = [{"name": "auto", "policy": kind, "models": names, "options": options}]
    built = Catalog(
        None,
        msgspec.convert(
            {"policy": policy, "model": models, "provider": providers, "route": routes}, Document
        ),
    )
    locals_ = rng.sample(names, rng.randint(0, len(names)))
    if locals_:
        built.add(Described("local", [ModelCard(id=n, context=4096, created=0) for n in locals_]))
    for provider in open_providers(built, lambda _: None):
        if rng.random() < 0.9:
            built.add(provider)
    return built, names


def ask(rng, names):
    metadata = {}
    if rng.random() < 0.2:
        metadata["galley.local_only"] = "true"
    if rng.random() < 0.2:
        metadata["galley.residency"] = rng.choice(["eu", "us", "eu,us"])
    if rng.random() < 0.2:
        metadata["galley.max_usd"] = rng.choice(["0", "0.0005", "1"])
    text = rng.choice(
        ["hi", "write python code ```def f()```", "summarise this text in two sentences", "x" * 900]
    )
    chat = rng.random() < 0.7
    forms = [
        {"json": {"type": "object"}},
        {"json_object": True},
        {"regex": "a+"},
        {"json": {}, "strict": False},
    ]
    turns = [{"role": "user", "content": text}]
    if rng.random() < 0.1:
        call = {
            "id": rng.choice(["c1", None]),
            "function": {"name": "f", "arguments": rng.choice(["{}", "[]"])},
        }
        turns[:0] = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "c1"},
        ]
    return Request(
        id="r",
        api="x",
        model=rng.choice([*names, "auto"]),
        created=0.0,
        messages=turns if chat else None,
        prompts=None if chat else [rng.choice([text, [1, 2, 3]])],
        tools=[{"type": "function", "function": {"name": "f"}}] if rng.random() < 0.15 else None,
        session=rng.choice([None, "s1", "s2"]),
        local_only=rng.random() < 0.1,
        metadata=metadata,
        params=SamplingParams(
            max_tokens=rng.choice([None, 16, 300]),
            n=rng.choice([1, 1, 2]),
            top_k=rng.choice([0, 0, 5]),
            logprobs=rng.choice([None, None, None, 1, 9]),
            structured_outputs=StructuredOutputs(**rng.choice(forms)) if rng.random() < 0.15 else None,
        ),
    )


def violations(built, request, offer, price):
    """The rules again, from the request's own fields."""
    policy, wrong = built.policy, []
    away = offer.provider != "local"
    told = request.metadata
    if away and (
        policy.location == "local-only" or request.local_only or told.get("galley.local_only") == "true"
    ):
        wrong.append("left the machine")
    table = built.tables.get(offer.provider)
    if away:
        if policy.regions and table.region not in policy.regions:
            wrong.append("policy's regions")
        if "galley.residency" in told and table.region not in told["galley.residency"].split(","):
            wrong.append("the request's regions")
        params, form = request.params, request.params.structured_outputs
        if request.prompts and isinstance(request.prompts[0], list):
            wrong.append("token ids elsewhere")
        if params.top_k and not table.extended:
            wrong.append("top_k dropped")
        if form is not None and form.regex and not (table.kind == "openai" and table.extended):
            wrong.append("a regex dropped")
        if form is not None and request.messages is None and not (table.kind == "openai" and table.extended):
            wrong.append("a form dropped")
        asked = {"tools": request.tools, "json": form and not form.regex, "n": params.n > 1}
        asked["logprobs"] = params.logprobs is not None
        if any(asked[name] for name in table.lacks):
            wrong.append("what the server was said to lack")
        if table.kind == "anthropic":
            if request.messages is None or params.n > 1 or params.logprobs is not None:
                wrong.append("what Messages cannot carry")
            if form is not None and (form.json_object or not form.strict):
                wrong.append("a form that Messages cannot carry")
            calls = [c for m in request.messages or () for c in m.get("tool_calls") or ()]
            if calls and (not request.tools or any(c["id"] is None for c in calls)):
                wrong.append("calls that Messages cannot carry")
            if any(c["function"]["arguments"] != "{}" for c in calls):
                wrong.append("arguments that Messages cannot carry")
    can = built.models[offer.model].capabilities
    if ("chat" if request.messages is not None else "completion") not in can:
        wrong.append("kind")
    if request.tools and "tools" not in can:
        wrong.append("tools")
    if request.params.logprobs is not None and "logprobs" not in can:
        wrong.append("logprobs")
    form = request.params.structured_outputs
    if form is not None and ("grammar" if form.regex else "json") not in can:
        wrong.append("form")
    declared = next((o for o in (table.offer if table else []) if o.model == offer.model), None)
    if away and not declared.price and not policy.ceiling:
        wrong.append("unknown price")
    if away and price.input == 0 and declared.price and declared.price[0]["input"] != "0":
        wrong.append("a price of zero")
    text = request.messages[-1]["content"] if request.messages else request.prompts[0]
    tokens = (len(text) / 8 if isinstance(text, str) else len(text)) + (request.params.max_tokens or 0)
    if away and tokens > built.models[offer.model].context + 8:
        wrong.append("context")
    least = len(text) / 8 * price.input + (request.params.max_tokens or 0) * request.params.n * price.output
    limits = [float(x) * 1e12 for x in (policy.max_usd, told.get("galley.max_usd")) if x is not None]
    if limits and least > min(limits):
        wrong.append("budget")
    if built.provider(offer.provider) is None:
        wrong.append("not running")
    asked = request.model
    listed = built.routes["auto"].models if asked == "auto" else [asked, *built.models[asked].fallback]
    if offer.model not in listed:
        wrong.append("a model nobody asked for")
    return wrong


def check(count, seed):
    rng = random.Random(seed)
    chosen = refused = 0
    health = Health(lambda: 0.0, rng, retry_share=0.2)
    for _ in range(count // 10):
        built, names = catalog(rng)
        chooser = Chooser(built, lambda _: health, rng=rng, read=lambda _: JUDGE, today=lambda: TODAY)
        for _ in range(10):
            request = ask(rng, names)
            try:
                decision = chooser.decide(request)
            except GalleyError:
                refused += 1
                continue
            chosen += 1
            for candidate in decision.sequence:
                wrong = violations(built, request, candidate.offer, candidate.price)
                assert not wrong, (wrong, request, candidate, built.document)
                asked = decision.ask(request, candidate)
                assert asked.model == candidate.offer.model and asked.local_only == request.local_only
            chooser.remember(request.session, rng.choice(decision.sequence), rng.randint(0, 4000))
            assert len({c.offer.key for c in decision.sequence}) == len(decision.sequence)
            assert 0 < decision.choice.propensity <= 1
    assert chosen > count / 10 and refused > count / 10, "the generator tests both ways"


def test_no_decision_leaves_what_is_allowed():
    check(5_000, 1)


@pytest.mark.slow
@pytest.mark.skipif("SOAK" not in os.environ, reason="make soak")
def test_no_decision_leaves_what_is_allowed_100k():
    check(100_000, 2)


def test_dated_prices_apply_from_their_day():
    document = {
        "policy": {"location": "any"},
        "model": [{"id": "m"}],
        "provider": [
            {
                "name": "p",
                "kind": "openai",
                "url": "http://127.0.0.1:9",
                "offer": [
                    {
                        "model": "m",
                        "price": [
                            {"from": "2026-01-01", "input": "1", "output": "1"},
                            {"from": "2026-06-01", "input": "2", "output": "2"},
                        ],
                    }
                ],
            }
        ],
    }
    built = Catalog(None, msgspec.convert(document, Document))
    [offer] = built.offers["m"]
    assert built.price(offer, date(2026, 5, 31)).input == 1_000_000
    assert built.price(offer, date(2026, 6, 1)).input == 2_000_000
    with pytest.raises(GalleyError, match="No price is known"):
        built.price(offer, date(2025, 12, 31))
