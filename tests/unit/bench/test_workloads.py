"""What the workloads ask of an engine, and which way each figure points."""

import pytest
from benchmarks.workloads import COMPARED, TARGETS, Compared, Figure, Prompts


def test_a_ratio_above_one_is_always_in_our_favour() -> None:
    assert Figure(name="tok/s", more_is_better=True).ratio(200, 100) == 2.0
    assert Figure(name="cold s", more_is_better=False).ratio(1.0, 2.5) == 2.5


def test_room_holds_every_sequence_padded() -> None:
    assert Compared(name="x", kind="decode", prompt=128, sequences=4, steps=64).room == 4 * 256
    assert Compared(name="x", kind="shared", prompt=32, sequences=16, steps=32, common=1024).room == 16 * 1280
    assert Compared(name="x", kind="decode", prompt=8000, steps=64).room <= 8192


def test_prompts_repeat_for_a_seed_and_never_within_one() -> None:
    workload = Compared(name="x", kind="http", prompt=8, sequences=2, requests=3)
    common = [1, 2, 3]
    first = Prompts(5).batch(workload, common)
    assert first == Prompts(5).batch(workload, common)
    assert len(first) == 3
    assert all(p[:3] == common and len(p) == 11 for p in first)
    assert len({tuple(p) for p in first}) == 3


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_names_a_figure_of_a_workload(target: tuple[str, str, str]) -> None:
    _, name, figure = target
    assert figure in {f.name for w in COMPARED if w.name == name for f in w.figures}
