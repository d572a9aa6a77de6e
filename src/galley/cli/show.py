"""`galley show`: what a model is made of."""

from collections import defaultdict
from typing import Any

import click

from galley.cli.session import Session
from galley.cli.terminal import print_json, size


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_obj
def show(session: Session, model: str, as_json: bool) -> None:
    """Show what a model is made of."""
    entry = session.store.resolve(model)
    from galley.model.model import Model

    opened = Model.open(entry.path, entry.name)
    try:
        facts = describe(opened)
        facts["weights_sha256"] = entry.sha256 or opened.weights_digest
    finally:
        opened.close()
    facts |= {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "path": str(entry.path),
        "bytes": entry.bytes,
        "source": entry.source,
        "revision": entry.revision,
        "license": entry.license or facts["license"],
    }
    if as_json:
        print_json(facts)
        return
    spec = facts["spec"]
    indent = "\n" + " " * 14
    kinds = indent.join(
        f"{row['type']:<8}{row['tensors']:>5} tensors  {size(row['bytes'])}" for row in facts["types"]
    )
    rows = [
        ("name", ", ".join([entry.name, *entry.aliases])),
        ("architecture", spec["arch"]),
        (
            "sizes",
            f"{facts['parameters'] / 1e6:.1f} M parameters · {spec['layers']} layers"
            f" · hidden {spec['hidden']} · ffn {spec['ffn']}"
            f" · {spec['heads']} heads, {spec['kv_heads']} for KV, of {spec['head_dim']}",
        ),
        ("vocabulary", f"{spec['vocab']:,}{' (head tied to the embedding)' if spec['tied'] else ''}"),
        ("context", f"{spec['context']:,} tokens"),
        ("quantisation", kinds),
        ("chat format", facts["chat_format"] or "none: only --raw and /v1/completions"),
        ("tool format", facts["tool_format"]),
        ("cache", facts["prefix_stability"]["words"] if facts["prefix_stability"] else "-"),
        ("licence", facts["license"] or "not stated"),
        ("file", f"{size(entry.bytes)} at {entry.path}"),
        ("source", entry.source + (f" at {entry.revision}" if entry.revision else "")),
        ("weights", f"sha256 {facts['weights_sha256']}"),
        ("tokenizer", f"sha256 {facts['tokenizer_sha256']}"),
        ("template", f"sha256 {facts['template_sha256']}" if facts["template_sha256"] else "-"),
    ]
    for label, text in rows:
        click.echo(f"{label:<14}{text}")


def describe(model: Any) -> dict[str, Any]:
    """JSON-safe facts of an open ``Model``: spec, tensors by type, chat format, digests."""
    import msgspec

    from galley.model.stability import check_stability

    stability = None
    if model.template is not None:
        found = check_stability(model.template, model.tokenizer)
        stability = {**msgspec.to_builtins(found), "lost_share": found.lost_share, "words": found.words()}
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    parameters = 0
    for info in model.gguf.tensors.values():
        row = counts[info.type.name]
        row[0] += 1
        row[1] += info.nbytes
        elements = 1
        for extent in info.shape:
            elements *= extent
        parameters += elements
    types = [{"type": kind, "tensors": row[0], "bytes": row[1]} for kind, row in counts.items()]
    stated = model.gguf.metadata.get("general.license")
    return {
        "spec": msgspec.to_builtins(model.spec),
        "parameters": parameters,
        "types": sorted(types, key=lambda row: -int(row["bytes"])),
        "tool_format": tool_format(model),
        "chat_format": model.template.name if model.template else None,
        "prefix_stability": stability,
        "license": str(stated) if stated else None,
        "tokenizer_sha256": model.tokenizer.digest,
        "template_sha256": model.template.digest if model.template else None,
    }


def tool_format(model: Any) -> str:
    """How calls and reasoning are written, as told from the template."""
    from galley.runtime.text.formats import detect

    if model.template is None:
        return "-"
    record = detect(model.template.source)
    told = "" if "tools" in model.template.source else "; tools are described in the system message"
    think = f"; reasoning {' … '.join(record.think)}" if record.think else ""
    return f"{record.name}{think}{told}"
