"""transformers with torch, bfloat16: what most people start from."""

from pathlib import Path
from typing import ClassVar

from benchmarks.peers.base import BENCH, Model, VenvPeer
from benchmarks.peers.venv import Venv

__all__ = ["Transformers"]


class Transformers(VenvPeer):
    """Static batches; no cache of prefixes and no server measured."""

    name = "transformers bf16"
    script = "transformers_driver.py"
    refused: ClassVar = {
        "shared": "transformers shares no prefixes between requests",
        "http": "no HTTP server of transformers is measured",
    }

    def __init__(self, folder: Path = BENCH) -> None:
        pins = ["torch==2.13.0", "transformers==5.23.0"]
        self.venv = Venv(folder / "transformers", pins, megabytes=250)

    def prepare(self, model: Model) -> Path:
        return model.folder
