"""Outcomes, figures and training of routers, on small made-up data with a known answer."""

import gzip
import json
import random
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest

from galley.errors import ConfigError, InvalidRequest
from galley.evals.curve import Curve, measure
from galley.evals.offpolicy import Logged, estimate
from galley.evals.outcomes import Outcomes, Prices
from galley.evals.study import cross_validate, curve_of, evaluate, folds, trained
from galley.evals.train import target, train, train_plain
from galley.router.features import FORM, form, words
from galley.router.scorer import Scorer

HARD, EASY = ["prove", "integral", "theorem"], ["colour", "capital", "animal"]


def made_up(n=300, seed=0, path=None):
    """A pair of models; the strong one is needed exactly for the hard words, with some noise."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        hard = rng.random() < 0.4
        text = f"question {i} about {rng.choice(HARD if hard else EASY)} " + "x" * rng.randint(0, 30)
        noise = rng.random() < 0.05
        rows.append((text, f"s{i % 7}", int(not hard) ^ noise, 1))
    lines = ["prompt,subject,weak_correct,strong_correct,decontaminated"]
    lines += [f'"{t}",{s},{int(w)},{b},1' for t, s, w, b in rows]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return Outcomes.read(path)


@pytest.fixture
def pair(tmp_path):
    return made_up(path=tmp_path / "made-up.csv.gz")


def many(tmp_path, n=60):
    rng = random.Random(1)
    path = tmp_path / "m.jsonl"
    with path.open("w") as file:
        for i in range(n):
            code = rng.random() < 0.5
            row = {
                "question": f"{'python' if code else 'poem'} {i}\u2028line",
                "scores": {"a": 0.2, "b": 1.0 * code, "c": 0.8},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    prices = tmp_path / "p.json"
    table = {"a": 1.0, "b": 2.0, "c": 9.0}
    prices.write_text(
        json.dumps({"models": {k: {"input_price": v, "output_price": v} for k, v in table.items()}})
    )
    return path, prices


def test_figures_of_known_policies(pair):
    n = len(pair)
    gain = target(pair)[1][:, 0]
    curves = {
        "oracle": Curve.of_gain(gain),
        "worst": Curve.of_gain(-gain),
        "random": Curve.of_gain(np.zeros(n)),
        "small": Curve.constant(0, n),
        "large": Curve.constant(1, n),
    }
    found = measure(pair, curves, resamples=200)
    assert found["random"]["apgr"].value == pytest.approx(0.5, abs=0.15)
    assert found["oracle"]["apgr"].value > 0.75
    assert found["worst"]["apgr"].value < 0.3
    assert found["small"]["apgr"].value == pytest.approx(0, abs=1e-9)
    assert found["large"]["apgr"].value == pytest.approx(0.05)
    assert found["oracle"]["cpt50"].value < found["random"]["cpt50"].value < found["worst"]["cpt50"].value
    assert found["oracle"]["regret"].value == pytest.approx(0, abs=1e-9)
    assert found["oracle"]["cost_saved_at_best_single"].value > 0.4
    for figures in found.values():
        for name, figure in figures.items():
            assert figure.low - 1e-9 <= figure.value <= figure.high + 0.1, name


def test_apgr_by_hand():
    """Of four prompts the strong model alone is right on two; sent first they close the gap at half cost."""
    quality = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    data = Outcomes(
        name="x", prompts=list("abcd"), groups=[""] * 4, models=["w", "s"], quality=quality,
        cost=np.tile([0.0, 1.0], (4, 1)), unit="calls",
    )  # fmt: skip
    found = measure(data, {"p": Curve.of_gain(np.array([2.0, 1.0, 0.0, -1.0]))}, resamples=0)["p"]
    # PGR rises from 0 to 1 over costs 0 to 0.5 and stays
    assert found["apgr"].value == pytest.approx(0.75, abs=0.01)
    assert found["cpt50"].value == pytest.approx(0.25, abs=0.01)
    assert found["aiq"].value == pytest.approx(0.5 + 0.5 * 0.75, abs=0.01)
    assert found["cost_saved_at_best_single"].value == pytest.approx(0.5, abs=0.01)


def test_folds_leak_nothing(pair):
    by_row, by_subject = folds(pair, "prompt", 5), folds(pair, "subject", 5)
    assert set(by_row) == set(by_subject) == set(range(5))
    places = {name: {by_subject[i] for i, g in enumerate(pair.groups) if g == name} for name in pair.groups}
    assert all(len(found) == 1 for found in places.values())
    some = np.arange(0, len(pair), 3)
    assert (folds(pair.take(some), "prompt", 5) == by_row[some]).all(), "a row's fold depends on it alone"
    with pytest.raises(InvalidRequest, match="7 subjects"):
        folds(pair, "subject", 8)


def test_training_learns_and_the_file_says_the_same(pair, tmp_path):
    file, held = trained(pair, holdout=0.25)
    assert 50 < len(held) < 150 and not set(held.keys) & set(file.keys)
    raw = msgspec.msgpack.encode(file)
    again = train(pair.take(np.arange(len(pair))), lean=True)
    assert msgspec.msgpack.encode(again) == msgspec.msgpack.encode(train(pair, lean=True)), (
        "same data, same file"
    )
    scorer = Scorer.decode(raw)
    assert scorer.scores("about a theorem")[0] > scorer.scores("about an animal")[0] + 0.3
    report = evaluate(file, pair, resamples=200)
    assert report["rows"] == len(held) and report["left_out_as_trained_on"] == len(file.keys)
    policies = report["policies"]
    assert policies["galley"]["apgr"].low > policies["random"]["apgr"].high
    wanted = {
        "random",
        "always-small",
        "always-large",
        "best-single",
        "oracle",
        "prompt-length",
        "tfidf-logistic",
    }
    assert wanted | {"galley"} == set(policies)
    share = np.mean([scorer.scores(p)[0] > file.thresholds["cost25"] for p in held.prompts])
    assert share == pytest.approx(0.25, abs=0.2), "a threshold means what its name says"
    everything = msgspec.structs.replace(file, keys=sorted(pair.keys))
    with pytest.raises(InvalidRequest, match="not trained on"):
        evaluate(everything, pair)


def test_the_scorer_equals_what_was_fitted(pair):
    """Serving is our own arithmetic: it must give what scikit-learn gives."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    file = train_plain(pair)
    x = TfidfVectorizer(
        analyzer=lambda text: ["w:" + word for word in words(text)], min_df=2, sublinear_tf=True
    ).fit(pair.prompts)
    model = LogisticRegression(C=1.0, max_iter=200, solver="liblinear")
    model.fit(x.transform(pair.prompts), target(pair)[1][:, 0] > 0)
    unseen = ["theorem theorem capital", "nothing known here", "question 7 about colour xx"]
    scorer = Scorer(file)
    for text, expected in zip(unseen, model.decision_function(x.transform(unseen)), strict=True):
        assert scorer.scores(text)[0] == pytest.approx(expected, abs=1e-5)


