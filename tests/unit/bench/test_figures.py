"""The arithmetic of `galley bench`: percentiles, arrivals, prompts, goodput, ratios, charts."""

import json
import random
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galley.bench import plot as plots
from galley.bench.arrivals import Arrival, poisson, read_trace
from galley.bench.client import Outcome
from galley.bench.compare import Round, summarise
from galley.bench.load import Figures, Loaded, Slo, figures
from galley.bench.plot import Axis, Chart, Series, cumulative, draw, svg
from galley.bench.prompts import Prompts
from galley.bench.stats import Latency, quantile, spread
from galley.errors import ConfigError

floats = st.floats(-1e9, 1e9)


@settings(deadline=None)
@given(st.lists(floats, min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles_are_numpys(values: list[float], share: float) -> None:
    found = quantile(sorted(values), share)
    assert found == pytest.approx(float(np.quantile(values, share)), rel=1e-9, abs=1e-3)
    assert min(values) <= found <= max(values)


@settings(deadline=None)
@given(st.lists(floats, min_size=1, max_size=50))
def test_percentiles_are_in_order(values: list[float]) -> None:
    found = Latency.of(values)
    assert found is not None and found.count == len(values) and found.most == max(values)
    assert min(values) <= found.p50 <= found.p90 <= found.p95 <= found.p99 <= found.most
    quarters = spread(values)
    assert quarters.low <= quarters.median <= quarters.high and quarters.median == found.p50


def test_nothing_has_no_percentiles() -> None:
    assert Latency.of([]) is None
    with pytest.raises(ValueError):
        spread([])
    with pytest.raises(ValueError):
        Latency.of([float("nan")])
    with pytest.raises(ValueError):
        quantile([1.0], 1.1)


@settings(deadline=None)
@given(st.floats(0.01, 1000), st.integers(0, 200), st.integers())
def test_poisson_arrivals_ascend_and_repeat(rate: float, count: int, seed: int) -> None:
    times = [arrival.at for arrival in poisson(rate, count, seed)]
    assert len(times) == count and times == sorted(times) and all(at > 0 for at in times)
    assert times == [arrival.at for arrival in poisson(rate, count, seed)]


def test_poisson_gaps_have_the_exponential_distribution() -> None:
    """Mean and variance of 20,000 gaps at 50 a second, and the share above the mean (1/e)."""
    times = [0.0, *(arrival.at for arrival in poisson(50, 20_000, 7))]
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.02, rel=0.03)
    assert gaps.std() == pytest.approx(0.02, rel=0.04)
    assert (gaps > 0.02).mean() == pytest.approx(np.exp(-1), abs=0.01)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError):
        list(poisson(rate, 1, 0))


