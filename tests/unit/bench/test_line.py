"""The drivers' side of the protocol: what is counted, and what is refused."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from benchmarks.peers.base import DRIVERS


@pytest.fixture(scope="module")
def line() -> ModuleType:
    path = Path(DRIVERS) / "line.py"
    spec = importlib.util.spec_from_file_location("bench_line", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def track(line: ModuleType, *times: float) -> object:
    one = line.Track()
    for at in times:
        one.add([7], at)
    return one


def test_the_rate_is_taken_while_all_sequences_run(line: ModuleType) -> None:
    early, late = track(line, 1.0, 2.0, 3.0, 4.0), track(line, 2.0, 3.0, 4.0, 5.0)
    reply = line.decode_reply(0.5, [early, late], 4)
    assert reply["prefill_s"] == 1.5
    assert reply["decode_s"] == 2.0
    assert reply["tokens"] == 4  # both at 3.0 and at 4.0
    assert reply["total_s"] == 4.5


def test_a_wrong_number_of_tokens_is_an_error(line: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="2 tokens came, 3 were asked for"):
        line.decode_reply(0.0, [track(line, 1.0, 2.0)], 3)
    with pytest.raises(RuntimeError, match="never ran together"):
        line.decode_reply(0.0, [track(line, 1.0, 2.0), track(line, 3.0, 4.0)], 2)


def test_prompts_have_equal_lengths(line: ModuleType) -> None:
    assert line.prompts_of("5 2 1 2 3 4 5 6") == (5, [[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match="equal lengths"):
        line.prompts_of("5 2 1 2 3")


def test_verbs_reach_the_engine(line: ModuleType) -> None:
    class Two(line.Engine):  # type: ignore[misc,name-defined]
        def hello(self) -> dict[str, object]:
            return {"name": "two"}

        def load(self, threads: int, path: str) -> None:
            self.loaded = (threads, path)

        def context(self, tokens: int, sequences: int) -> int:
            return tokens

        def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[object]]:
            return 0.0, [track(line, *(float(i + 1) for i in range(tokens))) for _ in prompts]

    engine = Two()
    assert engine.answer("hello") == {"name": "two"}
    assert set(engine.answer("load 2 /a path")) == {"load_s"}
    assert engine.loaded == (2, "/a path")
    assert engine.answer("context 512 1 0") == {"tokens": 512}
    assert engine.answer("prefill 1 2 3") == {"prefill_s": 1.0, "ids": [7]}
    assert engine.answer("decode 3 2 1 2 3 4")["tokens"] == 6
    assert engine.answer("together 3 2 1 2 3 4")["total_s"] == 3.0
    with pytest.raises(ValueError, match="unknown command"):
        engine.answer("jump")