def test_many_models(tmp_path):
    path, prices = many(tmp_path)
    data = Outcomes.read(path, Prices.read(prices))
    assert data.models == ["a", "b", "c"] and "micro-dollars" in data.unit and len(data) == 60
    found = measure(data, {"oracle": curve_of(data, data.quality)}, resamples=50)["oracle"]
    assert found["quality_at_best_single_cost"].value == pytest.approx(data.quality.max(axis=1).mean())
    report = cross_validate(data, "prompt", count=3, resamples=50)
    assert report["galley"]["cost_saved_at_best_single"].value > 0.2
    assert "calls" in Outcomes.read(path).unit
    bad = Prices({"a": (1, 1)}, "p.json")
    with pytest.raises(InvalidRequest, match="never zero"):
        Outcomes.read(path, bad)


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("a.csv", "prompt,weak_correct\nx,1\n", "columns"),
        ("a.csv", "", "empty"),
        ("a.csv", "prompt,weak_correct,strong_correct\nx,2,1\n", "outside"),
        ("a.jsonl", '{"question": "x"}\n', "line 1"),
        (
            "a.jsonl",
            '{"question": "x", "scores": {"a": 1}}\n{"question": "y", "scores": {"b": 1}}\n',
            "other models",
        ),
    ],
)
def test_bad_data_is_named(tmp_path, name, text, word):
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidRequest, match=word):
        Outcomes.read(tmp_path / name)


def test_bad_router_files():
    for raw in (b"", b"nonsense", msgspec.msgpack.encode({"version": 1})):
        with pytest.raises(ConfigError):
            Scorer.decode(raw)


def test_form_has_its_names_and_bounds():
    for text in ("", "x", "A. 1\nB. 2\nC. 3", "ü" * 20_000, "```def f(): return 1```", "\x00\ud800"):
        assert len(form(text)) == len(FORM) and all(np.isfinite(form(text)))


def test_a_learned_decision_takes_less_than_a_millisecond(pair):
    """The budget is 1 ms at the median for a hundred words; shared test machines get five times that."""
    scorer = Scorer(train(pair, lean=True))
    text = " ".join(f"{random.Random(i).choice(HARD + EASY)}{i % 40}" for i in range(100))
    times = []
    for _ in range(50):
        began = time.perf_counter()
        scorer.scores(text)
        times.append(time.perf_counter() - began)
    assert sorted(times)[25] < 0.005


def test_off_policy_estimates_find_the_truth():
    """Logged by a coin; the other policy always takes b, which is right 80 % of the time."""
    rng = random.Random(0)
    log = []
    for _ in range(4000):
        chosen = rng.choices(["a", "b"], [0.7, 0.3])[0]
        reward = float(rng.random() < {"a": 0.5, "b": 0.8}[chosen])
        log.append(
            Logged(chosen=chosen, propensity={"a": 0.7, "b": 0.3}[chosen], reward=reward, other="b",
                   expected={"a": 0.4, "b": 0.9})
        )  # fmt: skip
    found = estimate(log)
    for figure in (found.ips, found.snips, found.dr):
        assert figure.low < 0.8 < figure.high
    assert found.dr.high - found.dr.low < found.ips.high - found.ips.low
    assert found.logged.value == pytest.approx(0.59, abs=0.03) and found.matched == pytest.approx(
        0.3, abs=0.03
    )
    with pytest.raises(ValueError, match="propensity"):
        estimate([Logged(chosen="a", propensity=0.0, reward=1, other="a")])


def test_serving_a_trained_router_needs_no_scikit_learn(pair, tmp_path):
    path = tmp_path / "r"
    path.write_bytes(msgspec.msgpack.encode(train(pair, lean=True)))
    code = (
        "import sys; sys.modules['sklearn'] = sys.modules['scipy'] = sys.modules['numpy'] = None\n"
        "from pathlib import Path; from galley.router.scorer import Scorer\n"
        f"print(Scorer.read(Path({str(path)!r})).scores('theorem')[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PYTHONPATH": "src"}
    )
    assert done.returncode == 0 and float(done.stdout) > 0, done.stderr
