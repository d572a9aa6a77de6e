"""The cost model from file to metrics: read at start, held against every step, told when damaged."""

import asyncio
from pathlib import Path

import pytest

from galley.endpoint.metrics import Metrics
from galley.providers.opened import EngineOptions, Opened
from galley.runtime.cost import CostModel
from galley.runtime.costbook import CostBook
from galley.types import SamplingParams

OPTIONS = EngineOptions(threads=1, kv_memory=8 << 20)
MODEL = CostModel(sizes=(1, 64), seconds=(0.5, 0.75), context_measured=64)


def keep(tmp_path: Path, tiny_path: Path) -> Path:
    """A cost model on file for the tiny model; its file."""
    opened = Opened(tiny_path, "tiny", OPTIONS)
    book = CostBook(tmp_path / "cost", opened.engine.backend, opened.model.weights_digest)
    opened.close()
    book.write(MODEL)
    return book.path


async def serve(opened: Opened, tokens: int) -> None:
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    async for _ in opened.engine.stream("a", list(range(40)), params):
        pass


def test_predicted_and_actual_times_reach_the_metrics(tmp_path: Path, tiny_path: Path) -> None:
    keep(tmp_path, tiny_path)
    opened = Opened(tiny_path, "tiny", OPTIONS, costs=tmp_path / "cost", measure=True)
    try:
        assert opened.engine.scheduler.cost == MODEL
        assert not any("damaged" in note for note in opened.notes)
        asyncio.run(serve(opened, 5))
        load = opened.provider.load()
    finally:
        opened.close()
    assert load.predicted_steps == 5
    assert load.step_predicted_seconds == pytest.approx(MODEL.predict(40) + 4 * MODEL.predict(1))
    assert load.step_seconds > 0 and load.step_error_seconds > 0
    text = Metrics().render({"tiny": load}, {})
    assert 'galley:predicted_steps_total{model_name="tiny"} 5\n' in text
    for name in ("step_seconds", "step_predicted_seconds", "step_prediction_error_seconds"):
        assert f'galley:{name}_total{{model_name="tiny"}} ' in text


def test_a_damaged_file_is_told_at_start_and_not_used(tmp_path: Path, tiny_path: Path) -> None:
    path = keep(tmp_path, tiny_path)
    path.write_bytes(path.read_bytes().replace(b"0.75", b"0.95"))
    opened = Opened(tiny_path, "tiny", OPTIONS, costs=tmp_path / "cost")
    try:
        assert opened.engine.scheduler.cost is None
        (note,) = [note for note in opened.notes if "damaged" in note]
        assert note.startswith("warning: ") and "measured again" in note
        asyncio.run(serve(opened, 2))
        assert opened.provider.load().predicted_steps == 0
    finally:
        opened.close()


def test_a_measured_model_is_kept_for_the_next_start(
    tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("galley.runtime.engine.IDLE_S", 0.01)
    monkeypatch.setattr(CostModel, "doubts", None)  # test machines are busy
    opened = Opened(tiny_path, "tiny", OPTIONS, costs=tmp_path / "cost", measure=True)
    try:
        book = CostBook(tmp_path / "cost", opened.engine.backend, opened.model.weights_digest)

        async def found() -> None:
            async with asyncio.timeout(60):
                while not book.path.exists():
                    await asyncio.sleep(0.01)

        asyncio.run(found())
        kept = book.read().model
        assert kept is not None and kept.source == "idle" and kept == opened.engine.scheduler.cost
    finally:
        opened.close()


def test_threads_that_are_too_many_are_warned_of(tiny_path: Path) -> None:
    opened = Opened(tiny_path, "tiny", EngineOptions(threads=99, kv_memory=8 << 20, backend="native"))
    try:
        assert any(note.startswith("warning: 99 threads on") for note in opened.notes)
    finally:
        opened.close()
