"""Galley and its peers, sample by sample in turn, with the machine's limits probed around every pair.

``python -m benchmarks.speed`` writes ``benchmarks/results/speed-*.json`` and the tables of
``docs/PERFORMANCE.md``. Ratios are taken within a pair (same prompt, same minute) and their median is quoted.
"""

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
import msgspec

from benchmarks.galley_side import start_galley
from benchmarks.machine import Busy, Limits, Probe, facts
from benchmarks.make_models import default_models, model_label
from benchmarks.peers import BENCH, LlamaCpp
from benchmarks.protocol import Driver
from benchmarks.report import ROOT, markdown_table, replace_between, save
from benchmarks.shape import Shape
from benchmarks.stats import Spread, spread

__all__ = ["WORKLOADS", "Pair", "Row", "Sample", "Workload", "main"]

VOCAB_LOW, VOCAB_HIGH = 100, 49_000
"""Random prompt ids: no control tokens."""
CALM = 0.05
"""Cores taken by others below which a pair counts as undisturbed."""


class Workload(msgspec.Struct, frozen=True):
    """One thing to time."""

    name: str
    kind: Literal["decode", "prefill"]
    prompt: int
    sequences: int = 1
    steps: int = 0
    """Decode steps timed, after the prompt and the first token."""
    target: float | None = None
    """Ratio to llama.cpp that Galley must reach."""


WORKLOADS = (
    Workload(name="decode", kind="decode", prompt=128, steps=128, target=1.7),
    Workload(name="prefill 512", kind="prefill", prompt=512, target=1.8),
    Workload(name="prefill 2048", kind="prefill", prompt=2048),
    Workload(name="batch 4", kind="decode", prompt=128, sequences=4, steps=64),
    Workload(name="batch 16", kind="decode", prompt=128, sequences=16, steps=64, target=2.5),
    Workload(name="batch 32", kind="decode", prompt=128, sequences=32, steps=64),
)


class Sample(msgspec.Struct, frozen=True):
    """One timed run of one engine."""

    engine: str
    seconds: float
    tokens: int
    foreign_cores: float = 0.0
    """Cores that other processes, or the host, took away meanwhile (mean; resolution 10 ms)."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Pair(msgspec.Struct, frozen=True):
    """All engines once on the same prompt, between two readings of the limits."""

    before: Limits
    after: Limits
    samples: list[Sample]
    """In the order they ran."""

    @property
    def foreign_cores(self) -> float:
        return max(s.foreign_cores for s in self.samples)

    def of(self, engine: str) -> Sample:
        return next(s for s in self.samples if s.engine == engine)

    @property
    def read_gb_s(self) -> float:
        """Bandwidth limit of this pair: mean of before and after."""
        return (self.before.read_gb_s + self.after.read_gb_s) / 2

    @property
    def int8_gop_s(self) -> float:
        return (self.before.int8_gop_s + self.after.int8_gop_s) / 2


class Row(msgspec.Struct, frozen=True):
    """One engine on one workload, over all pairs."""

    model: str
    workload: str
    engine: str
    rate: Spread
    """Tokens a second."""
    gb_s: float
    """The file's weight bytes times steps a second (median): the same numerator for every engine."""
    gop_s: float
    """Two operations a weight and token in the matrices (head only where sampled); no attention."""
    bandwidth_fraction: Spread
    arithmetic_fraction: Spread
    ratio: Spread | None
    """Galley's rate over this engine's, pair by pair; None for Galley's own engine."""
    target: float | None


class Contestant(msgspec.Struct, frozen=True):
    """An engine to time and the verbs that time it."""

    name: str
    driver: Driver
    prefix: str = ""
    """Put before the verb: ``backend-`` times Galley's backend without the runtime."""

    def run(self, workload: Workload, prompts: list[int]) -> Sample:
        machine, own, start = Busy.now(), self.driver.cpu_seconds(), time.perf_counter()
        if workload.kind == "prefill":
            reply = self.driver.ask(self.prefix + "prefill", *prompts)
            seconds, tokens = reply["prefill_s"], len(prompts)
        else:
            reply = self.driver.ask(self.prefix + "decode", workload.steps, workload.sequences, *prompts)
            seconds, tokens = reply["decode_s"], reply["tokens"]
        wall, after = time.perf_counter() - start, Busy.now()
        foreign = (
            after.used - machine.used - (self.driver.cpu_seconds() - own) + after.stolen - machine.stolen
        )
        return Sample(
            engine=self.name, seconds=seconds, tokens=tokens, foreign_cores=max(0.0, foreign / wall)
        )


