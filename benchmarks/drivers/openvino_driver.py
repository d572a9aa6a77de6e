"""OpenVINO GenAI behind the line protocol: ``ContinuousBatchingPipeline``, stepped, prefix caching on.

``load`` takes a folder made by optimum-intel or a GGUF file.
"""

import time
from typing import Any

from line import Engine, Replies, Reply, Track

replies = Replies()

import numpy as np  # noqa: E402
import openvino as ov  # noqa: E402
import openvino_genai as genai  # noqa: E402

BLOCK = 32
"""Tokens in one of the CPU plugin's KV blocks."""
FIRST_ROOM = 512
"""Tokens of KV the pipeline has until ``context`` asks for more."""
MAX_BATCHED_TOKENS = 2048
MAX_SEQUENCES = 64


class OpenVino(Engine):
    def __init__(self) -> None:
        self._path = ""
        self._threads = 0
        self._room = 0
        self._serial = 0
        self._pipeline: Any = None

    def hello(self) -> Reply:
        return {
            "name": "openvino",
            "version": genai.__version__,
            "runtime": ov.get_version(),
            "isa": ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
            "max_num_batched_tokens": MAX_BATCHED_TOKENS,
            "max_num_seqs": MAX_SEQUENCES,
            "prefix_caching": True,
        }

    def load(self, threads: int, path: str) -> None:
        self._threads, self._path = threads, path
        self._open(FIRST_ROOM)

    def _open(self, room: int) -> None:
        self._pipeline = None
        config = genai.SchedulerConfig()
        config.num_kv_blocks = -(-room // BLOCK)
        config.max_num_batched_tokens = MAX_BATCHED_TOKENS
        config.max_num_seqs = MAX_SEQUENCES
        config.dynamic_split_fuse = True
        config.enable_prefix_caching = True
        options = {"INFERENCE_NUM_THREADS": self._threads}
        self._pipeline = genai.ContinuousBatchingPipeline(self._path, config, "CPU", options)
        self._room = room

    def context(self, tokens: int, sequences: int) -> int:
        """The cache cannot grow: a pipeline with too small a one is made anew."""
        if self._pipeline is None:
            raise ValueError("no model loaded")
        need = tokens + 2 * BLOCK * sequences  # a sequence fills its last block only in part
        if need > self._room:
            self._open(need)
        return self._room

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[Track]]:
        if self._pipeline is None:
            raise ValueError("no model loaded")
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        tracks = [Track() for _ in prompts]
        arrays = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        start = time.perf_counter()
        handles = []
        for array in arrays:
            handles.append(self._pipeline.add_request(self._serial, array, config))
            self._serial += 1
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter()
            for handle, track in zip(handles, tracks, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        track.add(list(output.generated_ids), now)
        return start, tracks


if __name__ == "__main__":
    replies.serve(OpenVino())
