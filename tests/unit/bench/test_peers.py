"""The registry of peers, and what an engine that fails leaves behind."""

from pathlib import Path
from typing import Any

import pytest
from benchmarks.compare import take_rounds
from benchmarks.machine import Limits
from benchmarks.participant import Participant, Sampled, Task
from benchmarks.peers import PEERS, Unsupported, peers_for
from benchmarks.peers.base import Model, Peer, VenvPeer
from benchmarks.peers.venv import Venv
from benchmarks.protocol import Driver, DriverError
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
MODEL = Model(label="m-q4_0", family="m", bits=4, gguf=Path("m.gguf"), folder=Path("m-hf"))
DECODE = next(w for w in COMPARED if w.name == "decode")


class Paper(Peer):
    """An engine of paper: only its name is read."""

    def __init__(self, name: str) -> None:
        self.name = name

    def install(self) -> None:
        pass

    def prepare(self, model: Model) -> Path:
        return model.gguf

    def start(self) -> Driver:
        raise FileNotFoundError("paper does not run")

    def describe(self) -> dict[str, Any]:
        return {}


class Actor(Participant):
    """Plays its part in the rounds: fails in sample ``fails_at``, or is not able at all."""

    def __init__(self, name: str, *, fails_at: int | None = None, able: bool = True) -> None:
        super().__init__(Paper(name), MODEL, 2)
        self.samples = 0
        self.tasks: list[Task] = []
        self._fails_at = fails_at
        self._able = able

    def ready(self, workload: Compared) -> None:
        if not self._able:
            raise Unsupported("cannot do this")

    def rest(self) -> None:
        pass

    def sample(self, workload: Compared, task: Task) -> Sampled:
        if self.samples == self._fails_at:
            raise DriverError(f"{self.name} fell over")
        self.samples += 1
        self.tasks.append(task)
        return Sampled(engine=self.name, figures={"tok/s": 1.0}, foreign_cores=0.0, ids=[])


def test_openvino_follows_the_bits_of_the_file() -> None:
    assert peers_for("openvino", 4).name == "openvino int4"
    assert peers_for("openvino", 8).name == "openvino int8"
    assert peers_for("openvino-int8", 4).name == "openvino int8"


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_has_a_name_and_its_driver(name: str) -> None:
    peer = PEERS[name]()
    assert peer.name
    if isinstance(peer, VenvPeer):
        drivers = Path(__file__).resolve().parents[3] / "benchmarks" / "drivers"
        assert (drivers / peer.script).exists()
        assert all("==" in pin for pin in peer.venv.requirements)


def test_names_are_different() -> None:
    assert len({PEERS[name]().name for name in PEERS}) == len(PEERS)


def test_all_engines_get_the_same_prompts_in_every_round() -> None:
    a, b = Actor("a"), Actor("b")
    rounds, problems = take_rounds(DECODE, [a, b], lambda: LIMITS, repeats=3, spare=2, seed=1)
    assert not problems
    assert [[s.engine for s in r.samples] for r in rounds] == [["a", "b"], ["b", "a"], ["a", "b"]]
    assert a.tasks[1:] == b.tasks[1:]
    assert len({str(t) for t in a.tasks}) == 4  # a warm-up and three rounds, all different


def test_an_engine_that_fails_loses_its_figures_and_the_others_go_on() -> None:
    actors = [Actor("a"), Actor("b", fails_at=2), Actor("c", able=False)]
    rounds, problems = take_rounds(DECODE, actors, lambda: LIMITS, repeats=3, spare=0, seed=1)
    assert problems == {"b": "b fell over", "c": "cannot do this"}
    assert [[s.engine for s in r.samples] for r in rounds] == [["a"], ["a"], ["a"]]


def test_an_environment_is_ready_only_with_the_same_pins(tmp_path: Path) -> None:
    (tmp_path / "installed.json").write_text('{"pins": ["a==1"], "packages": {"a": "1"}}')
    assert Venv(tmp_path, ["a==1"], megabytes=1).ready
    assert not Venv(tmp_path, ["a==2"], megabytes=1).ready
    assert Venv(tmp_path, ["a==1"], megabytes=1).packages() == {"a": "1"}
