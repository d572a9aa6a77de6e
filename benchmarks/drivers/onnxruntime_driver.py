"""ONNX Runtime GenAI behind the line protocol: one static batch at a time; it has no prefix cache."""

import json
import time
from typing import Any

from line import Engine, Replies, Reply, Track

replies = Replies()

import numpy as np  # noqa: E402
import onnxruntime_genai as genai  # noqa: E402


class OnnxRuntime(Engine):
    def __init__(self) -> None:
        self._model: Any = None

    def hello(self) -> Reply:
        return {"name": "onnxruntime-genai", "version": genai.__version__, "prefix_caching": False}

    def load(self, threads: int, path: str) -> None:
        config = genai.Config(path)
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        config.overlay(json.dumps(options))
        self._model = genai.Model(config)

    def context(self, tokens: int, sequences: int) -> int:
        return tokens  # each generator takes what it needs

    def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[Track]]:
        if self._model is None:
            raise ValueError("no model loaded")
        tracks = [Track() for _ in prompts]
        array = np.array(prompts, dtype=np.int32)
        length = len(prompts[0])
        start = time.perf_counter()
        params = genai.GeneratorParams(self._model)
        whole = length + tokens
        params.set_search_options(
            max_length=whole, min_length=whole, do_sample=False, batch_size=len(prompts)
        )
        generator = genai.Generator(self._model, params)
        generator.append_tokens(array)
        for _ in range(tokens):
            generator.generate_next_token()
            now = time.perf_counter()
            for token, track in zip(generator.get_next_tokens(), tracks, strict=True):
                track.add([int(token)], now)
        return start, tracks


if __name__ == "__main__":
    replies.serve(OnnxRuntime())
