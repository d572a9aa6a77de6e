"""OpenVINO GenAI: weights compressed by optimum-intel and nncf, or read from GGUF."""

from pathlib import Path
from typing import ClassVar

from benchmarks.peers.base import BENCH, Model, VenvPeer
from benchmarks.peers.venv import Venv

__all__ = ["OpenVino"]

_FLAGS = {
    "int4": ["--weight-format", "int4", "--sym", "--group-size", "64", "--ratio", "1.0"],
    "int8": ["--weight-format", "int8"],
}
"""int4: symmetric groups of 64, head and embedding 8-bit: what the exporter makes fastest."""


class OpenVino(VenvPeer):
    """One weight format: ``int4``, ``int8``, or ``gguf`` (the file Galley reads, converted at load)."""

    script = "openvino_driver.py"
    refused: ClassVar = {"http": "OpenVINO GenAI's package brings no HTTP server"}

    def __init__(self, weights: str, folder: Path = BENCH) -> None:
        if weights not in (*_FLAGS, "gguf"):
            raise ValueError(f"unknown weight format {weights}")
        self.name = f"openvino {weights}"
        self.weights = weights
        self._models = folder / "models"
        pins = [
            "openvino==2026.4.1",
            "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0",
            "optimum-intel==2.2.0",
            "nncf==3.4.0",
            "torch==2.13.0",
        ]
        # its torchvision does not fit a torch built for CPUs, and the exporter imports one that is there
        self.venv = Venv(folder / "openvino", pins, megabytes=450, remove=["torchvision"])

    def prepare(self, model: Model) -> Path:
        if self.weights == "gguf":
            return model.gguf
        entry = ["-m", "optimum.commands.optimum_cli", "export", "openvino"]
        options = ["--task", "text-generation-with-past", *_FLAGS[self.weights]]
        return self.convert(
            self._models / f"{model.family}-openvino-{self.weights}",
            lambda folder: [*entry, "--model", model.folder, *options, folder],
        )
