"""The harness's statistics against hand-made and directly computed figures."""

import numpy as np
import pytest
from benchmarks.stats import DistanceSums, spread


def test_spread_is_median_and_quartiles() -> None:
    found = spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found.low, found.median, found.high, found.count) == (2.0, 3.0, 4.0, 5)


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_spread_refuses_what_is_no_measurement(samples: list[float]) -> None:
    with pytest.raises(ValueError):
        spread(samples)


def _softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    mass = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return mass / mass.sum(axis=-1, keepdims=True)


def test_distance_equals_the_textbook_formula() -> None:
    noise = np.random.default_rng(3)
    sums = DistanceSums()
    kls, sames, ratios = [], [], []
    for _ in range(3):
        a = noise.normal(size=(100, 37), scale=3).astype(np.float32)
        b = (a + noise.normal(size=a.shape, scale=0.1)).astype(np.float32)
        targets = noise.integers(0, 37, size=100).astype(np.int32)
        sums.add(a, b, targets)
        p, q = _softmax(a), _softmax(b)
        kls.append((p * np.log(p / q)).sum(axis=-1))
        sames.append(a.argmax(-1) == b.argmax(-1))
        rows = np.arange(100)
        ratios.append(np.log(p[rows, targets] / q[rows, targets]))
    found = sums.result()
    kl = np.concatenate(kls)
    assert found.positions == 300 and found.chunks == 3
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_p999 == pytest.approx(np.quantile(kl, 0.999), rel=1e-4)
    assert found.top1 == np.concatenate(sames).mean()
    assert found.perplexity_ratio == pytest.approx(np.exp(np.concatenate(ratios).mean()), rel=1e-5)
    means = [k.mean() for k in kls]
    assert found.kl_mean_se == pytest.approx(np.std(means, ddof=1) / np.sqrt(3), rel=1e-4)


def test_equal_logits_have_no_distance() -> None:
    logits = np.random.default_rng(1).normal(size=(70, 50)).astype(np.float32)
    sums = DistanceSums()
    for _ in range(2):
        sums.add(logits, logits.copy(), np.zeros(70, dtype=np.int32))
    found = sums.result()
    assert (found.kl_mean, found.kl_max, found.top1, found.perplexity_ratio) == (0.0, 0.0, 1.0, 1.0)


def test_a_shift_of_all_logits_is_no_distance() -> None:
    logits = np.random.default_rng(1).normal(size=(10, 50)).astype(np.float32)
    sums = DistanceSums()
    for _ in range(2):
        sums.add(logits, logits + np.float32(7), np.zeros(10, dtype=np.int32))
    assert sums.result().kl_mean == pytest.approx(0.0, abs=1e-5)


def test_broken_logits_are_refused() -> None:
    logits = np.zeros((4, 8), dtype=np.float32)
    broken = logits.copy()
    broken[2, 3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        DistanceSums().add(logits, broken, np.zeros(4, dtype=np.int32))
    with pytest.raises(ValueError, match="shapes"):
        DistanceSums().add(logits, logits[:3], np.zeros(4, dtype=np.int32))
    with pytest.raises(ValueError, match="two chunks"):
        DistanceSums().result()
