"""What the harness needs of an engine that is compared."""

import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from benchmarks.peers.venv import Venv
from benchmarks.protocol import Driver
from benchmarks.report import ROOT
from benchmarks.server import Server

__all__ = ["BENCH", "DRIVERS", "Model", "Peer", "Unsupported", "VenvPeer"]

BENCH = (ROOT / ".bench").resolve()
"""Everything the harness downloads or builds; not in version control."""
DRIVERS = Path(__file__).resolve().parent.parent / "drivers"
SLOTS = 16
SERVED_TOKENS = 20_480
"""Room of a server: 16 requests of 1,280 tokens."""


class Unsupported(RuntimeError):
    """The peer does not offer this; the row of the table gives the reason."""


class Model(msgspec.Struct, frozen=True):
    """One set of weights in the forms that engines read."""

    label: str
    family: str
    """Same for all files made from the same weights: peers convert once a family."""
    bits: int
    """Of a weight in the layers, in ``gguf``."""
    gguf: Path
    folder: Path
    """Hugging Face folder, bfloat16: what peers convert from."""


class Peer(ABC):
    """One engine, from the registry to a running process."""

    name: str
    refused: ClassVar[Mapping[str, str]] = {}
    """Kinds of workload that mean nothing for the engine, and why."""
    reads_gguf: bool = False
    """Whether it computes on the bytes of the GGUF file, so that the same limit binds it."""

    @abstractmethod
    def install(self) -> None:
        """Download and build what is missing. Idempotent."""

    @abstractmethod
    def prepare(self, model: Model) -> Path:
        """Convert the weights unless that is done; what ``load`` takes. May take minutes."""

    @abstractmethod
    def start(self) -> Driver:
        """A fresh driver process. Raises FileNotFoundError when not installed."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Version, source and flags, for the results."""

    def serve(self, model: Model, threads: int) -> Server:
        """Its HTTP server on ``model``, being started. Raises Unsupported when there is none."""
        raise Unsupported(f"{self.name} brings no HTTP server")

    def refuse(self, kind: str) -> None:
        """Raises Unsupported when workloads of this kind mean nothing for the engine."""
        if kind in self.refused:
            raise Unsupported(self.refused[kind])


class VenvPeer(Peer):
    """A peer from Python wheels: an environment of its own and a driver script in it."""

    script: str
    venv: Venv

    def install(self) -> None:
        self.venv.install()

    def start(self) -> Driver:
        if not self.venv.ready:
            raise FileNotFoundError(f"{self.venv.folder}: run python -m benchmarks.peers first")
        return Driver(
            self.name, [str(self.venv.python), str(DRIVERS / self.script)], log=self.log(), env=self.env()
        )

    def env(self) -> dict[str, str] | None:
        """Environment of its processes; ours when None."""
        return None

    def log(self, suffix: str = "") -> Path:
        """Where the peer's own words go."""
        return self.venv.folder / f"{self.name}{suffix}.log"

    def convert(self, target: Path, arguments: Callable[[Path], Sequence[str | Path]]) -> Path:
        """Run Python with ``arguments(folder)``, which fills ``folder``; ``target`` appears when it is whole.

        Nothing happens when it is there. Raises CalledProcessError; the log has the converter's words.
        """
        if target.exists():
            return target
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with self.log("-convert").open("wb") as log:
            command = [str(self.venv.python), *map(str, arguments(partial))]
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=self.env())
        return partial.rename(target)

    def describe(self) -> dict[str, Any]:
        with self.start() as driver:
            return {**driver.ask("hello"), "pins": self.venv.requirements}
