"""Rows of the comparison: medians over rounds, ratios inside a round, and the table."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from benchmarks.machine import Limits
from benchmarks.participant import Round
from benchmarks.report import markdown_table
from benchmarks.shape import Shape
from benchmarks.stats import Spread, spread
from benchmarks.workloads import COMPARED, TARGETS, Compared

__all__ = ["OURS", "Line", "calmest", "engines_text", "lines_of", "merged", "table"]

OURS = "galley"


class Line(msgspec.Struct, frozen=True):
    """One engine, one figure of one workload, over all rounds that count."""

    model: str
    workload: str
    figure: str
    engine: str
    value: Spread | None
    """None when there is a ``problem``."""
    ratio: Spread | None = None
    """How many times better Galley is, round by round; None for Galley itself."""
    target: float | None = None
    """What ``ratio`` should reach; on the peer that is hardest to beat."""
    roundtrip_ns: float | None = None
    """Core-to-core round trip beside these rounds, median: tells the placement of the virtual cores."""
    read_gb_s: float | None = None
    """Bandwidth all threads had beside them, median."""
    limit: float | None = None
    """Share of the binding limit reached, for engines that read the same file (decode and prefill)."""
    problem: str | None = None


def calmest(rounds: Sequence[Round], count: int) -> list[Round]:
    """The ``count`` rounds that other processes disturbed least, in the order they were taken."""
    kept = sorted(range(len(rounds)), key=lambda i: rounds[i].foreign_cores)[:count]
    return [rounds[i] for i in sorted(kept)]


def lines_of(
    model: str,
    workload: Compared,
    rounds: Sequence[Round],
    problems: dict[str, str],
    *,
    shape: Shape,
    same_file: Iterable[str],
) -> list[Line]:
    """Lines of one workload, Galley first, then its peers from the hardest to beat to the easiest.

    Args:
        problems: engines that gave no figures, and why.
        same_file: engines that read the file ``shape`` describes.
    """
    engines = list(dict.fromkeys(s.engine for r in rounds for s in r.samples))
    trip = read = None
    if rounds:
        readings: list[Limits] = [reading for r in rounds for reading in (r.before, r.after)]
        trip = spread([x.roundtrip_ns for x in readings]).median
        read = spread([x.read_gb_s for x in readings]).median
    found: list[Line] = []
    for figure in workload.figures:
        for engine in engines:
            mine = [(r, s) for r in rounds if (s := r.of(engine)) is not None]
            values = [s.figures[figure.name] for _, s in mine]
            ratios = [
                figure.ratio(ours.figures[figure.name], s.figures[figure.name])
                for r, s in mine
                if engine != OURS and (ours := r.of(OURS)) is not None
            ]
            limit = None
            if figure.name == "tok/s" and workload.kind in ("decode", "prefill") and engine in same_file:
                limit = spread([_limit(workload, s.figures["tok/s"], r, shape) for r, s in mine]).median
            found.append(
                Line(
                    model=model,
                    workload=workload.name,
                    figure=figure.name,
                    engine=engine,
                    value=spread(values),
                    ratio=spread(ratios) if ratios else None,
                    roundtrip_ns=trip,
                    read_gb_s=read,
                    limit=limit,
                )
            )
    for engine, problem in problems.items():
        found.append(
            Line(model=model, workload=workload.name, figure="", engine=engine, value=None, problem=problem)
        )
    return _ordered(found)


def _ordered(lines: Sequence[Line]) -> list[Line]:
    """In the workloads' order, Galley first, then from the hardest peer, which gets the target."""
    names = [w.name for w in COMPARED]
    figures = [f.name for w in COMPARED for f in w.figures] + [""]
    models = list(dict.fromkeys(x.model for x in lines))

    def place(x: Line) -> tuple[int, int, int, bool, float]:
        ratio = x.ratio.median if x.ratio is not None else 0.0
        figure = figures.index(x.figure)
        return models.index(x.model), names.index(x.workload), figure, x.engine != OURS, ratio

    aimed: set[tuple[str, str, str]] = set()
    found = []
    for x in sorted(lines, key=place):
        key = (x.model, x.workload, x.figure)
        first = x.ratio is not None and key not in aimed
        if first:
            aimed.add(key)
        found.append(msgspec.structs.replace(x, target=_target(*key) if first else None))
    return found


