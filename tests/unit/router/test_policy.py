"""Policies rank what is eligible, and say why."""

import random
from collections import Counter

import msgspec
import pytest

from galley.errors import ConfigError, InvalidRequest
from galley.providers.base import ModelCard
from galley.providers.described import Described
from galley.router.catalog import Catalog, Document
from galley.router.decision import Chooser
from galley.router.facts import Facts, last_user_text
from galley.router.health import Health
from galley.router.policy import speciality
from galley.types import Request, SamplingParams


def chooser(policy, options=None, models=("small", "large"), read=lambda _: b"", seed=1, **policy_table):
    quality = {"small": 0.3, "large": 0.9}
    document = {
        "policy": {"location": "any"} | policy_table,
        "model": [
            {
                "id": name,
                "context": 4096,
                "quality": quality[name],
                "tags": ["code"] if name == "large" else [],
            }
            for name in models
        ],
        "provider": [
            {
                "name": "p",
                "kind": "openai",
                "url": "http://127.0.0.1:9",
                "offer": [
                    {"model": name, "price": [{"input": price, "output": price}]}
                    for name, price in zip(models, ("1", "10"), strict=False)
                ],
            }
        ],
        "route": [{"name": "auto", "policy": policy, "models": list(models), "options": options or {}}],
    }
    catalog = Catalog(None, msgspec.convert(document, Document))
    catalog.add(Described("p", [ModelCard(id=name, context=4096, created=0) for name in models]))
    rng = random.Random(seed)
    health = Health(lambda: 0.0, rng, retry_share=0.2)
    return Chooser(catalog, lambda _: health, rng=rng, read=read)


def ask(text="hello", model="auto", **changes):
    changes = {"params": SamplingParams(max_tokens=10)} | changes
    messages = [{"role": "system", "content": "You write python code."}, {"role": "user", "content": text}]
    return Request(id="r", api="x", model=model, created=0.0, messages=messages, **changes)


def first(decision):
    return decision.sequence[0].offer.model


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Write a Python function that reverses a list. ```def f(x):```", "code"),
        ("Summarise the key points of this article in three sentences.", "summary"),
        ("Write a haiku and then a short story about the sea", "creative"),
        ("Solve the equation 3*x + 4 = 10. How many solutions?", "maths"),
        ("What is the capital of France?", None),
        ("Please route this to the code model, I command you.", None),
        ("", None),
    ],
)
def test_speciality_and_when_it_abstains(text, kind):
    assert speciality(text)[0] == kind


def test_only_the_last_user_turn_is_read():
    assert last_user_text(ask("hello")) == "hello"
    decision = chooser("specialised").decide(ask("hello"))
    assert first(decision) == "small" and "abstains" in decision.choice.reason
    assert (
        first(chooser("specialised").decide(ask("Fix this bug in my python code: ```def f(): pass```")))
        == "large"
    )


def test_rules():
    options = {"rules": [{"tenant": "vip", "use": ["large"]}, {"min_tokens": 500, "use": ["large"]}]}
    decide = chooser("rules", options).decide
    assert first(decide(ask())) == "small"
    assert first(decide(ask(tenant="vip"))) == "large" and decide(ask(tenant="vip")).choice.reason == "rule 1"
    assert first(decide(ask("x " * 1000))) == "large"


def test_factors_follow_their_weights():
    assert first(chooser("factors", {"quality": 0.0, "price": 1.0, "wait": 0.0}).decide(ask())) == "small"
    assert first(chooser("factors", {"quality": 1.0, "price": 0.0, "wait": 0.0}).decide(ask())) == "large"


def test_bandit_logs_the_probability_it_really_has():
    decide = chooser("bandit", {"epsilon": 0.2, "price": 0.0}).decide
    seen = [decide(ask()) for _ in range(4000)]
    counts = Counter(first(d) for d in seen)
    for model in ("small", "large"):
        [logged] = {round(d.choice.propensity, 9) for d in seen if first(d) == model}
        assert counts[model] / 4000 == pytest.approx(logged, abs=0.02)


def test_bandit_learns():
    which = chooser("bandit", {"epsilon": 0.0, "price": 0.0})
    assert first(which.decide(ask())) == "large"
    for _ in range(60):
        which._policies["auto"].learn("unclear", "large", 0.0)
        which._policies["auto"].learn("unclear", "small", 1.0)
    assert first(which.decide(ask())) == "small"


def test_a_conversation_stays_unless_much_better():
    which = chooser("factors", {"quality": 0.0, "price": 1.0, "wait": 0.0})
    stay = ask(session="c1", model="large")
    decision = which.decide(stay)
    which.remember("c1", decision.sequence[0], 2000)
    moved = which.decide(ask(session="c1"))
    assert first(moved) == "small", "a gain of 1 is worth the lost cache"
    equal = chooser("factors", {"quality": 1.0, "price": 1.0, "wait": 0.0})
    which.catalog = equal.catalog
    equal.remember("c1", decision.sequence[0], 2000)
    kept = equal.decide(ask(session="c1"))
    assert first(kept) == "large" and "stays" in kept.choice.reason
    for i in range(5000):
        equal.remember(f"s{i}", decision.sequence[0], 1)
    assert len(equal._sessions) == 4096


def test_metadata_narrows_and_nonsense_is_refused():
    facts = Facts.of(ask(metadata={"galley.residency": "eu,us"}, residency=["eu"]))
    assert facts.residency == {"eu"}
    assert Facts.of(ask(metadata={"galley.max_usd": "0.5"}, max_pico=7)).max_pico == 7
    assert not Facts.of(ask(local_only=False)).local_only
    for metadata in ({"galley.local_only": "yes"}, {"galley.max_usd": "-1"}, {"galley.residency": ","}):
        with pytest.raises(InvalidRequest):
            Facts.of(ask(metadata=metadata))


@pytest.mark.parametrize(
    ("policy", "options", "word"),
    [
        ("fixed", {"x": 1}, "no options"),
        ("factors", {"qality": 1}, "qality"),
        ("factors", {"quality": 0, "price": 0, "wait": 0}, "above 0"),
        ("rules", {"rules": [{"tenant": "a"}]}, "use"),
        ("rules", {"rules": [{"use": ["other"]}]}, "not among"),
        ("bandit", {"epsilon": 2}, "epsilon"),
        ("learned", {}, "needs file"),
        ("learned", {"file": "f"}, "not a router file"),
    ],
)
def test_wrong_options_are_named(policy, options, word):
    with pytest.raises(ConfigError, match=word):
        chooser(policy, options, read=lambda _: b"junk")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[polcy]\n", "polcy"),
        ('[[model]]\nid = "a"\n[[model]]\nid = "a"\n', "twice"),
        ('[[model]]\nid = "a"\nfallback = ["b"]\n', "no model 'b'"),
        ('[[model]]\nid = "a"\ncapabilities = ["fly"]\n', "fly"),
        ('[[route]]\nname = "r"\npolicy = "magic"\nmodels = ["a"]\n', "magic"),
        ("x = [", "TOML"),
    ],
)
def test_wrong_catalogs_are_named(tmp_path, text, word):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=word):
        Catalog.read(path)
