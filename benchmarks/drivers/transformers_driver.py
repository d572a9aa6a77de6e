"""transformers + torch behind the line protocol: bfloat16, static batches, no prefix cache.

The loop is our own, around the model and its cache: ``generate`` would add its bookkeeping to every step.
"""

import time
from typing import Any

from line import Engine, Replies, Reply, Track

replies = Replies()

import torch  # noqa: E402
import transformers  # noqa: E402


class Transformers(Engine):
    def __init__(self) -> None:
        self._model: Any = None

    def hello(self) -> Reply:
        return {
            "name": "transformers",
            "version": transformers.__version__,
            "torch": torch.__version__,
            "isa": torch.backends.cpu.get_cpu_capability(),
            "dtype": "bfloat16",
            "prefix_caching": False,
        }

    def load(self, threads: int, path: str) -> None:
        torch.set_num_threads(threads)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self._model = model.eval()

    def context(self, tokens: int, sequences: int) -> int:
        return tokens  # the cache grows

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[Track]]:
        if self._model is None:
            raise ValueError("no model loaded")
        tracks = [Track() for _ in prompts]
        ids = torch.tensor(prompts)
        start = time.perf_counter()
        cache = transformers.DynamicCache()
        for _ in range(tokens):
            out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            drawn = ids[:, 0].tolist()
            now = time.perf_counter()
            for token, track in zip(drawn, tracks, strict=True):
                track.add([token], now)
        return start, tracks


if __name__ == "__main__":
    replies.serve(Transformers())