def _target(model: str, workload: str, figure: str) -> float | None:
    for (start, name, wanted), ratio in TARGETS.items():
        if model.startswith(start) and (name, wanted) == (workload, figure):
            return ratio
    return None


def _limit(workload: Compared, rate: float, taken: Round, shape: Shape) -> float:
    """The larger of two shares: bytes read against bandwidth, operations against int8 arithmetic."""
    if workload.kind == "decode":
        passes = rate / workload.sequences
        gop = shape.operations("decode", workload.prompt, rate) * 1e-9
    else:
        passes = -(-workload.prompt // 512) * rate / workload.prompt
        gop = shape.operations("prefill", workload.prompt, rate) * 1e-9
    read = (taken.before.read_gb_s + taken.after.read_gb_s) / 2
    peak = (taken.before.int8_gop_s + taken.after.int8_gop_s) / 2
    return max(shape.weight_bytes * passes * 1e-9 / read, gop / peak)


def merged(parts: Iterable[Sequence[Line]]) -> list[Line]:
    """Lines of several runs; an engine that ran a workload again has its last figures.

    An engine's lines of one workload are replaced together: figures and problem never mix.
    """
    kept: dict[tuple[str, str], dict[str, list[Line]]] = {}
    for part in parts:
        fresh: dict[tuple[str, str], dict[str, list[Line]]] = {}
        for line in part:
            place = fresh.setdefault((line.model, line.workload), {})
            place.setdefault(line.engine, []).append(line)
        for key, engines in fresh.items():
            kept.setdefault(key, {}).update(engines)
    lines = [line for engines in kept.values() for lines in engines.values() for line in lines]
    return _ordered(lines)


def table(lines: Sequence[Line]) -> str:
    """The table of the document. Rows that are lost (ratio below 1) are marked, and none is left out."""
    header = [
        "workload",
        "figure",
        "engine",
        "median",
        "IQR",
        "Galley is",
        "IQR",
        "target",
        "limit",
        "placement",
    ]
    body = []
    for x in lines:
        if x.value is None:
            body.append([x.workload, x.figure, x.engine, f"no figure: {x.problem}", *[""] * 6])
            continue
        ratio = ["", ""]
        if x.ratio is not None:
            lost = " **lost**" if x.ratio.median < 1 else ""
            ratio = [f"{x.ratio.median:.2f}×{lost}", f"{x.ratio.low:.2f}–{x.ratio.high:.2f}"]
        body.append(
            [
                x.workload,
                x.figure,
                x.engine,
                _number(x.value.median),
                f"{_number(x.value.low)}–{_number(x.value.high)}",
                *ratio,
                f"≥ {x.target}×" if x.target else "",
                f"{100 * x.limit:.0f} %" if x.limit is not None else "",
                f"{x.roundtrip_ns:.0f} ns, {x.read_gb_s:.0f} GB/s" if x.roundtrip_ns is not None else "",
            ]
        )
    return markdown_table(header, body)


def engines_text(engines: Mapping[str, Mapping[str, Any]]) -> str:
    """A list of the engines: versions and flags as the results file has them, without what loading told."""
    items = []
    for name, told in engines.items():
        facts = [
            f"{key} {_flags(value)}"
            for key, value in told.items()
            if key not in ("name", "isa", "fingerprint") and not key.startswith("loaded ")
        ]
        items.append(f"- **{name}**: {'; '.join(facts)}")
    return "\n".join(items)


def _flags(value: object) -> str:
    return f"`{' '.join(map(str, value))}`" if isinstance(value, list) else f"`{value}`"


def _number(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