def test_traces_are_read_and_their_faults_named(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text('{"at": 0.5, "prompt_tokens": 9}\n\n{"at": 1, "output_tokens": 3}\n')
    assert read_trace(path) == [Arrival(0.5, 9), Arrival(1.0, None, 3)]
    for text, words in [
        ("", "no arrival"),
        ("x\n", "line 1"),
        ('{"at": -1}\n', "line 1"),
        ('{"at": 2}\n{"at": 1}\n', "line 2"),
        ('{"at": 1, "prompt_tokens": 0}\n', "below 1"),
        ('{"at": "soon"}\n', "line 1"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_trace(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none")


@settings(deadline=None)
@given(st.integers(), st.integers(1, 40), st.integers(0, 39), st.integers(0, 20))
def test_prompts_share_what_is_asked_and_no_more(seed: int, tokens: int, shared: int, number: int) -> None:
    shared = min(shared, tokens - 1)
    prompts = Prompts(seed=seed, tokens=tokens, shared=shared)
    ids = prompts.ids(number, range(50_000))
    words = prompts.text(number).split()
    assert len(ids) == len(words) == tokens
    assert ids == Prompts(seed=seed, tokens=tokens, shared=shared).ids(number, range(50_000))
    other, warm = prompts.ids(number + 1, range(50_000)), prompts.ids(-1, range(50_000))
    assert ids[:shared] == other[:shared]
    assert ids[shared:] != other[shared:] or tokens - shared < 3
    assert warm[:shared] != ids[:shared] or shared < 3, "warming up warms no shared prefix"
    assert prompts.text(number).split()[:shared] == prompts.text(number + 1, tokens + 5).split()[:shared]
    assert len(prompts.text(number, tokens + 5).split()) == tokens + 5


def test_a_prompt_of_nothing_of_its_own_is_refused() -> None:
    for tokens, shared in ((0, 0), (4, 4), (4, -1)):
        with pytest.raises(ValueError):
            Prompts(seed=1, tokens=tokens, shared=shared)
    with pytest.raises(ValueError):
        Prompts(seed=1, tokens=9, shared=5).text(0, 5)


def outcome(scheduled: float, *times: float, error: str | None = None, late: float = 0.0) -> Outcome:
    done = times[-1] if times else scheduled + 1.0
    return Outcome(
        scheduled=scheduled,
        sent=scheduled + late,
        times=list(times),
        done=done,
        tokens=len(times),
        prompt_tokens=10,
        counted=True,
        error=error,
    )


LOADED = Loaded(
    [
        outcome(0.0, 0.1, 0.2, 0.4),
        outcome(1.0, 2.0, 2.1, late=0.5),
        outcome(1.0, error="http 503 overloaded"),
        outcome(1.0, 1.1, error="incomplete"),
    ],
    wall_s=4.0,
    client_cpu_s=0.002,
)


def test_latency_counts_from_the_scheduled_arrival() -> None:
    """No coordinated omission: half a second late in sending is half a second of latency."""
    found = figures(LOADED, mode="open")
    assert found.ttft is not None and found.ttft.most == 1.0 and found.ttft.count == 2
    assert found.e2e is not None and found.e2e.most == pytest.approx(1.1)
    assert found.late is not None and found.late.most == 0.5
    assert found.itl is not None and found.itl.count == 3 and found.itl.most == pytest.approx(0.2)


def test_failed_answers_count_as_errors_and_for_nothing_else() -> None:
    found = figures(LOADED, mode="closed", slo=Slo(ttft=0.2))
    assert (found.requests, found.ok, found.late) == (4, 2, None)
    assert found.errors == {"http 503 overloaded": 1, "incomplete": 1}
    assert found.output_tokens == 5 and found.output_tok_s == 1.25 and found.prompt_tokens == 20
    assert found.goodput_share == 0.25 and found.goodput_rps == 0.25
    assert found.client_us_per_token == pytest.approx(400)
    assert found.cached_tokens is None


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(ttft=0.11), True),
        (Slo(ttft=0.09), False),
        (Slo(itl=0.16), True),
        (Slo(itl=0.14), False),
        (Slo(e2e=0.4, ttft=0.1), True),
        (Slo(e2e=0.39), False),
    ],
)
def test_an_objective_holds_for_each_part(slo: Slo, met: bool) -> None:
    assert slo.met(outcome(0.0, 0.1, 0.2, 0.4)) == met
    assert not slo.met(outcome(0.0, 0.1, 0.2, 0.4, error="incomplete"))


def test_objectives_are_parsed() -> None:
    assert Slo.parse([]) is None
    assert Slo.parse(["ttft=0.5", "itl=50ms", "e2e=10s"]) == Slo(ttft=0.5, itl=0.05, e2e=10.0)
    for bad in ("ttft", "ttft=", "ttft=0", "ttft=-1", "ttft=nan", "speed=1", "itl=5 parsecs"):
        with pytest.raises(ConfigError):
            Slo.parse([bad])


def ran(rate: float, ttft: float) -> Figures:
    """A run of one answer of ``rate`` tokens within a second, the first after ``ttft``."""
    gaps = [ttft + k / 1000 for k in range(int(rate))]
    return figures(Loaded([outcome(0.0, *gaps)], wall_s=1.0, client_cpu_s=0.0), mode="closed")


def test_ratios_are_taken_within_rounds() -> None:
    rounds = [
        Round(before=None, after=None, figures={"a": ran(a, 0.1), "b": ran(b, 0.3)})
        for a, b in ((100, 50), (200, 50), (90, 90))
    ]
    ours, theirs = summarise(rounds, ["a", "b"])
    assert ours.rate_ratio is None and ours.output_tok_s.median == 100
    assert theirs.rate_ratio is not None and theirs.rate_ratio.median == 2.0
    assert theirs.ttft_ratio is not None and theirs.ttft_ratio.median == pytest.approx(3.0)
    assert theirs.errors == 0


def test_a_contestant_that_only_fails_has_no_ratio() -> None:
    failed = figures(Loaded([outcome(0.0, error="timeout")], wall_s=1.0, client_cpu_s=0.0), mode="closed")
    rounds = [Round(before=None, after=None, figures={"a": ran(10, 0.1), "b": failed})]
    row = summarise(rounds, ["a", "b"])[1]
    assert row.errors == 1 and row.rate_ratio is None and row.ttft_ratio is None and row.ttft_p50 is None


numbers = st.floats(1e-6, 1e6)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40), st.booleans(), st.booleans())
def test_every_chart_is_well_formed_and_inside_its_frame(
    points: list[tuple[float, float]], log_x: bool, log_y: bool
) -> None:
    chart = Chart(
        title="a < b & c", x="x", y="y", series=[Series("one", sorted(points))], log_x=log_x, log_y=log_y
    )
    root = ET.fromstring(svg(chart))
    line = root.findall("{http://www.w3.org/2000/svg}polyline")[1].attrib["points"]
    for place in line.split():
        x, y = (float(n) for n in place.split(","))
        assert plots.LEFT - 0.1 <= x <= plots.WIDTH - plots.RIGHT + 0.1
        assert plots.TOP - 0.1 <= y <= plots.HEIGHT - plots.BOTTOM + 0.1
    assert len(root.findall("{http://www.w3.org/2000/svg}text")) >= 5, "title, axes, and ticks"


