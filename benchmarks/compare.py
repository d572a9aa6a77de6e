"""Galley and its peers on every workload, sample by sample in turn.

``python -m benchmarks.compare`` writes ``benchmarks/results/compare-*.json`` and the tables of
``docs/PERFORMANCE.md``. In a round every engine runs once on the same prompts; the order turns round each
time, the machine's limits are probed before and after, and nothing runs while another is timed. An engine
that cannot be installed, or fails, is a row that says why.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec

from benchmarks.comparison import Line, calmest, engines_text, lines_of, merged, table
from benchmarks.machine import Limits, Probe, facts
from benchmarks.make_models import MODELS, find_model
from benchmarks.participant import Participant, Round, Task
from benchmarks.peers import BENCH, PEERS, Model, Unsupported, peers_for
from benchmarks.peers.galley import Galley
from benchmarks.process import Busier
from benchmarks.protocol import DriverError
from benchmarks.report import ROOT, replace_between, save
from benchmarks.server import ServerError
from benchmarks.shape import Shape
from benchmarks.workloads import COMPARED, Compared, Prompts

__all__ = ["main", "take_rounds"]

CALM = 0.05
"""Cores taken by others below which a round counts as undisturbed."""
FAILURES = (
    Unsupported,
    DriverError,
    ServerError,
    Busier,
    OSError,
    ImportError,
    ValueError,
    ExceptionGroup,
    subprocess.CalledProcessError,
)
"""What an engine may fail with: its row then says so, and the others go on."""


def _reason(error: BaseException) -> str:
    if isinstance(error, ExceptionGroup):
        return _reason(error.exceptions[0])
    if isinstance(error, subprocess.CalledProcessError):
        command = " ".join(map(str, error.cmd)).replace(str(BENCH), ".bench").replace(str(ROOT), ".")
        return f"{command[-120:]} ended with status {error.returncode}"
    text = " ".join(str(error).split()).replace("|", "/")
    return text.replace(str(BENCH), ".bench").replace(str(ROOT), ".")[:200] or type(error).__name__


def _task(workload: Compared, prompts: Prompts) -> Task:
    common = prompts.ids(workload.common)
    first = prompts.batch(workload, common)
    twice = workload.kind in ("shared", "http-shared", "start")
    return Task(first=first, second=prompts.batch(workload, common) if twice else [])


def take_rounds(
    workload: Compared,
    participants: Sequence[Participant],
    probe: Callable[[], Limits],
    *,
    repeats: int,
    spare: int,
    seed: int,
) -> tuple[list[Round], dict[str, str]]:
    """Rounds until ``repeats`` were calm or ``repeats + spare`` were taken, and who failed, and why.

    The choice between rounds looks at disturbance only, never at the figures.
    """
    prompts = Prompts(seed)
    problems: dict[str, str] = {}
    rounds: list[Round] = []
    able: list[Participant] = []

    def out(p: Participant, error: BaseException) -> None:
        problems[p.name] = _reason(error)
        click.echo(f"  {p.name}: {problems[p.name]}", err=True)
        if not isinstance(error, Unsupported):
            p.close()

    def all_rest() -> None:
        for p in able:
            if p.name not in problems:
                try:
                    p.rest()
                except FAILURES as error:
                    out(p, error)

    for p in participants:
        try:
            p.ready(workload)
            p.sample(workload.small(), _task(workload.small(), prompts))
            able.append(p)
        except FAILURES as error:
            out(p, error)
    while able and len(rounds) < repeats + spare and sum(r.foreign_cores < CALM for r in rounds) < repeats:
        task = _task(workload, prompts)
        before = probe()
        samples = []
        for p in able if len(rounds) % 2 == 0 else able[::-1]:
            all_rest()
            if p.name in problems:
                continue
            try:
                samples.append(p.sample(workload, task))
            except FAILURES as error:
                out(p, error)
        all_rest()
        able = [p for p in able if p.name not in problems]
        rounds.append(Round(before=before, after=probe(), samples=samples))
    return [_without(r, problems) for r in rounds], problems


def _without(taken: Round, problems: dict[str, str]) -> Round:
    """An engine that failed in a later round has no figures in an earlier one either."""
    return msgspec.structs.replace(taken, samples=[s for s in taken.samples if s.engine not in problems])


def _participants(
    names: Sequence[str], model: Model, threads: int, isa: str | None
) -> tuple[list[Participant], dict[str, str]]:
    """Galley and the peers that could be installed; the others with their reasons."""
    able: list[Participant] = []
    problems: dict[str, str] = {}
    peers = {peer.name: peer for peer in (Galley(isa), *(peers_for(name, model.bits) for name in names))}
    for peer in peers.values():
        try:
            peer.install()
            able.append(Participant(peer, model, threads))
        except FAILURES as error:
            problems[peer.name] = f"cannot be installed: {_reason(error)}"
            click.echo(f"{peer.name}: {problems[peer.name]}", err=True)
    return able, problems


def _described(p: Participant) -> dict[str, Any]:
    try:
        return p.peer.describe()
    except FAILURES as error:
        return {"not described": _reason(error)}


def write_tables(lines: Sequence[Line], engines: dict[str, dict[str, Any]], source: str) -> None:
    """Put one table a model, and what the engines are, into ``docs/PERFORMANCE.md`` between its markers."""
    page = ROOT / "docs" / "PERFORMANCE.md"
    for label in dict.fromkeys(line.model for line in lines):
        text = table([line for line in lines if line.model == label])
        replace_between(page, f"compare {label}", f"{source}\n\n{text}")
    replace_between(page, "compare engines", engines_text(engines))


@click.command()
@click.option("--model", "labels", multiple=True, type=click.Choice(MODELS), help="All by default.")
@click.option(
    "--peer", "names", multiple=True, type=click.Choice(["openvino", *PEERS]), help="All by default."
)
@click.option("--workload", "only", multiple=True, type=click.Choice([w.name for w in COMPARED]))
@click.option("--threads", default=2, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Rounds a workload.")
@click.option("--spare", default=2, show_default=True, help="Further rounds while others disturb.")
@click.option("--isa", help="Galley instruction set; the best by default.")
@click.option("--seed", default=1, show_default=True)
@click.option("--write/--no-write", default=True, help="Write the tables into docs/PERFORMANCE.md.")
@click.option(
    "--from",
    "files",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Measure nothing: write the tables of these results files, later ones over earlier ones.",
)
def main(
    *,
    labels: tuple[str, ...],
    names: tuple[str, ...],
    only: tuple[str, ...],
    threads: int,
    repeats: int,
    spare: int,
    isa: str | None,
    seed: int,
    write: bool,
    files: tuple[Path, ...],
) -> None:
    """Time Galley and its peers interleaved; losing rows are shown."""
    if files:
        bodies = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        lines = merged([msgspec.convert(body["lines"], list[Line]) for body in bodies])
        cpus = {body["machine"]["cpu"] for body in bodies}
        shown = ", ".join(f"`benchmarks/results/{path.name}`" for path in files)
        click.echo(table(lines))
        if write:
            engines: dict[str, dict[str, Any]] = {}
            for body in bodies:
                for name, told in body["engines"].items():
                    engines.setdefault(name, {}).update(told)
            write_tables(lines, engines, f"From {shown}: {', '.join(sorted(cpus))}.")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended on the way out
    probe = Probe(BENCH)
    lines = []
    result: dict[str, Any] = {
        "machine": facts(),
        "setup": {"threads": threads, "repeats": repeats, "spare": spare, "seed": seed},
        "workloads": [w for w in COMPARED if not only or w.name in only],
        "engines": {},
        "lines": lines,
        "rounds": {},
    }
    for label in labels or MODELS:
        model = find_model(label)
        shape = Shape.read(model.gguf)
        able, missing = _participants(names or tuple(PEERS), model, threads, isa)
        reading = partial(probe.take, shape.weight_bytes / 1e6, threads=threads)
        for p in able:
            result["engines"].setdefault(p.name, {}).update(_described(p))
        try:
            for workload in result["workloads"]:
                click.echo(f"{label}: {workload.name}", err=True)
                if workload.kind == "start" or workload.kind.startswith("http"):
                    for p in able:
                        p.close_driver()
                rounds, problems = take_rounds(
                    workload, able, reading, repeats=repeats, spare=spare, seed=seed
                )
                result["rounds"][f"{label}, {workload.name}"] = rounds
                same = [p.name for p in able if p.peer.reads_gguf]
                chosen = calmest(rounds, repeats)
                fresh = lines_of(label, workload, chosen, missing | problems, shape=shape, same_file=same)
                lines += fresh
                click.echo(table(fresh), err=True)
                partial_file = BENCH / "compare-unfinished.json"
                partial_file.write_text(json.dumps(msgspec.to_builtins(result), indent=1))
        finally:
            for p in able:
                result["engines"][p.name][f"loaded {label}"] = p.facts
                p.close()
    path = save("compare", result)
    click.echo(table(lines))
    if write:
        source = f"From `benchmarks/results/{path.name}`: {result['machine']['cpu']}, {threads} threads."
        write_tables(lines, result["engines"], source)


if __name__ == "__main__":
    main()
