"""What the prefix cache costs when it never hits: throughput without it, in memory, and with the disk tier.

``python -m benchmarks.zero_hit [--model NAME] [--repeats 4]``

Every prompt is new. *off* computes the same without looking up or publishing anything; *memory* is the
default; *disk* adds the disk tier. The three take turns on one backend. Since a machine's speed wanders by
more than what is asked about here, the share of the run's time that the cache's own code took on the engine
thread is measured too, by a clock around its verbs.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from galley.config import load
from galley.kv.tree import Tree
from galley.model.model import Model
from galley.model.store import Store
from galley.runtime.backend import open_backend
from galley.runtime.backend.base import Backend
from galley.runtime.engine import Engine
from galley.runtime.tier import DiskOptions
from galley.types import SamplingParams

JOBS, PROMPT, OUTPUT = 12, 256, 16
TREE_VERBS = ("match", "claim", "publish", "release")
TIER_VERBS = ("arrive", "collect", "pump", "leave")


class Clock:
    """Time spent inside some verbs, outermost calls only."""

    def __init__(self) -> None:
        self.spent = 0.0
        self._depth = 0

    def around(self, verb: Callable[..., Any]) -> Callable[..., Any]:
        """The verb, timed."""

        def timed(*given: Any, **named: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return verb(*given, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.spent += time.perf_counter() - began

        return timed


def switch_off(tree: Tree) -> None:
    """Neither look up nor publish; blocks still come and go."""

    def release(table: Any, tokens: Any, computed: int) -> None:
        for block in reversed(table.blocks):
            tree.pool.drop(block)
        del table.blocks[:]

    tree.match = lambda namespace, tokens: []  # type: ignore[method-assign]
    tree.publish = lambda table, tokens, computed: 0  # type: ignore[method-assign]
    tree.release = release  # type: ignore[method-assign]


def turn(backend: Backend, kind: str, vocab: int, seed: int, folder: Path) -> dict[str, float]:
    """One run of all jobs on a fresh cache; tokens a second and the share of the cache's verbs."""
    disk = DiskOptions(path=folder / f"{kind}-{seed}", limit=1 << 30) if kind == "disk" else None
    engine = Engine(backend, eos_ids=(), model_key="bench", disk=disk)
    clock, tree = Clock(), engine.scheduler.tree
    if kind == "off":
        switch_off(tree)
    else:
        for name in TREE_VERBS:
            setattr(tree, name, clock.around(getattr(tree, name)))
    if disk is not None:
        for name in TIER_VERBS:
            setattr(engine._tier, name, clock.around(getattr(engine._tier, name)))
    rng = random.Random(seed)
    params = SamplingParams(temperature=0, max_tokens=OUTPUT)
    hits = 0

    def on_step(out: Any) -> None:
        nonlocal hits
        if out.meter is not None:
            hits += out.meter.cached_tokens

    for job in range(JOBS):
        prompt = [rng.randrange(vocab) for _ in range(PROMPT)]
        engine.submit(f"j{job}", prompt, params, on_step=on_step)
    began = time.perf_counter()
    while engine.turn():
        pass
    spent = time.perf_counter() - began
    share = clock.spent / spent
    engine.close()
    if hits:
        raise SystemExit("a prompt hit the cache: this is not the zero-hit case")
    return {"tok_s": JOBS * (PROMPT + OUTPUT) / spent, "share": share}


def main() -> None:
    """Repeats of the three kinds in turn; medians as text, all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model = Model.open(Store(load().home).resolve(given.model).path, given.model)
    blocks = JOBS * (PROMPT + OUTPUT) // 16 + 64
    backend, warning = open_backend("auto", model.gguf, model.spec, threads=None, num_blocks=blocks)
    if warning:
        raise SystemExit(warning)
    kinds = ["off", "memory", "disk"]
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        turn(backend, "memory", model.spec.vocab, 999, Path(folder))  # warms the arena's pages
        for repeat in range(given.repeats):
            for kind in kinds[repeat % 3 :] + kinds[: repeat % 3]:
                found[kind].append(turn(backend, kind, model.spec.vocab, repeat, Path(folder)))
    result: dict[str, Any] = {"model": given.model, "runs": found}
    for kind in kinds:
        rate = statistics.median(run["tok_s"] for run in found[kind])
        share = statistics.median(run["share"] for run in found[kind])
        against = statistics.median(
            run["tok_s"] / off["tok_s"] for run, off in zip(found[kind], found["off"], strict=True)
        )
        result[kind] = {"tok_s": rate, "of_off": against, "share": share}
        print(f"{kind:7} {rate:7.0f} tok/s  {against:6.1%} of off  {share:6.2%} of the time in its verbs")
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
