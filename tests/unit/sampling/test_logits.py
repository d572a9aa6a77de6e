"""The written-out sampler: order of operations (SMP-1), logprobs (SMP-2), ties (SMP-3), distribution."""

from typing import Any

import numpy as np
import pytest

from galley.errors import EngineFault
from galley.runtime.plan import Drawn, Draws
from galley.runtime.sampling.logits import draw

BASE = [2.0, 1.0, 0.0, -1.0, 1.0]


def one(logits: list[float], **row: Any) -> Drawn:
    draws = Draws()
    draws.add(**{"seed": 0, "position": 0, "lane": 0, "temperature": 0.0, **row})
    return draw(np.array([logits], dtype=np.float32), draws)


def support(logits: list[float], n: int = 200, **row: Any) -> set[int]:
    draws = Draws()
    for position in range(n):
        draws.add(**{"seed": 9, "position": position, "lane": 0, "temperature": 1.0, **row})
    return set(draw(np.array([logits] * n, dtype=np.float32), draws).ids)


def test_smp3_greedy_ties_go_to_the_lowest_id() -> None:
    assert one([0.0, 3.0, 3.0]).ids == [1]
    assert one([0.0, 3.0, 3.0], temperature=9e-6).ids == [1]


def test_bans_and_bias() -> None:
    assert one(BASE, ban=[0]).ids == [1]
    assert one(BASE, bias={3: 3.5}).ids == [3]
    assert one(BASE, ban=[3], bias={3: 100.0}).ids == [0], "a ban outlasts a bias"


def test_repetition_divides_positive_and_multiplies_negative() -> None:
    assert one([2.0, 1.5, -1.0], repetition=2.0, seen={0: 0}).ids == [1]
    assert one([-1.0, -1.5], repetition=2.0, seen={0: 0}).ids == [1]


def test_smp1_bias_comes_before_repetition() -> None:
    # (1 + 3) / 2 = 2 < 2.5, whereas 1 / 2 + 3 = 3.5 would win.
    assert one([2.5, 1.0], bias={1: 3.0}, repetition=2.0, seen={1: 0}).ids == [0]
    # (1 + 9) / 2 = 5 wins, whereas the bias lost would not.
    assert one([2.5, 1.0], bias={1: 9.0}, repetition=2.0, seen={1: 0}).ids == [1]


def test_frequency_and_presence_count_the_output_only() -> None:
    assert one([2.0, 1.5], frequency=0.3, seen={0: 2}).ids == [1]
    assert one([2.0, 1.5], frequency=0.3, seen={0: 1}).ids == [0]
    assert one([2.0, 1.5], presence=0.6, seen={0: 5}).ids == [1]
    assert one([2.0, 1.5], presence=2.0, frequency=2.0, seen={0: 0}).ids == [0]


def test_top_k_ties_at_the_border_go_to_lower_ids() -> None:
    assert support(BASE, top_k=2) == {0, 1}
    assert support(BASE, top_k=3) == {0, 1, 4}
    assert support(BASE, top_k=-1) == {0, 1, 2, 3, 4}
    assert support(BASE, top_k=99) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_smallest_sufficient_prefix() -> None:
    logits = np.log([0.5, 0.25, 0.15, 0.1]).tolist()
    assert support(logits, top_p=0.45) == {0}
    assert support(logits, top_p=0.6) == {0, 1}
    assert support(logits, top_p=0.8) == {0, 1, 2}
    assert support(logits, top_p=0.0) == {0}, "always at least one"


def test_top_p_is_renormalised_over_what_top_k_left() -> None:
    # Of {0.5, 0.25} the first holds 0.667.
    logits = np.log([0.5, 0.25, 0.15, 0.1]).tolist()
    assert support(logits, top_k=2, top_p=0.6) == {0}
    assert support(logits, top_p=0.6) == {0, 1}


def test_min_p_is_relative_to_the_best_and_after_temperature() -> None:
    logits = np.log([0.6, 0.25, 0.1, 0.05]).tolist()
    assert support(logits, min_p=0.3) == {0, 1}
    assert support(logits, min_p=1.0) == {0}
    # At T = 2 the ratio of 0.1 to 0.6 is its square root, 0.41.
    assert support(logits, min_p=0.3, temperature=2.0) == {0, 1, 2}


def test_draws_follow_the_softmax() -> None:
    p = np.array([0.4, 0.3, 0.2, 0.07, 0.03])
    n = 10_000
    draws = Draws()
    for position in range(n):
        draws.add(seed=3, position=position, lane=0, temperature=0.5)
    logits = np.tile(0.5 * np.log(p).astype(np.float32), (n, 1))
    counts = np.bincount(draw(logits, draws).ids, minlength=5)
    chi2 = float(((counts - n * p) ** 2 / (n * p)).sum())
    assert chi2 < 18.5, "p = 0.001 with 4 degrees of freedom"


def test_smp4_a_row_is_drawn_alike_alone_and_in_a_batch() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (16, 300)).astype(np.float32)
    batch = Draws()
    rows: list[dict[str, Any]] = [
        {
            "seed": i * 7,
            "position": i,
            "lane": i % 3,
            "temperature": 0.2 * i,
            "top_k": i * 5,
            "top_p": 1 - i / 40,
            "min_p": 0.01 * (i % 2),
            "seen": {i: 1, i + 1: 0} if i % 2 else None,
            "repetition": 1.2,
            "logprobs": i % 4 - 1,
        }
        for i in range(16)
    ]
    for row in rows:
        batch.add(**row)
    together = draw(logits, batch)
    for i, row in enumerate(rows):
        alone = Draws()
        alone.add(**row)
        found = draw(logits[i : i + 1], alone)
        assert found.ids == together.ids[i : i + 1]
        assert found.ranks == together.ranks[i : i + 1]
        assert found.tops == together.tops[i : i + 1]


def test_smp2_logprobs_are_of_the_raw_model() -> None:
    plain = np.array(BASE) - np.log(np.exp(BASE).sum())
    found = one(BASE, bias={3: 50.0}, logprobs=2)
    assert found.ids == [3]
    assert found.logprobs[0] == pytest.approx(plain[3], abs=1e-6)
    assert found.ranks == [5]
    assert [i for i, _ in found.tops[0]] == [0, 1]
    assert one(BASE, bias={3: 50.0}, logprobs=0).logprobs == found.logprobs, "whatever top_n is"
    assert one(BASE, ban=[0, 1], logprobs=0).ranks == [3], "equal logits rank by id"
    none = one(BASE)
    assert np.isnan(none.logprobs[0]) and none.ranks == [0] and none.tops == [[]]


@pytest.mark.parametrize("bad", [[float("nan"), 1.0], [float("inf"), 1.0], [float("-inf")] * 2])
def test_no_finite_maximum_is_a_fault(bad: list[float]) -> None:
    with pytest.raises(EngineFault):
        one(bad)


def test_logits_are_not_written_to() -> None:
    logits = np.array([BASE], dtype=np.float32)
    draws = Draws()
    draws.add(seed=0, position=0, lane=0, temperature=1.0, ban=[0], bias={1: 1.0})
    draw(logits, draws)
    assert logits.tolist() == [BASE]