def take_pairs(
    workload: Workload,
    contestants: list[Contestant],
    probe: Callable[[], Limits],
    *,
    repeats: int,
    unified: bool,
    seed: int,
) -> list[Pair]:
    """Rounds until ``repeats`` were calm, or twice as many were taken; the order turns round each time.

    Every other driver is idle while one runs. A pair is calm when foreign processes took less than ``CALM``
    cores during each of its samples: the choice looks at them only, never at the rates.
    """
    noise = random.Random(seed)
    drivers = list({id(c.driver): c.driver for c in contestants}.values())
    length = workload.prompt + workload.steps + 1
    room = 256 * -(-length // 256) * workload.sequences  # llama.cpp pads each sequence's share to 256
    for driver in drivers:
        driver.ask("context", room, workload.sequences, int(unified))
    warm = msgspec.structs.replace(workload, prompt=32, steps=min(workload.steps, 4))
    for c in contestants:
        c.run(warm, _prompts(noise, warm))
    pairs = []
    for number in range(2 * repeats):
        prompts = _prompts(noise, workload)
        before = probe()
        samples = []
        for c in contestants if number % 2 == 0 else reversed(contestants):
            for driver in drivers:
                driver.rest()
            samples.append(c.run(workload, prompts))
        for driver in drivers:
            driver.rest()
        pairs.append(Pair(before=before, after=probe(), samples=samples))
        if sum(p.foreign_cores < CALM for p in pairs) == repeats:
            break
    return pairs


def calmest(pairs: list[Pair], repeats: int) -> list[Pair]:
    """The ``repeats`` pairs that other processes disturbed least, in the order they were taken."""
    kept = sorted(pairs, key=lambda p: p.foreign_cores)[:repeats]
    return [p for p in pairs if any(p is k for k in kept)]


def _prompts(noise: random.Random, workload: Workload) -> list[int]:
    return [noise.randrange(VOCAB_LOW, VOCAB_HIGH) for _ in range(workload.prompt * workload.sequences)]


def summarise(model: str, workload: Workload, pairs: list[Pair], shape: Shape, ours: str | None) -> list[Row]:
    """Rows of one workload. ``ours`` is the engine whose ratio to the others is wanted."""
    rows = []
    for engine in sorted(s.engine for s in pairs[0].samples):
        rates = [p.of(engine).rate for p in pairs]
        steps = [_steps(workload, p.of(engine)) for p in pairs]
        gb = [shape.weight_bytes * s * 1e-9 for s in steps]
        gop = [shape.operations(workload.kind, workload.prompt, p.of(engine).rate) * 1e-9 for p in pairs]
        ratio = (
            spread([p.of(ours).rate / p.of(engine).rate for p in pairs]) if ours and engine != ours else None
        )
        rows.append(
            Row(
                model=model,
                workload=workload.name,
                engine=engine,
                rate=spread(rates),
                gb_s=spread(gb).median,
                gop_s=spread(gop).median,
                bandwidth_fraction=spread([g / p.read_gb_s for g, p in zip(gb, pairs, strict=True)]),
                arithmetic_fraction=spread([g / p.int8_gop_s for g, p in zip(gop, pairs, strict=True)]),
                ratio=ratio,
                target=workload.target if ratio is not None and not engine.startswith("galley") else None,
            )
        )
    return rows


def _steps(workload: Workload, sample: Sample) -> float:
    """Passes over the weights a second: one a decode step, one a prompt of up to 512 tokens."""
    if workload.kind == "decode":
        return sample.rate / workload.sequences
    return -(-workload.prompt // 512) / sample.seconds


def table(rows: list[Row], pairs: dict[str, list[Pair]]) -> str:
    """The table of the document."""
    header = [
        "model, workload",
        "engine",
        "tok/s",
        "IQR",
        "achieved",
        "of the limit",
        "Galley / it",
        "IQR",
        "target",
    ]
    body = []
    for row in rows:
        by_bytes = row.bandwidth_fraction.median > row.arithmetic_fraction.median
        achieved = f"{row.gb_s:.1f} GB/s" if by_bytes else f"{row.gop_s:.0f} GOP/s"
        share = (row.bandwidth_fraction if by_bytes else row.arithmetic_fraction).median
        ratio = (
            [f"{row.ratio.median:.2f}×", f"{row.ratio.low:.2f}–{row.ratio.high:.2f}"]
            if row.ratio
            else ["", ""]
        )
        target = f"≥ {row.target}×" if row.target else ""
        quartiles = f"{row.rate.low:.0f}–{row.rate.high:.0f}"
        place = f"{row.model}, {row.workload}"
        body.append(
            [
                place,
                row.engine,
                f"{row.rate.median:.1f}",
                quartiles,
                achieved,
                f"{100 * share:.0f} %",
                *ratio,
                target,
            ]
        )
    taken = [reading for some in pairs.values() for p in some for reading in (p.before, p.after)]
    trip = spread([t.roundtrip_ns for t in taken])
    read = spread([t.read_gb_s for t in taken])
    peak = spread([t.int8_gop_s for t in taken])
    foreign = max(p.foreign_cores for some in pairs.values() for p in some)
    probes = (
        f"Probes around the pairs ({trip.count} readings, median, quartiles): core-to-core round trip "
        f"{trip.median:.0f} ns ({trip.low:.0f}–{trip.high:.0f}); {taken[0].threads}-thread read of a buffer "
        f"of the model's size {read.median:.1f} GB/s ({read.low:.1f}–{read.high:.1f}); int8 peak "
        f"{peak.median:.0f} GOP/s ({peak.low:.0f}–{peak.high:.0f}, {taken[0].int8_op}). Other "
        f"processes and the host took at most {foreign:.2f} cores."
    )
    return markdown_table(header, body) + "\n\n" + probes


@click.command()
@click.option(
    "--model", "models", type=click.Path(exists=True, path_type=Path), multiple=True, help="GGUF files."
)
@click.option("--threads", default=2, show_default=True)
@click.option("--repeats", default=5, show_default=True, help="Pairs a workload.")
@click.option("--workload", "only", multiple=True, type=click.Choice([w.name for w in WORKLOADS]))
@click.option("--isa", help="Galley instruction set; the best by default.")
@click.option("--galley/--no-galley", "with_galley", default=True, help="Measure Galley at all.")
@click.option("--unified/--no-unified", default=False, help="llama.cpp's unified KV buffer.")
@click.option("--seed", default=1, show_default=True)
@click.option("--write/--no-write", default=True, help="Write the table into docs/PERFORMANCE.md.")
def main(
    *,
    models: tuple[Path, ...],
    threads: int,
    repeats: int,
    only: tuple[str, ...],
    isa: str | None,
    with_galley: bool,
    unified: bool,
    seed: int,
    write: bool,
) -> None:
    """Time Galley and llama.cpp interleaved; losing rows are shown."""
    peer = LlamaCpp()
    peer.install()
    files = {model_label(p): p for p in models} or default_models()
    probe = Probe(BENCH)
    rows: list[Row] = []
    pairs: dict[str, list[Pair]] = {}
    kept: dict[str, list[Pair]] = {}
    engines: dict[str, Any] = {peer.name: peer.describe()}
    for label, file in files.items():
        shape = Shape.read(file)
        with ExitStack() as stack:
            theirs = stack.enter_context(peer.start())
            contestants = [Contestant(name=peer.name, driver=theirs)]
            if with_galley:
                ours = stack.enter_context(start_galley(isa=isa))
                contestants.append(Contestant(name="galley", driver=ours))
                contestants.append(Contestant(name="galley backend alone", driver=ours, prefix="backend-"))
            for c in contestants[:2]:
                engines.setdefault(c.name, {})[f"load {label}"] = c.driver.ask("load", threads, file)
                engines[c.name] |= c.driver.ask("hello")
            for workload in WORKLOADS:
                if only and workload.name not in only:
                    continue
                click.echo(f"{label}: {workload.name}", err=True)
                taken = take_pairs(
                    workload,
                    contestants,
                    partial(probe.take, shape.weight_bytes / 1e6, threads=threads),
                    repeats=repeats,
                    unified=unified and workload.sequences > 1,
                    seed=seed,
                )
                pairs[f"{label}, {workload.name}"] = taken
                kept[f"{label}, {workload.name}"] = calmest(taken, repeats)
                chosen = kept[f"{label}, {workload.name}"]
                fresh = summarise(label, workload, chosen, shape, "galley" if with_galley else None)
                rows += fresh
                click.echo(table(fresh, {label: chosen}), err=True)
    setup = {"threads": threads, "repeats": repeats, "seed": seed, "llama.cpp unified KV": unified}
    workloads = [w for w in WORKLOADS if not only or w.name in only]
    body: dict[str, Any] = {"machine": facts(), "setup": setup, "engines": engines, "workloads": workloads}
    path = save("speed", {**body, "rows": rows, "pairs": pairs})
    text = table(rows, kept)
    click.echo(text)
    if write:
        cpu = body["machine"]["cpu"]
        source = f"From `benchmarks/results/{path.name}`: {cpu}, {threads} threads, {repeats} pairs a row."
        replace_between(ROOT / "docs" / "PERFORMANCE.md", "speed", f"{source}\n\n{text}")


if __name__ == "__main__":
    main()
