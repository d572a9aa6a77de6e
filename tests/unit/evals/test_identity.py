"""The test of identity: its level where nothing differs, and what it finds."""

import json
import random

import pytest

from galley.errors import InvalidRequest
from galley.evals.identity import hamming, mmd, same_model
from tests.e2e.test_routing import Elsewhere
from tests.unit.cli.test_route import invoke

import numpy as np  # isort: skip

WORDS = ["sea", "sky", "rain", "stone", "light", "river", "road", "bird"]


def answers(rng, weights, prompts=6, samples=10):
    return {
        f"p{i}": [" ".join(rng.choices(WORDS, weights, k=5)) for _ in range(samples)] for i in range(prompts)
    }


def test_the_kernel_and_the_distance_by_hand():
    kernel = hamming(["ab", "ab", "ax"])
    assert kernel[0, 1] == 1.0 and kernel[0, 2] == pytest.approx(1 - 1 / 200)
    flat = np.array([[0, 1, 0.2, 0.2], [1, 0, 0.2, 0.2], [0.2, 0.2, 0, 1], [0.2, 0.2, 1, 0]])
    sides = np.array([[1.0, 1, 0, 0]])
    assert mmd(flat, sides, 2, 2)[0] == pytest.approx(1 + 1 - 2 * 0.2)


def test_false_alarms_stay_at_the_level():
    rng = random.Random(1)
    wrong = sum(
        not same_model(
            answers(rng, [1] * 8), answers(rng, [1] * 8), alpha=0.05, permutations=199, seed=i
        ).same
        for i in range(120)
    )
    # 6 are expected of 120; 13 or more would be a chance of one in 200
    assert wrong <= 13, f"{wrong} false alarms in 120 at a level of 0.05"


def test_another_model_is_found():
    rng = random.Random(2)
    found = 0
    for i in range(20):
        other = answers(rng, [4, 4, 1, 1, 1, 1, 1, 1])
        verdict = same_model(answers(rng, [1] * 8), other, alpha=0.05, permutations=199, seed=i)
        found += not verdict.same
    assert found >= 15, f"{found} of 20 found"
    verdict = same_model(answers(rng, [1] * 8), answers(rng, [9, 9, 0, 0, 0, 0, 0, 0]), seed=3)
    assert not verdict.same and verdict.p_value < 0.005 and verdict.distance > 0.05


def test_what_cannot_be_tested_is_refused():
    with pytest.raises(InvalidRequest, match="no prompt"):
        same_model({"a": ["x"]}, {"a": ["x", "y"]})
    with pytest.raises(InvalidRequest, match="level"):
        same_model({"a": ["x", "y"]}, {"a": ["x", "y"]}, alpha=0.001, permutations=100)


def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    """Two servers that say the same, and one that does not."""
    lines = "".join(
        f"""
[[provider]]
name = "{name}"
kind = "openai"
url = "{{{name}}}"
[[provider.offer]]
model = "big"
price = [{{{{ input = "1", output = "1" }}}}]
"""
        for name in ("one", "two", "liar")
    )
    with Elsewhere() as one, Elsewhere() as two, Elsewhere() as liar:
        liar.words = ["Quite ", "another ", "voice."]
        catalog = tmp_path / "catalog.toml"
        head = '[policy]\nlocation = "any"\n[[model]]\nid = "big"\n'
        catalog.write_text(head + lines.format(one=one.url, two=two.url, liar=liar.url))
        monkeypatch.setenv("GALLEY_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("GALLEY_CATALOG", str(catalog))
        few = ["--samples", "5", "--json"]
        kept = tmp_path / "kept.json"
        assert invoke(["route", "identity", "big", "--provider", "two", "--against", "one", *few]) == 0
        assert json.loads(capsys.readouterr().out)["same"] is True
        assert invoke(["route", "identity", "big", "--provider", "one", "--record", str(kept), *few]) == 0
        capsys.readouterr()
        liar_against = ["route", "identity", "big", "--provider", "liar", "--reference", str(kept)]
        assert invoke([*liar_against, *few]) == 6
        shown = json.loads(capsys.readouterr().out)
        assert shown["same"] is False and shown["p_value"] <= 0.01
        assert invoke([*liar_against, "--max-tokens", "9"]) == 2
        assert invoke(["route", "identity", "big", "--provider", "none", "--against", "one"]) == 2
        assert invoke(["route", "identity", "big", "--provider", "one"]) == 2
