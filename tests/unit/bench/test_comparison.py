"""Rows of the comparison: ratios inside a round, failures shown, runs merged."""

import pytest
from benchmarks.comparison import Line, calmest, lines_of, merged, table
from benchmarks.machine import Limits
from benchmarks.participant import Round, Sampled
from benchmarks.shape import Shape
from benchmarks.stats import spread
from benchmarks.workloads import COMPARED, Compared

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
DECODE = next(w for w in COMPARED if w.name == "decode")
SHARED = next(w for w in COMPARED if w.name == "shared prefix")


def taken(foreign: float = 0.0, **rates: float) -> Round:
    samples = [
        Sampled(engine=engine, figures={"tok/s": rate}, foreign_cores=foreign, ids=[])
        for engine, rate in rates.items()
    ]
    return Round(before=LIMITS, after=LIMITS, samples=samples)


def lines(workload: Compared, rounds: list[Round], problems: dict[str, str] | None = None) -> list[Line]:
    return lines_of("smollm2-q4_0", workload, rounds, problems or {}, shape=SHAPE, same_file=["galley"])


def test_ratio_is_the_median_of_rounds_and_the_target_is_on_the_hardest_peer() -> None:
    rounds = [taken(galley=100, a=50, b=80), taken(galley=200, a=50, b=100), taken(galley=90, a=90, b=90)]
    ours, hardest, other = lines(DECODE, rounds)
    assert (ours.engine, ours.ratio, ours.target) == ("galley", None, None)
    assert (hardest.engine, hardest.target) == ("b", 2.3)
    assert hardest.ratio is not None and hardest.ratio.median == 1.25
    assert (other.engine, other.target) == ("a", None)
    assert other.ratio is not None and other.ratio.median == 2.0


def test_the_limit_is_told_only_for_engines_on_the_same_file() -> None:
    ours, theirs = lines(DECODE, [taken(galley=100, a=50)])
    assert ours.limit == pytest.approx(0.5)  # 0.1 GB a token, 100 tokens a second, of 20 GB/s
    assert theirs.limit is None
    assert (ours.roundtrip_ns, ours.read_gb_s) == (100, 20)


def test_less_is_better_for_seconds() -> None:
    def shared(engine: str, cold: float) -> Sampled:
        return Sampled(engine=engine, figures={"cold s": cold, "warm s": cold / 2}, foreign_cores=0, ids=[])

    rounds = [Round(before=LIMITS, after=LIMITS, samples=[shared("galley", 2.0), shared("a", 5.0)])]
    _, cold, _, warm = lines(SHARED, rounds)
    assert (cold.figure, warm.figure) == ("cold s", "warm s")
    assert cold.ratio is not None and cold.ratio.median == 2.5
    assert cold.target == 2.3


def test_an_engine_without_figures_is_a_row_with_its_reason() -> None:
    text = table(lines(DECODE, [taken(galley=100)], {"vllm bf16": "cannot be installed: no wheel"}))
    assert "cannot be installed: no wheel" in text
    assert "vllm bf16" in text


def test_a_lost_row_is_marked() -> None:
    text = table(lines(DECODE, [taken(galley=100, a=125)]))
    assert "0.80× **lost**" in text


def test_calmest_rounds_keep_their_order() -> None:
    rounds = [taken(0.5, galley=1), taken(0.0, galley=2), taken(0.3, galley=3), taken(0.01, galley=4)]
    assert [r.samples[0].figures["tok/s"] for r in calmest(rounds, 2)] == [2, 4]


def test_a_later_run_replaces_an_engines_rows_of_a_workload() -> None:
    def line(engine: str, value: float | None, problem: str | None = None) -> Line:
        return Line(
            model="m",
            workload="decode",
            figure="tok/s" if value else "",
            engine=engine,
            value=spread([value]) if value else None,
            problem=problem,
        )

    first = [line("galley", 1.0), line("a", None, "broke")]
    again = [line("a", 2.0)]
    assert [(x.engine, x.problem) for x in merged([first, again])] == [("galley", None), ("a", None)]
