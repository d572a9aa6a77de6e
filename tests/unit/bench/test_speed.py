"""Summaries of pairs: ratios inside a pair, calm pairs first, fractions of the limit."""

import pytest
from benchmarks.machine import Limits
from benchmarks.shape import Shape
from benchmarks.speed import Pair, Sample, Workload, calmest, summarise

LIMITS = Limits(
    roundtrip_ns=100,
    megabytes=100,
    threads=2,
    read_1_gb_s=10,
    read_gb_s=20,
    int8_1_gop_s=500,
    int8_gop_s=1000,
    int8_op="vpdpbusd-zmm",
)
SHAPE = Shape(weight_bytes=100_000_000, layer_weights=90_000_000, head_weights=10_000_000)


def pair(ours: float, theirs: float, foreign: float = 0.0) -> Pair:
    """One second each: rates are token counts."""
    samples = [
        Sample(engine="galley", seconds=1.0, tokens=int(ours), foreign_cores=foreign),
        Sample(engine="llama.cpp", seconds=1.0, tokens=int(theirs)),
    ]
    return Pair(before=LIMITS, after=LIMITS, samples=samples)


def test_ratio_is_the_median_of_pairs_not_the_ratio_of_medians() -> None:
    workload = Workload(name="decode", kind="decode", prompt=128, steps=128, target=1.7)
    pairs = [pair(100, 50), pair(200, 50), pair(90, 90)]
    ours, theirs = summarise("m", workload, pairs, SHAPE, "galley")
    assert (ours.engine, ours.ratio, ours.target) == ("galley", None, None)
    assert theirs.ratio is not None and theirs.ratio.median == 2.0
    assert theirs.target == 1.7


def test_achieved_figures() -> None:
    decode = Workload(name="decode", kind="decode", prompt=128, steps=128)
    ours, _ = summarise("m", decode, [pair(100, 50)], SHAPE, "galley")
    assert ours.gb_s == pytest.approx(10.0)
    assert ours.bandwidth_fraction.median == pytest.approx(0.5)
    assert ours.gop_s == pytest.approx(2 * 0.1 * 100)
    batch = Workload(name="batch 4", kind="decode", prompt=128, sequences=4, steps=64)
    ours, _ = summarise("m", batch, [pair(100, 50)], SHAPE, "galley")
    assert ours.gb_s == pytest.approx(2.5)
    prefill = Workload(name="prefill 512", kind="prefill", prompt=512)
    ours, _ = summarise("m", prefill, [pair(512, 256)], SHAPE, "galley")
    assert ours.gb_s == pytest.approx(0.1)
    assert ours.gop_s == pytest.approx(2 * (0.09 + 0.01 / 512) * 512)


def test_calmest_pairs_keep_their_order() -> None:
    pairs = [pair(1, 1, 0.5), pair(2, 1, 0.0), pair(3, 1, 0.3), pair(4, 1, 0.01)]
    assert [p.of("galley").tokens for p in calmest(pairs, 2)] == [2, 4]
