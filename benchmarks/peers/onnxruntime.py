"""ONNX Runtime GenAI: int4 blocks of 32 with int8 activations, made by its own builder."""

from pathlib import Path
from typing import ClassVar

from benchmarks.peers.base import BENCH, Model, VenvPeer
from benchmarks.peers.venv import Venv

__all__ = ["OnnxRuntime"]


class OnnxRuntime(VenvPeer):
    """Static batches; no cache of prefixes and no server."""

    name = "onnxruntime int4"
    script = "onnxruntime_driver.py"
    refused: ClassVar = {
        "shared": "ONNX Runtime GenAI shares no prefixes between requests",
        "http": "ONNX Runtime GenAI brings no HTTP server",
    }

    def __init__(self, folder: Path = BENCH) -> None:
        self._models = folder / "models"
        pins = [
            "onnxruntime-genai==0.18.0",
            "onnxruntime==1.31.1",
            "onnx-ir==1.1.0",
            "onnx==1.23.2",
            "torch==2.13.0",
            "transformers==5.23.0",
        ]
        self.venv = Venv(folder / "onnxruntime", pins, megabytes=350)

    def prepare(self, model: Model) -> Path:
        entry = ["-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        options = ["--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
        return self.convert(
            self._models / f"{model.family}-onnx-int4",
            lambda folder: [*entry, "-i", model.folder, "-o", folder, *options],
        )
