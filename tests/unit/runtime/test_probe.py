"""Measuring steps: which are made, on what blocks, and what becomes of them in an engine."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from galley.runtime import engine as engines
from galley.runtime import probe as probes
from galley.runtime.cost import CostModel
from galley.runtime.costbook import CostBook
from galley.runtime.engine import Engine
from galley.runtime.plan import Rows
from galley.runtime.probe import CostProbe, IdleProbe
from galley.runtime.processors import Busy
from galley.types import SamplingParams
from tests.fake import Bench, FakeBackend


class Timed(FakeBackend):
    """Steps that take as long as it says, on a clock of its own."""

    def __init__(self, seconds: Callable[[int], float], **options: int) -> None:
        super().__init__(**options)
        self.now = 0.0
        self._seconds = seconds

    def run(self, rows: Rows) -> None:
        super().run(rows)
        self.now += self._seconds(len(rows.tokens)) + 1e-6 * sum(rows.context)

    def clock(self) -> float:
        return self.now


def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No doubts: the fake's steps take real time, on a machine that may be busy."""
    monkeypatch.setattr(CostModel, "doubts", None)


def test_the_model_is_what_the_backend_does() -> None:
    backend = Timed(lambda n: 1e-3 * max(4, n))
    model = CostProbe(backend, range(40), clock=backend.clock).run()
    assert model.sizes == (1, 2, 4, 8, 16, 64, 512)
    assert model.predict(300) == pytest.approx(0.3) and model.predict(2) == pytest.approx(0.004)
    assert model.context_s == pytest.approx(1e-6, rel=0.01) and model.context_measured >= 512
    assert model.error == pytest.approx(0.0, abs=1e-3)
    assert model.spent_s == pytest.approx(backend.now) and 0.9 <= model.spent_s < 1.6


def test_no_step_longer_than_allowed() -> None:
    backend = Timed(lambda n: 1e-3 * n)
    longest = [0.0]
    probe = CostProbe(backend, range(40), longest_s=0.07, clock=backend.clock)
    while True:
        before = backend.now
        if not probe.step():
            break
        longest[0] = max(longest[0], backend.now - before)
    assert longest[0] <= 0.07
    model = probe.model()
    assert model.measured_to == 64 and model.predict(512) == pytest.approx(0.512)
    assert model.context_measured >= 400, "attention is measured all the same, on pieces put together"


def test_a_slow_backend_is_measured_for_one_round_only() -> None:
    backend = Timed(lambda n: 2.0)
    model = CostProbe(backend, range(40), clock=backend.clock).run()
    assert model.sizes == (1,) and backend.runs < 8


def test_a_backend_too_slow_for_idle_time_is_left_alone() -> None:
    """Two steps find out; a request that comes waits for one of them at most."""
    backend = Timed(lambda n: 0.2)
    probe = CostProbe(backend, range(40), longest_s=0.05, clock=backend.clock)
    while probe.step():
        pass
    assert backend.runs == 2 and not probe.measured
    with pytest.raises(ValueError):
        probe.model()


def test_few_blocks_and_a_short_context_are_kept_to() -> None:
    backend = Timed(lambda n: 1e-3, context=40)
    assert CostProbe(backend, range(7), clock=backend.clock).run().measured_to == 16
    with pytest.raises(ValueError):
        CostProbe(backend, [])
    with pytest.raises(ValueError, match="blocks"):
        CostProbe(backend, range(2)).time([(40, 0, 1)])


def test_idle_measuring_takes_free_blocks_only_and_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """KV-1, KV-2: the pool is as it was, and what is cached stays cached."""
    calm(monkeypatch)
    bench = Bench(FakeBackend(num_blocks=90), context=900)
    bench.add("a", range(400), max_tokens=2)
    bench.run()
    cached = bench.scheduler.pool.idle
    assert cached >= 25
    kept: list[CostModel] = []
    idle = IdleProbe(bench.scheduler, bench.backend, found=kept.append)
    assert idle.run(lambda: False)
    assert bench.scheduler.cost is kept[0] and kept[0].source == "idle"
    assert bench.scheduler.check() == [] and bench.scheduler.pool.idle == cached
    bench.add("b", range(900 - 10), max_tokens=2)
    bench.run()
    free = bench.scheduler.pool.free
    assert free < IdleProbe.BLOCKS
    assert not IdleProbe(bench.scheduler, bench.backend).run(lambda: False), "no cached block is given up"
    assert bench.scheduler.pool.free == free


def test_work_interrupts_idle_measuring_after_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calm(monkeypatch)
    bench = Bench()
    idle = IdleProbe(bench.scheduler, bench.backend)
    assert not idle.run(lambda: bench.backend.runs >= 3)
    assert bench.backend.runs == 3 and bench.scheduler.cost is None and bench.scheduler.check() == []


