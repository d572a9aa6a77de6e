"""Galley itself, behind the same seam as its peers."""

import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.galley_side import start_galley
from benchmarks.peers.base import BENCH, Model, Peer
from benchmarks.protocol import Driver
from benchmarks.report import ROOT
from benchmarks.server import Server, free_port

__all__ = ["Galley"]


class Galley(Peer):
    """The engine through ``Engine.submit`` and, over HTTP, through ``galley serve``."""

    name = "galley"
    reads_gguf = True

    def __init__(self, isa: str | None = None, folder: Path = BENCH) -> None:
        self._isa = isa
        self._folder = folder

    def install(self) -> None:
        """Raises ImportError when the native library is not built."""
        import galley._native  # noqa: F401

    def prepare(self, model: Model) -> Path:
        return model.gguf

    def start(self) -> Driver:
        return start_galley(isa=self._isa)

    def serve(self, model: Model, threads: int) -> Server:
        self._folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        command = [sys.executable, "-m", "galley.cli.main", "serve", "--model", str(model.gguf)]
        command += ["--port", str(port), *self.serving(threads)]
        paths = [str(ROOT / "src"), *(p for p in sys.path if p)]
        env = {k: v for k, v in os.environ.items() if not k.startswith("GALLEY_")}
        env |= {"PYTHONPATH": os.pathsep.join(paths), "GALLEY_HOME": str(self._folder / "galley-home")}
        return Server(self.name, command, port=port, log=self._folder / "galley-serve.log", env=env)

    def serving(self, threads: int) -> list[str]:
        """Flags of ``galley serve``; everything else is its default."""
        isa = ["--isa", self._isa] if self._isa else []
        return ["--threads", str(threads), *isa]

    def describe(self) -> dict[str, Any]:
        with self.start() as driver:
            return {**driver.ask("hello"), "serving": self.serving(2)}