@settings(deadline=None)
@given(numbers, numbers, st.booleans())
def test_axes_have_a_handful_of_ticks(a: float, b: float, log: bool) -> None:
    axis = Axis.over([a, b], log=log, low=0, high=100)
    assert 1 <= len(axis.ticks) <= 20
    assert axis.ticks == sorted(axis.ticks)
    assert -0.01 <= axis.at(min(a, b)) <= axis.at(max(a, b)) <= 100.01


def test_a_chart_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError):
        svg(Chart(title="", x="", y="", series=[]))
    with pytest.raises(ValueError):
        svg(Chart(title="", x="", y="", series=[Series("", [(0.0, 1.0)])], log_x=True))


def test_cumulative_shares_end_at_one_and_stay_few() -> None:
    values = [random.Random(1).random() for _ in range(5000)]
    points = cumulative("x", values).points
    assert len(points) == 200 and points[-1] == (max(values), 1.0) and points[0][0] == min(values)
    assert points == sorted(points)
    assert cumulative("x", [2.0, 1.0]).points == [(1.0, 0.5), (2.0, 1.0)]


def test_png_needs_the_extra_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(plots, "import_module", missing)
    chart = Chart(title="t", x="x", y="y", series=[Series("s", [(1.0, 1.0)])])
    with pytest.raises(ConfigError) as caught:
        draw(chart, tmp_path / "a.png")
    assert "galley[bench]" in str(caught.value.hint)
    with pytest.raises(ConfigError, match=r"\.svg"):
        draw(chart, tmp_path / "a.gif")
    draw(chart, tmp_path / "deep" / "a.svg")
    assert (tmp_path / "deep" / "a.svg").read_text().startswith("<svg")


def test_png_is_drawn_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chart = Chart(
        title="t", x="x", y="y", series=[Series("s", [(1.0, 1.0), (2.0, 3.0)])], log_x=True, log_y=True
    )
    draw(chart, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_prompt_words_are_single_tokens_of_smollm2(smollm2_path: Path) -> None:
    """So that ``--prompt-tokens`` is about right."""
    from galley.bench.prompts import WORDS
    from galley.model.gguf import GGUF
    from galley.model.tokenizer import Tokenizer

    with GGUF.open(smollm2_path) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf)
        long = [word for word in WORDS if len(tokenizer.encode(" " + word, add_bos=False)) != 1]
    assert not long, json.dumps(long)
