"""The fitted cost of a step: exact where it was measured, never falling, open about its error."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galley.errors import EngineFault
from galley.runtime.cost import CROWD, ERROR, CostModel, Sample, fit, shape_of
from tests.fake import Bench, FakeBackend

SIZES = (1, 2, 4, 8, 16, 64, 512)


def truth(tokens: int, context: int, outputs: int, chunked: int) -> float:
    """A machine: memory-bound up to eight tokens, then bound by arithmetic."""
    return 1e-3 * max(5.0, 0.625 * tokens) + 1e-4 * outputs + 2e-6 * context + 3e-7 * chunked


def measured(tokens: int, context: int = 0, outputs: int = 0, chunked: int = 0) -> Sample:
    return Sample(tokens, context, outputs, chunked, truth(tokens, context, outputs, chunked))


def everything() -> list[Sample]:
    return [
        *(measured(n) for n in SIZES),
        *(measured(n, outputs=n) for n in SIZES[:5]),
        measured(1, context=512),
        measured(64, chunked=64 * 512),
    ]


def test_exact_samples_are_predicted_exactly_between_and_beyond() -> None:
    model = fit(everything(), [measured(6, outputs=6), measured(100, chunked=900)])
    for tokens, context, outputs, chunked in [
        (1, 0, 0, 0),
        (1, 2000, 1, 0),
        (6, 700, 6, 0),
        (12, 0, 3, 0),
        (300, 0, 1, 50_000),
        (1024, 0, 40, 0),
    ]:
        found = model.predict(tokens, context, outputs, chunked)
        assert found == pytest.approx(truth(tokens, context, outputs, chunked))
    assert model.error == pytest.approx(0.0, abs=1e-9)
    assert model.ratio(16) == pytest.approx((10 + 1.6) / (5 + 0.1))
    assert (model.measured_to, model.context_measured) == (512, 512)


def test_no_tokens_take_no_time() -> None:
    assert fit(everything()).predict(0) == 0.0


def test_medians_shrug_off_a_disturbed_step() -> None:
    samples = everything() * 3 + [Sample(4, 0, 0, 0, 1.0), Sample(1, 0, 1, 0, 2.0)]
    assert fit(samples).predict(4, outputs=1) == pytest.approx(truth(4, 0, 1, 0))


def test_the_error_is_that_of_steps_left_out() -> None:
    model = fit(everything(), [Sample(4, 0, 0, 0, truth(4, 0, 0, 0) * 2)])
    assert model.error == pytest.approx(0.5)
    assert fit(everything()).error is None


def test_a_step_without_tokens_alone_is_not_enough() -> None:
    with pytest.raises(ValueError):
        fit([measured(1, outputs=1)])


times = st.floats(1e-6, 10.0)
samples = st.lists(
    st.builds(
        Sample, st.integers(1, 600), st.integers(0, 900), st.integers(0, 20), st.integers(0, 90_000), times
    ),
    max_size=30,
)


@settings(deadline=None)
@given(samples, times, st.data())
def test_whatever_was_measured_more_never_costs_less(
    found: list[Sample], first: float, data: st.DataObject
) -> None:
    """Monotone in every argument, also for noise; the scheduler compares plans by it."""
    model = fit([Sample(1, 0, 0, 0, first), *found])
    small = [data.draw(st.integers(1, 2000)), *(data.draw(st.integers(0, 2000)) for _ in range(3))]
    large = [n + data.draw(st.integers(0, 2000)) for n in small]
    assert 0 < model.predict(*small) <= model.predict(*large) * (1 + 1e-9) < float("inf")


@settings(deadline=None)
@given(samples, times)
def test_a_model_survives_json(found: list[Sample], first: float) -> None:
    model = fit([Sample(1, 0, 0, 0, first), *found], found)
    assert msgspec.json.decode(msgspec.json.encode(model), type=CostModel) == model


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": ()},
        {"sizes": (1, 1)},
        {"sizes": (0, 2)},
        {"seconds": (2.0, 1.0)},
        {"seconds": (0.0, 1.0)},
        {"seconds": (1.0, float("nan"))},
        {"seconds": (1.0,)},
        {"outputs": (1,), "output_seconds": (0.5,)},
        {"context_s": -1.0},
        {"chunk_s": float("inf")},
    ],
)
def test_an_impossible_model_is_refused(change: dict[str, object]) -> None:
    good: dict[str, object] = {"sizes": (1, 2), "seconds": (1.0, 2.0)}
    CostModel(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        CostModel(**{**good, **change})  # type: ignore[arg-type]


def test_doubts_name_their_reason() -> None:
    good = CostModel(sizes=(1,), seconds=(1.0,), crowd=CROWD / 2, error=ERROR / 2)
    assert good.doubts is None
    assert "processors" in str(msgspec.structs.replace(good, crowd=CROWD * 2).doubts)
    assert "%" in str(msgspec.structs.replace(good, error=ERROR * 2).doubts)
    assert msgspec.structs.replace(good, crowd=None, error=None).doubts is None


def test_the_loop_holds_steps_against_the_scheduler_s_model() -> None:
    """Each step's shape is that of its plan: chunks, then decodes with their contexts."""
    bench = Bench(token_budget=20)
    bench.scheduler.cost = fit(everything())
    shapes = []
    plan_of = bench.scheduler.plan

    def spy(now: float):  # type: ignore[no-untyped-def]
        plan = plan_of(now)
        shapes.append(shape_of(plan))
        return plan

    bench.scheduler.plan = spy  # type: ignore[method-assign]
    bench.add("a", range(30), max_tokens=3)
    bench.run()
    assert shapes == [(20, 0, 0, 0), (10, 0, 1, 200), (1, 30, 1, 0), (1, 31, 1, 0)]
    forecast = bench.loop.forecast
    assert forecast.steps == 4
    assert forecast.predicted_s == pytest.approx(sum(truth(*shape) for shape in shapes))
    # The fake's clock stands still within a step.
    assert forecast.seconds == 0.0 and forecast.error_s == pytest.approx(forecast.predicted_s)


def test_a_failed_step_says_nothing_of_the_model() -> None:
    bench = Bench(FakeBackend(fail_on=frozenset({0}), error=EngineFault))
    bench.scheduler.cost = fit(everything())
    bench.add("a", range(5))
    bench.run()
    assert bench.loop.faults == 1 and bench.loop.forecast.steps == 0


def test_without_a_model_nothing_is_predicted() -> None:
    bench = Bench()
    bench.add("a", range(5), max_tokens=2)
    bench.run()
    assert bench.loop.forecast.steps == 0
