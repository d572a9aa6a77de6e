"""What a grammar costs: mask and sampling as a share of a decode step at batch 1, with the real model.

    python -m benchmarks.guided_cost [MODEL] [--tokens 160] [--out RESULT.json]

One job at a time writes a JSON object with long free strings, the dearest masks: nearly all ids are allowed,
and not the same ones at every token. Guided and free outputs alternate, so that a busy machine slows both
alike. Shares are of the median guided step. ``mask`` is the time to fill the mask, which runs beside the
forward; ``waited`` is what the step had to wait for it after the forward; ``sample`` is the draw itself.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from galley.config import load
from galley.model.model import Model
from galley.model.store import Store
from galley.runtime.backend import open_backend
from galley.runtime.engine import build_scheduler
from galley.runtime.guided import Compiler
from galley.runtime.loop import Loop
from galley.types import SamplingParams, StructuredOutputs

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 40},
        "body": {"type": "string", "minLength": 400},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["title", "body", "tags"],
    "additionalProperties": False,
}


class Timed:
    """A backend that notes how long its two calls take."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.runs: list[float] = []
        self.draws: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, rows: Any) -> None:
        began = time.perf_counter()
        self._backend.run(rows)
        self.runs.append(time.perf_counter() - began)

    def sample(self, draws: Any) -> Any:
        began = time.perf_counter()
        drawn = self._backend.sample(draws)
        self.draws.append(time.perf_counter() - began)
        return drawn


def once(backend: Timed, model: Model, grammar: Any, seed: int, tokens: int) -> dict[str, list[float]]:
    """Times of the decode steps of one output; ``grammar`` None leaves it free."""
    options: dict[str, Any] = {"token_budget": 512, "max_jobs": 4, "max_queue": 4, "context": None}
    loop = Loop(build_scheduler(backend, eos_ids=(), **options), backend, clock=time.monotonic)
    prompt = model.tokenizer.encode("Write an article about the sea as JSON with title, body and tags.")
    params = SamplingParams(temperature=0.8, seed=seed, max_tokens=tokens)
    guide = None if grammar is None else grammar.guide()
    loop.scheduler.submit("a", prompt, params, 0.0, guide=guide)
    times: dict[str, list[float]] = {name: [] for name in ("step", "run", "sample", "mask", "waited")}
    while loop.scheduler.busy:
        job = next(iter(loop.scheduler.running), None)
        decode = job is not None and len(job.tokens) - job.computed == 1
        mask, waited, began = loop.masks.seconds, loop.masks.waited, time.perf_counter()
        loop.step()
        took = time.perf_counter() - began
        if decode:
            values = (
                took,
                backend.runs[-1],
                backend.draws[-1],
                loop.masks.seconds - mask,
                loop.masks.waited - waited,
            )
            for name, value in zip(times, values, strict=True):
                times[name].append(value)
    loop.close()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description="Mask and sampling as a share of a decode step.")
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    entry = Store(load().home).resolve(asked.model)
    model = Model.open(entry.path, entry.name)
    opened = open_backend("native", model.gguf, model.spec, threads=asked.threads, num_blocks=128).backend
    backend = Timed(opened)
    compiler = Compiler(model.tokenizer, model.spec.vocab)
    began = time.perf_counter()
    compiler.compile(StructuredOutputs(json_object=True))
    first = time.perf_counter() - began
    began = time.perf_counter()
    grammar = compiler.compile(StructuredOutputs(json=SCHEMA))
    compiled = time.perf_counter() - began
    sums: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
    for number in range(asked.rounds):
        for guided in (True, False):
            for name, values in once(
                backend, model, grammar if guided else None, number, asked.tokens
            ).items():
                sums[guided].setdefault(name, []).extend(values)
    medians = {
        "guided" if guided else "free": {
            name: statistics.median(values) * 1e6 for name, values in found.items()
        }
        for guided, found in sums.items()
    }
    step, with_mask = medians["guided"]["step"], medians["guided"]
    result = {
        "model": asked.model,
        "isa": opened.isa,
        "threads": opened.threads,
        "steps": len(sums[True]["step"]),
        "median_us": medians,
        "first_compile_ms": first * 1e3,
        "compile_ms": compiled * 1e3,
        "mask_share": with_mask["mask"] / step,
        "sample_share": with_mask["sample"] / step,
        "mask_and_sample_share": (with_mask["mask"] + with_mask["sample"]) / step,
        "waited_share": with_mask["waited"] / step,
    }
    print(json.dumps(result, indent=1))
    if asked.out is not None:
        asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    opened.close()
    model.close()
    return 0 if result["mask_and_sample_share"] <= 0.03 else 1


if __name__ == "__main__":
    sys.exit(main())
