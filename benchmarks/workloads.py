"""What is timed, side by side, and the ratios Galley is to reach."""

import random
from typing import Literal

import msgspec

__all__ = ["COMPARED", "TARGETS", "Compared", "Figure", "Kind", "Prompts"]

Kind = Literal["decode", "prefill", "offline", "shared", "start", "http", "http-shared"]

VOCAB_LOW, VOCAB_HIGH = 100, 49_000
"""Random prompt ids: no control tokens."""


class Figure(msgspec.Struct, frozen=True):
    """One number a sample gives."""

    name: str
    more_is_better: bool

    def ratio(self, ours: float, theirs: float) -> float:
        """How many times better ours is, whichever way better points."""
        return ours / theirs if self.more_is_better else theirs / ours


_RATE = Figure(name="tok/s", more_is_better=True)
_PREFIX = (Figure(name="cold s", more_is_better=False), Figure(name="warm s", more_is_better=False))
_FIGURES: dict[Kind, tuple[Figure, ...]] = {
    "decode": (_RATE,),
    "prefill": (_RATE,),
    "offline": (_RATE,),
    "shared": _PREFIX,
    "http-shared": _PREFIX,
    "http": (
        _RATE,
        Figure(name="TTFT p50 ms", more_is_better=False),
        Figure(name="ITL p50 ms", more_is_better=False),
        Figure(name="ITL p99 ms", more_is_better=False),
    ),
    "start": (
        Figure(name="first token s", more_is_better=False),
        Figure(name="peak RSS MB", more_is_better=False),
    ),
}


class Compared(msgspec.Struct, frozen=True):
    """One workload.

    Attributes:
        prompt: random tokens of each request's own.
        steps: tokens generated after the first (``decode``, ``offline``), or in all (the others).
        common: tokens all requests begin with, the same ones.
        requests: how many over HTTP; ``sequences`` of them at once.
    """

    name: str
    kind: Kind
    prompt: int
    sequences: int = 1
    steps: int = 0
    common: int = 0
    requests: int = 0

    @property
    def figures(self) -> tuple[Figure, ...]:
        return _FIGURES[self.kind]

    @property
    def room(self) -> int:
        """KV tokens needed; llama.cpp pads each sequence's share to 256."""
        return 256 * -(-(self.common + self.prompt + self.steps + 1) // 256) * self.sequences

    def small(self) -> "Compared":
        """A short run of the same kind, to warm up with."""
        few = min(self.requests, self.sequences)
        return msgspec.structs.replace(self, prompt=32, steps=min(self.steps, 8), common=0, requests=few)


COMPARED = (
    Compared(name="decode", kind="decode", prompt=128, steps=128),
    Compared(name="batch 4", kind="decode", prompt=128, sequences=4, steps=64),
    Compared(name="batch 16", kind="decode", prompt=128, sequences=16, steps=64),
    Compared(name="batch 32", kind="decode", prompt=128, sequences=32, steps=64),
    Compared(name="offline 16", kind="offline", prompt=128, sequences=16, steps=127),
    Compared(name="prefill 512", kind="prefill", prompt=512),
    Compared(name="prefill 2048", kind="prefill", prompt=2048),
    Compared(name="shared prefix", kind="shared", prompt=32, sequences=16, steps=32, common=1024),
    Compared(name="decode at 4k", kind="decode", prompt=4000, steps=64),
    Compared(name="decode at 8k", kind="decode", prompt=8000, steps=64),
    Compared(name="start", kind="start", prompt=32, steps=64),
    Compared(name="http 1", kind="http", prompt=128, sequences=1, steps=128, requests=4),
    Compared(name="http 16", kind="http", prompt=128, sequences=16, steps=128, requests=32),
    Compared(
        name="http shared prefix",
        kind="http-shared",
        prompt=32,
        sequences=16,
        steps=32,
        common=1024,
        requests=16,
    ),
)

TARGETS: dict[tuple[str, str, str], float] = {
    ("smollm2-q4", "decode", "tok/s"): 2.3,
    ("smollm2-q4", "batch 4", "tok/s"): 4.0,
    ("smollm2-q4", "batch 16", "tok/s"): 3.0,
    ("smollm2-q4", "batch 32", "tok/s"): 2.8,
    ("smollm2-q4", "prefill 512", "tok/s"): 1.3,
    ("smollm2-q4", "prefill 2048", "tok/s"): 1.4,
    ("smollm2-q4", "shared prefix", "cold s"): 2.3,
    ("smollm2-q4", "shared prefix", "warm s"): 2.5,
    ("smollm2-q4", "decode at 4k", "tok/s"): 1.5,
    ("smollm2-q4", "decode at 8k", "tok/s"): 1.5,
    ("smollm2-q4", "http 1", "tok/s"): 2.3,
    ("smollm2-q4", "http 1", "TTFT p50 ms"): 1.54,
    ("smollm2-q4", "http 16", "tok/s"): 2.2,
    ("smollm2-q4", "http 16", "TTFT p50 ms"): 1.67,
    ("l1b-q4", "decode", "tok/s"): 1.05,
    ("l1b-q8", "decode", "tok/s"): 1.05,
    ("l1b-q4", "batch 4", "tok/s"): 2.0,
    ("l1b-q4", "batch 16", "tok/s"): 1.8,
    ("l1b-q4", "prefill 512", "tok/s"): 1.45,
    ("l1b-q4", "prefill 2048", "tok/s"): 1.45,
}
"""Ratio to the best peer, by start of the model's label, workload and figure."""


class Prompts:
    """Random token ids, the same for every engine in a round and never the same twice."""

    def __init__(self, seed: int) -> None:
        self._noise = random.Random(seed)

    def ids(self, count: int) -> list[int]:
        return [self._noise.randrange(VOCAB_LOW, VOCAB_HIGH) for _ in range(count)]

    def batch(self, workload: Compared, common: list[int] | None = None) -> list[list[int]]:
        """One prompt for each request: ``common`` first if given, then its own."""
        count = workload.requests or workload.sequences
        return [(common or []) + self.ids(workload.prompt) for _ in range(count)]
