"""`galley doctor`: measure this machine and say what fits."""

import importlib
from datetime import datetime
from typing import Any

import click
import msgspec

from galley.cli.machine import Machine
from galley.cli.session import ENGINE_FLAGS, Session, settings_options
from galley.cli.terminal import print_json, print_table, size
from galley.runtime.processors import Processors

COST_SIZES = (1, 2, 4, 8, 16, 64, 512)
COST_BLOCKS = 40
"""Of 16 tokens: what ``CostProbe`` asks for."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--fresh", is_flag=True, help="Measure the cost of a step again, also where it is known.")
@settings_options(
    {
        "model": ("--model", "MODEL", "Model whose cost of a step is shown."),
        **{
            key: ENGINE_FLAGS[key]
            for key in ("engine.backend", "engine.isa", "engine.kv_type", "engine.threads")
        },
    }
)
@click.pass_obj
def doctor(session: Session, as_json: bool, fresh: bool) -> None:
    """Measure this machine and say what fits.

    The cost of a step is that of the default model (or of --model). It is measured in about a second and kept
    in the home folder, for the scheduler; a server that finds none kept measures in its first idle second.
    """
    report = examine(session, fresh=fresh)
    if as_json:
        print_json(report)
        return
    machine, kernels, measured = report["machine"], report["kernels"], report["measured"]
    memory = machine["memory_available"]
    total = machine["memory_total"]
    click.echo(
        f"processor  {machine['processor']}, {machine['usable_cores']} of {machine['cores']} cores usable"
    )
    click.echo(f"memory     {size(memory) if memory else '?'} available of {size(total) if total else '?'}")
    click.echo(f"backend    {kernels['backend']}: {kernels['backend_why']}")
    click.echo(f"isa        {kernels['isa'] or '-'}: {kernels['isa_why']}")
    click.echo(f"threads    {kernels['threads']}: {kernels['threads_why']}")
    click.echo(f"           {_affinity(machine)}")
    for warning in kernels["threads_warnings"]:
        click.echo(f"           warning: {warning}")
    if measured["why_not"]:
        click.echo(f"measured   nothing: {measured['why_not']}")
    else:
        click.echo(
            f"measured   {measured['bandwidth_gb_s']:.1f} GB/s memory read"
            f" · {measured['int8_gop_s']:.0f} GOP/s int8"
            f" · {measured['roundtrip_ns']:.0f} ns core to core"
        )
    click.echo(f"home       {report['home']}, {size(report['disk_free'])} free")
    if not report["models"]:
        click.echo(f"models     none; galley pull {session.config.model}")
    for fit in report["models"]:
        click.echo(f"model      {fit['name']}: {_verdict(fit)}")
    _show_cost(report["cost"])


def _affinity(machine: dict[str, Any]) -> str:
    """Affinity mask, siblings and quota, in words."""
    parts = [f"affinity {','.join(str(n) for n in machine['affinity'])} of {machine['cores']} processors"]
    shared = [group for group in machine["physical_cores"] if len(group) > 1]
    parts.append(
        "siblings " + ", ".join("+".join(str(n) for n in group) for group in shared)
        if shared
        else "no two on one core"
    )
    quota = machine["quota"]
    parts.append(f"quota {quota:g} processors ({machine['quota_from']})" if quota else "no quota")
    return " · ".join(parts)


def _show_cost(cost: dict[str, Any]) -> None:
    if cost["why_not"]:
        click.echo(f"cost       unknown: {cost['why_not']}")
        return
    error = f", error {100 * cost['error']:.1f} %" if cost["error"] is not None else ""
    when = datetime.fromtimestamp(cost["taken"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    how = "while serving, idle" if cost["source"] == "idle" else "on its own"
    click.echo(f"cost       of a step of {cost['model']}, measured {when} {how}{error}:")
    for problem in cost["problems"]:
        click.echo(f"           warning: {problem}")

    def ms(point: dict[str, Any], name: str) -> str:
        return ("" if point["measured"] else "about ") + f"{1e3 * point[name]:.2f}"

    print_table(
        ("  TOKENS", "MS, LOGITS OF THE LAST", "MS, LOGITS OF EACH"),
        [
            (
                f"  {point['tokens']}",
                ms(point, "seconds"),
                ms(point, "seconds_all_logits") if point["tokens"] <= 16 else "",
            )
            for point in cost["points"]
        ],
    )
    ratios = " · ".join(f"t({k})/t(1) {cost['ratios'][str(k)]:.2f}" for k in (4, 8))
    click.echo(f"  {ratios}")
    if cost["context_measured"]:
        click.echo(
            f"  1,000 positions of context: {1e6 * cost['context_s']:.3f} ms for a sequence with one token, "
            f"{1e6 * cost['chunk_s']:.4f} ms for each token of a longer piece; "
            f"measured at {cost['context_measured']}"
        )


def examine(session: Session, *, fresh: bool = False) -> dict[str, Any]:
    """The report that ``--json`` prints. Keys are only ever added."""
    import shutil

    from galley.runtime.backend import native_missing

    settings = session.config.engine
    machine = Machine.read()
    missing = native_missing()
    native: Any = importlib.import_module("galley._native") if missing is None else None
    levels: list[str] = list(native.isa_available()) if native else []
    use_native = native is not None and settings.backend != "reference"
    if settings.backend == "reference":
        why = f"asked for by {session.config.origin('engine.backend')}"
    else:
        why = missing or "the kernels are built and this processor can run them"
    isa = (settings.isa or levels[0]) if use_native else None
    if isa is None:
        isa_why = "the reference backend computes in numpy"
    elif settings.isa:
        known = "" if isa in levels else "; NOT available here"
        isa_why = f"asked for by {session.config.origin('engine.isa')}{known}; available: {', '.join(levels)}"
    else:
        isa_why = f"the best of {', '.join(levels)}"
    threads = Processors.read().threads(settings.threads, session.config.origin("engine.threads"))
    measured = _measure(threads.count, missing)
    home = session.config.home
    there = next(folder for folder in (home, *home.parents) if folder.is_dir())
    return {
        "version": 1,
        "machine": msgspec.to_builtins(machine),
        "kernels": {
            "backend": "native" if use_native else "reference",
            "backend_why": why,
            "isa": isa,
            "isa_available": levels,
            "isa_why": isa_why,
            "threads": threads.count,
            "threads_why": threads.why,
            "threads_warnings": list(threads.warnings),
        },
        "measured": measured,
        "home": str(home),
        "disk_free": shutil.disk_usage(there).free,
        "models": [
            _fit(entry, machine, measured["bandwidth_gb_s"], kv_type=settings.kv_type if use_native else None)
            for entry in session.store.survey()[0]
        ],
        "cost": _cost(session, fresh=fresh),
    }


def _measure(threads: int, missing: str | None) -> dict[str, Any]:
    """Under a second: bandwidth, int8 peak and the cost of two cores talking."""
    from galley.bench.machine import Placement

    limits = Placement.probe(threads, seconds=0.7)
    return {
        "bandwidth_gb_s": limits and limits.read_gb_s,
        "int8_gop_s": limits and limits.int8_gop_s,
        "roundtrip_ns": limits and limits.roundtrip_ns,
        "why_not": missing,
    }


def _cost(session: Session, *, fresh: bool) -> dict[str, Any]:
    """The kept cost model of the configured model, or one measured now and kept."""
    from galley.errors import GalleyError

    try:
        entry = session.store.resolve(session.config.model)
        return _cost_of(session, entry, fresh=fresh)
    except (GalleyError, OSError) as error:
        return {"model": session.config.model, "why_not": str(error)}


def _cost_of(session: Session, entry: Any, *, fresh: bool) -> dict[str, Any]:
    import contextlib

    from galley.model.model import Model
    from galley.runtime.backend import open_backend
    from galley.runtime.costbook import CostBook
    from galley.runtime.probe import CostProbe

    settings = session.config.engine
    with contextlib.closing(Model.open(entry.path, entry.name)) as model:
        opened = open_backend(
            settings.backend,
            model.gguf,
            model.spec,
            threads=settings.threads,
            num_blocks=COST_BLOCKS,
            isa=settings.isa,
            kv_type=settings.kv_type,
        )
        with contextlib.closing(opened.backend) as backend:
            book = CostBook(session.config.home / "cost", backend, model.weights_digest)
            found, problem = (None, None) if fresh else book.read()
            problems = [text for text in (opened.warning, problem) if text]
            if found is None or found.source == "idle":
                found = CostProbe(backend, range(COST_BLOCKS)).run()
                if found.doubts is None:
                    book.write(found)
                else:
                    problems.append(f"not kept: {found.doubts}")
    return {
        "model": entry.name,
        "why_not": None,
        "problems": problems,
        **msgspec.to_builtins(found),
        "points": [
            {
                "tokens": size,
                "seconds": found.predict(size, outputs=1),
                "seconds_all_logits": found.predict(size, outputs=size),
                "measured": size <= found.measured_to,
            }
            for size in COST_SIZES
        ],
        "ratios": {str(k): found.ratio(k) for k in (2, 4, 8, 16)},
        "file": str(book.path),
    }


def _fit(entry: Any, machine: Machine, bandwidth: float | None, *, kv_type: str | None) -> dict[str, Any]:
    """Weights, KV and the decode ceiling of one model on this machine."""
    from galley.errors import GalleyError
    from galley.model.families import spec_from_gguf
    from galley.model.gguf import GGUF
    from galley.runtime.memory import kv_bytes_per_token

    fit: dict[str, Any] = {"name": entry.name, "fault": None}
    try:
        with GGUF.open(entry.path) as gguf:
            spec = spec_from_gguf(gguf)
            head = "token_embd.weight" if spec.tied else "output.weight"
            # A step reads one row of the embedding, and the whole head.
            skipped = {"token_embd.weight"} - {head}
            weights = sum(info.nbytes for name, info in gguf.tensors.items() if name not in skipped)
    except GalleyError as error:
        return fit | {"fault": error.message}
    native = kv_type is not None
    per_token = kv_bytes_per_token(spec, kv_type or "f32")
    free = machine.memory_available
    # The reference keeps every weight as f32.
    resident = entry.bytes if native else entry.bytes + 4 * (spec.linear_params + spec.vocab * spec.hidden)
    room = None if free is None else max(0, free - resident)
    return fit | {
        "weight_bytes": weights,
        "resident_bytes": resident,
        "fits": None if free is None else room is not None and room > per_token * 16,
        "kv_bytes_per_token": per_token,
        "context": spec.context,
        "kv_tokens_that_fit": None if room is None else room // per_token,
        "full_contexts_that_fit": None if room is None else room // (per_token * spec.context),
        "decode_ceiling_tok_s": bandwidth * 1e9 / weights if bandwidth and native else None,
    }


def _verdict(fit: dict[str, Any]) -> str:
    if fit["fault"]:
        return str(fit["fault"])
    if fit["fits"] is False:
        return f"does not fit: {size(fit['resident_bytes'])} of weights"
    parts = [f"{size(fit['weight_bytes'])} read a token", f"{size(fit['kv_bytes_per_token'])} of KV a token"]
    if fit["full_contexts_that_fit"] is not None:
        parts.append(f"room for {fit['full_contexts_that_fit']} full contexts of {fit['context']} tokens")
    if fit["decode_ceiling_tok_s"]:
        parts.append(f"at most {fit['decode_ceiling_tok_s']:.0f} tok/s alone")
    return " · ".join(parts)
