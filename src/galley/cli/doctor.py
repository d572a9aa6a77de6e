"""`galley doctor`: measure this machine and say what fits."""

import importlib
from typing import Any

import click
import msgspec

from galley.cli.machine import Machine
from galley.cli.session import ENGINE_FLAGS, Session, settings_options
from galley.cli.terminal import print_json, size

PROBE_MEGABYTES = 256
"""Well over any last-level cache, so that memory is measured and not a cache."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@settings_options({key: ENGINE_FLAGS[key] for key in ("engine.backend", "engine.isa", "engine.threads")})
@click.pass_obj
def doctor(session: Session, as_json: bool) -> None:
    """Measure this machine and say what fits."""
    report = examine(session)
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


def examine(session: Session) -> dict[str, Any]:
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
    threads = settings.threads or machine.usable_cores
    threads_why = (
        f"asked for by {session.config.origin('engine.threads')}"
        if settings.threads
        else "one for each core this process may use"
    )
    measured = _measure(native, threads, missing)
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
            "threads": threads,
            "threads_why": threads_why,
        },
        "measured": measured,
        "home": str(home),
        "disk_free": shutil.disk_usage(there).free,
        "models": [
            _fit(entry, machine, measured["bandwidth_gb_s"], native=use_native)
            for entry in session.store.list()
        ],
    }


def _measure(native: Any, threads: int, missing: str | None) -> dict[str, Any]:
    """Under a second: bandwidth, int8 peak and the cost of two cores talking."""
    if native is None:
        return {"bandwidth_gb_s": None, "int8_gop_s": None, "roundtrip_ns": None, "why_not": missing}
    return {
        "bandwidth_gb_s": native.probe_bandwidth(threads, PROBE_MEGABYTES, 0.4),
        "int8_gop_s": native.probe_int8(threads, 0.2),
        "roundtrip_ns": native.probe_roundtrip(0.1),
        "why_not": None,
    }


def _fit(entry: Any, machine: Machine, bandwidth: float | None, *, native: bool) -> dict[str, Any]:
    """Weights, KV and the decode ceiling of one model on this machine."""
    from galley.errors import GalleyError
    from galley.model.families import spec_from_gguf
    from galley.model.gguf import GGUF

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
    # f16 keys and values in the native arena, f32 in the reference.
    per_token = spec.layers * 2 * spec.kv_rows * (2 if native else 4)
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
