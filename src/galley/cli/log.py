"""`galley log` and `galley receipt`: what was asked, what it used, how it ended."""

import time
from collections.abc import Sequence

import click

from galley.cli.session import Session
from galley.cli.terminal import print_json, size
from galley.errors import NotFound
from galley.types import Receipt

_HEAD = ("TIME", "STATUS", "API", "MODEL", "PROMPT", "CACHED", "OUTPUT", "TTFT", "TOK/S", "RECEIPT")


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on with new receipts until Ctrl-C.")
@click.option(
    "--limit",
    "-n",
    metavar="N",
    default=20,
    show_default=True,
    type=click.IntRange(min=0),
    help="Most receipts to list.",
)
@click.option("--model", metavar="MODEL", help="Only this model's.")
@click.option("--json", "as_json", is_flag=True, help="One JSON receipt a line.")
@click.pass_obj
def log(session: Session, follow: bool, limit: int, model: str | None, as_json: bool) -> None:
    """List receipts, newest last; -f follows."""
    from galley.audit.receipts import ReceiptStore

    store = ReceiptStore(session.config.receipts.path)
    try:
        listed = store.list(limit=limit, model=model) if limit else []
        if not listed and not follow and not as_json:
            whose = f" of {model}" if model else ""
            click.echo(f"No receipts{whose} in {session.config.receipts.path}.", err=True)
            return
        lines = Lines(listed, as_json=as_json)
        for receipt in reversed(listed):
            lines.print(receipt)
        if follow:
            for receipt in store.follow():
                if model is None or receipt.model == model:
                    lines.print(receipt)
    finally:
        store.close()


@click.command()
@click.argument("id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="The whole receipt as JSON.")
@click.pass_obj
def receipt(session: Session, id: str, as_json: bool) -> None:
    """Show one receipt in full."""
    from galley.audit.receipts import ReceiptStore

    store = ReceiptStore(session.config.receipts.path)
    try:
        found = store.get(id)
    finally:
        store.close()
    if found is None:
        raise NotFound(f"There is no receipt {id!r} in {session.config.receipts.path}.", hint="galley log")
    if as_json:
        print_json(found)
        return
    for label, text in _lines(found):
        click.echo(f"{label:<12}{text}")


def speed(receipt: Receipt) -> float | None:
    """Tokens a second while decoding; None with fewer than two tokens."""
    tokens = receipt.usage.completion_tokens - len(receipt.choices)
    return tokens / receipt.times.decode_s if tokens > 0 and receipt.times.decode_s > 0 else None


def summary(receipt: Receipt) -> str:
    """``local · 42 tokens · TTFT 0.31 s · 14.2 tok/s · cached 0 · receipt ID``."""
    times, usage = receipt.times, receipt.usage
    ttft = "-" if times.ttft_s is None else f"{times.ttft_s:.2f} s"
    rate = speed(receipt)
    parts = [
        receipt.route.location if receipt.route else "-",
        *(
            [f"escalated from {receipt.judgement.first}"]
            if receipt.judgement and receipt.judgement.escalated
            else []
        ),
        f"{usage.completion_tokens} tokens",
        f"TTFT {ttft}",
        "- tok/s" if rate is None else f"{rate:.1f} tok/s",
        f"cached {usage.cached_tokens}",
        f"receipt {receipt.id}",
    ]
    return " · ".join(parts)


class Lines:
    """Receipts a line each, in columns as wide as what is listed needs; later lines may be wider."""

    def __init__(self, listed: Sequence[Receipt], *, as_json: bool) -> None:
        self._as_json = as_json
        api = max([16, *(len(receipt.api) for receipt in listed)])
        name = max([20, *(len(receipt.model) for receipt in listed)])
        self._form = f"{{:<19}}  {{:<12}}  {{:<{api}}}  {{:<{name}}}" + "  {:>7}" * 3 + "  {:>8}" * 2 + "  {}"
        if not as_json:
            click.echo(self._form.format(*_HEAD))

    def print(self, receipt: Receipt) -> None:
        """One receipt."""
        if self._as_json:
            print_json(receipt, lines=True)
            return
        rate = speed(receipt)
        ttft = receipt.times.ttft_s
        click.echo(
            self._form.format(
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(receipt.created)),
                receipt.status,
                receipt.api,
                receipt.model,
                receipt.usage.prompt_tokens,
                receipt.usage.cached_tokens,
                receipt.usage.completion_tokens,
                "-" if ttft is None else f"{ttft:.3f} s",
                "-" if rate is None else f"{rate:.1f}",
                receipt.id,
            )
        )


def _lines(r: Receipt) -> list[tuple[str, str]]:
    usage, times, used = r.usage, r.times, r.resources
    rows = [
        ("receipt", r.id),
        ("request", r.request_id),
        ("time", time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(r.created))),
        ("status", r.status + (f": {r.error.get('message')}" if r.error else "")),
        ("asked by", f"{r.api} · tenant {r.tenant} · user {r.user or '-'} · key {r.key or '-'}"),
        ("model", r.model),
    ]
    if r.route:
        rows.append(
            ("route", f"{r.route.provider} ({r.route.location}), rule {r.route.rule}: {r.route.reason}")
        )
    if r.shadow_of:
        rows.append(("shadow of", r.shadow_of))
    if r.judgement:
        what = f"escalated to {r.judgement.to}" if r.judgement.escalated else "kept"
        rows.append(("cascade", f"{r.judgement.first} {what}: {r.judgement.reason}"))
    ends = ", ".join(f"#{choice.index} {choice.finish or r.status}" for choice in r.choices) or "-"
    rows += [
        ("finish", ends),
        (
            "tokens",
            f"{usage.prompt_tokens} prompt ({usage.cached_tokens} cached), {usage.completion_tokens} output",
        ),
        (
            "times",
            f"queue {times.queue_s:.3f} s · prefill {times.prefill_s:.3f} s · decode {times.decode_s:.3f} s"
            f" · total {times.total_s:.3f} s",
        ),
        (
            "resources",
            f"{used.steps} steps · {used.computed_tokens} positions"
            f" · {used.prefill_flop / 1e9:.2f} GFLOP prefill"
            f" · {size(used.decode_bytes)} read decoding · {used.kv_byte_seconds / 1e6:.2f} MB·s of KV",
        ),
        (
            "sampling",
            ", ".join(f"{key}={value}" for key, value in r.params.items() if value not in (None, [], {})),
        ),
        ("ignored", ", ".join(r.ignored_params) or "-"),
        ("adjusted", ", ".join(f"{key}: {why}" for key, why in r.clamped.items()) or "-"),
        ("weights", r.digests.weights or "-"),
        ("tokenizer", r.digests.tokenizer or "-"),
        ("template", r.digests.template or "-"),
        ("engine", r.digests.engine or "-"),
    ]
    if r.prompt is not None:
        rows.append(("prompt", str(r.prompt)))
    for text in r.output or ():
        rows.append(("output", text))
    return rows
