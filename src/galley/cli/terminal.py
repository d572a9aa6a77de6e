"""Terminal: tables, sizes and progress for people; JSON for programs."""

import sys
import time
from collections.abc import Sequence
from typing import Any, Self

import click
import msgspec

from galley.config import colour_wanted
from galley.model.progress import PullPlan
from galley.types import Delta

ASK_ABOVE = 1_000_000_000
"""Bytes. Larger downloads are asked about when somebody is there to answer."""


def print_json(value: Any, *, lines: bool = False) -> None:
    """One JSON document on stdout; ``lines`` keeps it on a single line."""
    data = msgspec.json.encode(value, enc_hook=str)
    click.echo(data if lines else msgspec.json.format(data, indent=2))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> None:
    """Columns as wide as their widest cell; nothing cut, so that it can be piped. ``numbers``: all columns
    but the first are right-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    bold = sys.stdout.isatty() and colour_wanted()
    for number, row in enumerate([head, *rows]):
        cells = [
            cell.rjust(width) if numbers and column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        line = "  ".join(cells).rstrip()
        click.echo(click.style(line, bold=True) if bold and number == 0 else line)


def echo_delta(delta: Delta, thinking: bool) -> bool:
    """A piece of an answer on stdout, reasoning dim and apart. Returns whether reasoning came last."""
    if delta.reasoning:
        dim = sys.stdout.isatty() and colour_wanted()
        click.echo(click.style(delta.reasoning, dim=True) if dim else delta.reasoning, nl=False)
        thinking = True
    if delta.text:
        click.echo(f"\n\n{delta.text}" if thinking else delta.text, nl=False)
        thinking = False
    return thinking


def size(count: float) -> str:
    """Bytes in decimal units: ``98.4 MB``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


class PullProgress:
    """A bar on a terminal; otherwise a plain line a phase and a quarter. Draws on stderr."""

    def __init__(self, *, yes: bool) -> None:
        self._yes = yes
        self._bar: Any = None
        self._title = ""
        self._total = 0
        self._done = 0
        self._told = 0
        self._began = 0.0
        self._draws = sys.stderr.isatty() and colour_wanted()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        """The bar, if there is one, stays as it is."""
        if self._bar is not None:
            self._bar.render_finish()
            self._bar = None

    def plan(self, plan: PullPlan) -> None:
        """Say what, how large and from where; ask when it is large and somebody can answer."""
        fetch = size(plan.download_bytes) if plan.download_bytes else "nothing"
        self.note(f"{plan.name}: {plan.what}")
        self.note(f"  from     {plan.origin}")
        self.note(f"  download {fetch}, {size(plan.disk_bytes)} on disk")
        if plan.license:
            self.note(f"  licence  {plan.license}")
        if plan.sha256:
            self.note(f"  sha256   {plan.sha256}")
        if plan.download_bytes > ASK_ABOVE and not self._yes and sys.stdin.isatty():
            click.confirm("Download it?", abort=True, err=True)

    def phase(self, title: str, total: int) -> None:
        self._end()
        self._title, self._total, self._told, self._began = title, total, 0, time.monotonic()
        self._done = 0
        if not self._draws:
            click.echo(f"{title}: {size(total)}", err=True)
            return
        self._bar = click.progressbar(
            length=total, label=f"{title} ({size(total)})", file=sys.stderr, update_min_steps=total // 200
        )
        self._bar.render_progress()

    def advance(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done - self._done)
            self._done = done
            return
        quarter = 4 * done // max(1, self._total)
        # Quick phases need no running commentary in a log.
        if quarter > self._told and time.monotonic() - self._began > 5:
            click.echo(f"{self._title}: {size(done)} of {size(self._total)}", err=True)
        self._told = max(self._told, quarter)

    def note(self, text: str) -> None:
        self._end()
        click.echo(text, err=True)
