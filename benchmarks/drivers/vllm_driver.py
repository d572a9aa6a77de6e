"""vLLM (CPU) behind the line protocol: its engine stepped in this process, prefix caching on, bfloat16."""

import os
import time
from typing import Any

from line import Engine, Replies, Reply, Track

replies = Replies()

MAX_LENGTH = 8192
MAX_SEQUENCES = 64


class Vllm(Engine):
    def __init__(self) -> None:
        self._llm: Any = None
        self._serial = 0

    def hello(self) -> Reply:
        import vllm

        return {
            "name": "vllm",
            "version": vllm.__version__,
            "dtype": "bfloat16",
            "max_model_len": MAX_LENGTH,
            "max_num_seqs": MAX_SEQUENCES,
            "prefix_caching": True,
        }

    def load(self, threads: int, path: str) -> None:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        if len(cores) < threads:
            raise ValueError(f"{threads} threads wanted, {len(cores)} cores are there")
        # read while vLLM starts; the engine in this process, so that its steps can be timed
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self._llm = LLM(
            path,
            dtype="bfloat16",
            max_model_len=MAX_LENGTH,
            max_num_seqs=MAX_SEQUENCES,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )

    def context(self, tokens: int, sequences: int) -> int:
        config = self._llm.llm_engine.vllm_config.cache_config
        room = config.num_gpu_blocks * config.block_size
        if tokens > room:
            raise ValueError(f"{tokens} tokens of context wanted, {room} are there")
        return int(room)

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[Track]]:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
        )
        engine = self._llm.llm_engine
        tracks: dict[str, Track] = {}
        start = time.perf_counter()
        for prompt in prompts:
            name = str(self._serial)
            self._serial += 1
            tracks[name] = Track()
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                track = next(t for name, t in tracks.items() if output.request_id.startswith(name))
                track.add(list(output.outputs[0].token_ids[len(track.ids) :]), now)
        return start, list(tracks.values())


if __name__ == "__main__":
    replies.serve(Vllm())
