"""One engine in a comparison: its processes, and one sample of any workload."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.http_load import drive
from benchmarks.machine import Busy
from benchmarks.peers.base import Model, Peer
from benchmarks.process import ProcessTree
from benchmarks.protocol import Driver
from benchmarks.server import Server
from benchmarks.workloads import Compared

__all__ = ["Participant", "Round", "Sampled", "Task"]


class Sampled(msgspec.Struct, frozen=True):
    """One timed run of one engine."""

    engine: str
    figures: dict[str, float]
    foreign_cores: float
    """Cores that other processes, or the host, took away meanwhile (mean; resolution 10 ms)."""
    ids: list[int]
    """First tokens of the first sequence: engines on the same weights should mostly agree."""


class Task(msgspec.Struct, frozen=True):
    """The prompts of one round, the same for every engine."""

    first: list[list[int]]
    second: list[list[int]] = []
    """With the prefix of ``first`` and other continuations (``shared`` kinds only)."""


class Round(msgspec.Struct, frozen=True):
    """All engines once on the same task, between two readings of the limits."""

    before: Any
    after: Any
    samples: list[Sampled]
    """In the order they ran."""

    @property
    def foreign_cores(self) -> float:
        return max((s.foreign_cores for s in self.samples), default=0.0)

    def of(self, engine: str) -> Sampled | None:
        return next((s for s in self.samples if s.engine == engine), None)


class Participant:
    """Starts processes when they are needed, keeps them while they are, and times them."""

    def __init__(self, peer: Peer, model: Model, threads: int) -> None:
        self.peer = peer
        self.name = peer.name
        self.facts: dict[str, Any] = {}
        """What loading told; for the results."""
        self._model = model
        self._threads = threads
        self._path: Path | None = None
        self._driver: Driver | None = None
        self._server: Server | None = None

    @property
    def path(self) -> Path:
        """What the engine loads; converted on first use."""
        if self._path is None:
            self._path = self.peer.prepare(self._model)
        return self._path

    def ready(self, workload: Compared) -> None:
        """Start what the workload needs and warm it up. Raises Unsupported, DriverError, ServerError, …"""
        self.peer.refuse("http" if workload.kind.startswith("http") else workload.kind)
        if workload.kind.startswith("http"):
            if self._server is None:
                self._server = self.peer.serve(self._model, self._threads)
                self.facts["server ready s"] = self._server.wait()
            return
        if workload.kind == "start":
            _ = self.path
            return
        if self._driver is None:
            self._driver = self.peer.start()
            self.facts |= self._driver.ask("load", self._threads, self.path)
            self.facts |= self._driver.ask("hello")
        self._driver.ask("context", workload.room, workload.sequences, 0)

    def rest(self) -> None:
        """Wait until its processes are idle. Raises DriverError, ServerError or Busier."""
        if self._driver is not None:
            self._driver.rest()
        if self._server is not None:
            self._server.rest()

    def sample(self, workload: Compared, task: Task) -> Sampled:
        """One timed run."""
        run: dict[str, Callable[[Compared, Task], Sampled]] = {
            "decode": self._decode,
            "prefill": self._prefill,
            "offline": self._offline,
            "shared": self._shared,
            "start": self._start,
            "http": self._http,
            "http-shared": self._http,
        }
        return run[workload.kind](workload, task)

    def _ask(self, verb: str, *arguments: object) -> dict[str, Any]:
        if self._driver is None:
            raise RuntimeError(f"{self.name} is not started")
        return self._driver.ask(verb, *arguments)

    def _tree(self) -> ProcessTree:
        if self._driver is None:
            raise RuntimeError(f"{self.name} is not started")
        return self._driver.tree

    def _decode(self, workload: Compared, task: Task) -> Sampled:
        watch = Watch(self._tree())
        reply = self._ask("decode", workload.steps, workload.sequences, *_flat(task.first))
        foreign = watch.foreign_cores()
        return self._sampled({"tok/s": reply["tokens"] / reply["decode_s"]}, foreign, reply)

    def _offline(self, workload: Compared, task: Task) -> Sampled:
        """All tokens over all the time, prompts included: what the server's rate is to be held against."""
        watch = Watch(self._tree())
        reply = self._ask("decode", workload.steps, workload.sequences, *_flat(task.first))
        foreign = watch.foreign_cores()
        tokens = (workload.steps + 1) * workload.sequences
        seconds = reply.get("total_s", reply["prefill_s"] + reply["decode_s"])  # one batch: phases follow
        return self._sampled({"tok/s": tokens / seconds}, foreign, reply)

    def _prefill(self, workload: Compared, task: Task) -> Sampled:
        watch = Watch(self._tree())
        reply = self._ask("prefill", *_flat(task.first))
        foreign = watch.foreign_cores()
        return self._sampled({"tok/s": workload.prompt / reply["prefill_s"]}, foreign, reply)

    def _shared(self, workload: Compared, task: Task) -> Sampled:
        watch = Watch(self._tree())
        cold = self._ask("together", workload.steps, workload.sequences, *_flat(task.first))
        warm = self._ask("together", workload.steps, workload.sequences, *_flat(task.second))
        foreign = watch.foreign_cores()
        return self._sampled({"cold s": cold["total_s"], "warm s": warm["total_s"]}, foreign, cold)

    def _start(self, workload: Compared, task: Task) -> Sampled:
        """A process of its own from its start to its first token; then some decoding for its memory."""
        machine, begin = Busy.now(), time.perf_counter()
        with self.peer.start() as driver:
            driver.ask("load", self._threads, self.path)
            driver.ask("context", workload.room, 1, 0)
            reply = driver.ask("prefill", *_flat(task.first))
            seconds = time.perf_counter() - begin
            driver.ask("decode", workload.steps, 1, *_flat(task.second))
            wall = time.perf_counter() - begin
            foreign = (Busy.now() - machine - driver.cpu_seconds()) / wall
            figures = {"first token s": seconds, "peak RSS MB": driver.tree.peak_rss_mb()}
        return self._sampled(figures, foreign, reply)

    def _http(self, workload: Compared, task: Task) -> Sampled:
        if self._server is None:
            raise RuntimeError(f"{self.name}'s server is not started")
        watch = Watch(self._server.tree)
        load = drive(self._server, task.first, concurrency=workload.sequences, tokens=workload.steps)
        if workload.kind == "http-shared":
            warm = drive(self._server, task.second, concurrency=workload.sequences, tokens=workload.steps)
            figures = {"cold s": load.seconds, "warm s": warm.seconds}
        else:
            figures = {
                "tok/s": load.tokens / load.seconds,
                "TTFT p50 ms": load.ttft_p50_ms,
                "TTFT p99 ms": load.ttft_p99_ms,
                "ITL p50 ms": load.itl_p50_ms,
                "ITL p99 ms": load.itl_p99_ms,
            }
        return self._sampled(figures, watch.foreign_cores(), {"ids": []})

    def _sampled(self, figures: dict[str, float], foreign: float, reply: dict[str, Any]) -> Sampled:
        return Sampled(
            engine=self.name, figures=figures, foreign_cores=max(0.0, foreign), ids=reply["ids"][:16]
        )

    def close_driver(self) -> None:
        """End the driver; the next workload that needs it starts another."""
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def close(self) -> None:
        """End all its processes. Idempotent."""
        self.close_driver()
        if self._server is not None:
            self._server.close()
            self._server = None


class Watch:
    """Processor time that belongs neither to the engine's processes nor to the harness."""

    def __init__(self, tree: ProcessTree) -> None:
        self._tree = tree
        self._machine, self._theirs = Busy.now(), tree.cpu_seconds()
        self._ours, self._start = time.process_time(), time.perf_counter()

    def foreign_cores(self) -> float:
        """Cores taken by others since the start, on average."""
        wall = time.perf_counter() - self._start
        known = self._tree.cpu_seconds() - self._theirs + time.process_time() - self._ours
        return (Busy.now() - self._machine - known) / wall


def _flat(prompts: Sequence[Sequence[int]]) -> list[int]:
    return [token for prompt in prompts for token in prompt]