def test_a_doubtful_model_is_thrown_away_and_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    monkeypatch.setattr(CostModel, "doubts", property(lambda self: "a crowd"))
    idle = IdleProbe(bench.scheduler, bench.backend, found=lambda model: pytest.fail("kept"))
    assert [idle.run(lambda: False) for _ in range(3)] == [False, False, True]
    assert bench.scheduler.cost is None


def test_a_crowd_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others that use all processors while one thread wants to measure leave less than one."""
    import os

    wall = iter([10.0, 11.0])
    cores = len(os.sched_getaffinity(0))
    used = iter([0.0, float(cores)])
    monkeypatch.setattr(probes, "_work", lambda: (next(wall), next(used)))
    backend = Timed(lambda n: 1e-3)
    model = CostProbe(backend, range(8), clock=backend.clock).run()
    assert model.crowd == pytest.approx(1.0) and model.doubts is not None


def test_foreign_work_leaves_out_our_own() -> None:
    before, busy = probes._work(), Busy.now()
    assert before is not None and before[1] <= busy.used + busy.stolen


def wait_for(truth: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not truth():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_engine_measures_in_its_first_idle_time_and_serves_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calm(monkeypatch)
    monkeypatch.setattr(engines, "IDLE_S", 0.01)
    kept: list[CostModel] = []
    engine = Engine(FakeBackend(num_blocks=64), eos_ids=(), context=900, measure=kept.append)
    engine.start()
    try:
        wait_for(lambda: kept)
        assert engine.scheduler.cost == kept[0]
        assert engine.stats().forecast.steps == 0, "measuring is no serving"
        done = threading.Event()
        engine.submit(
            "a",
            list(range(40)),
            SamplingParams(max_tokens=3, temperature=0.0),
            on_step=lambda out: done.set() if out.last else None,
        )
        assert done.wait(60)
        wait_for(lambda: engine.stats().forecast.steps == 3)
        assert engine.stats().forecast.predicted_s > 0
        assert engine.stats().blocks_used == 0
    finally:
        engine.close()


def test_a_failing_measurement_leaves_the_engine_well(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calm(monkeypatch)
    monkeypatch.setattr(engines, "IDLE_S", 0.01)
    backend = FakeBackend(num_blocks=64, fail_on=frozenset({1}))
    engine = Engine(backend, eos_ids=(), context=900, measure=lambda model: None)
    engine.start()
    try:
        wait_for(lambda: "cost of a step failed" in caplog.text)
        done = threading.Event()
        engine.submit(
            "a",
            [1, 2],
            SamplingParams(max_tokens=1, seed=1),
            on_step=lambda out: done.set() if out.last else None,
        )
        assert done.wait(60) and engine.scheduler.cost is None
    finally:
        engine.close()


def book(folder: Path, weights: str = "abc") -> CostBook:
    return CostBook(folder, FakeBackend(), weights)


MODEL = CostModel(sizes=(1, 8), seconds=(0.5, 0.75), error=0.1, source="idle")


def test_a_kept_model_comes_back_for_the_same_machine_and_weights_only(tmp_path: Path) -> None:
    assert book(tmp_path / "new").read() == (None, None)
    book(tmp_path / "new").write(MODEL)
    assert book(tmp_path / "new").read() == (MODEL, None)
    assert book(tmp_path / "new", "def").read() == (None, None)
    other = FakeBackend()
    other.fingerprint = "fake-2"
    assert CostBook(tmp_path / "new", other, "abc").read() == (None, None)
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".json"], "nothing half-written is left"


def test_any_damage_is_found_told_and_measured_again(tmp_path: Path) -> None:
    """No byte of the file can change and still be believed."""
    kept = book(tmp_path)
    kept.write(MODEL)
    good = kept.path.read_bytes()
    bad = [good[:-20], b"", b"[]", b"\xff\xfe", good.replace(b"0.75", b"0.85"), good.replace(b"abc", b"abd")]
    bad += [good.replace(b'"version": 1', b'"version": 2'), good.replace(b"0.5", b"9.5")]
    for data in bad:
        assert data != good
        kept.path.write_bytes(data)
        model, problem = kept.read()
        assert model is None and problem is not None and "measured again" in problem
    kept.path.unlink()
    kept.path.mkdir()
    model, problem = kept.read()
    assert model is None and problem is not None


def test_a_book_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    kept = book(tmp_path)
    kept.path.mkdir()
    with pytest.raises(OSError):
        kept.write(MODEL)
    assert list(tmp_path.iterdir()) == [kept.path]
