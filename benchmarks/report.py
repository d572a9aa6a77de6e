"""Where results go: JSON files beside the harness, and tables between markers in the documents."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from galley.bench.machine import commit

__all__ = ["commit", "markdown_table", "replace_between", "save"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table: first column left, the others right aligned. Raises ValueError for a ragged row."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, the header {len(header)}: {list(row)}")
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return (
            "| "
            + " | ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])
            + " |"
        )

    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


def replace_between(path: Path, name: str, text: str) -> None:
    """Put ``text`` between ``<!-- name -->`` and ``<!-- /name -->`` in a document.

    Raises ValueError when the pair of markers is not there exactly once.
    """
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    body = path.read_text(encoding="utf-8")
    if body.count(opening) != 1 or body.count(closing) != 1 or body.index(opening) > body.index(closing):
        raise ValueError(f"{path}: needs {opening} and {closing} once each, in this order")
    before, rest = body.split(opening)
    after = rest.split(closing)[1]
    path.write_text(f"{before}{opening}\n{text.strip()}\n{closing}{after}", encoding="utf-8")


def save(kind: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``<folder>/<kind>-<UTC date and time>.json`` and return its path."""
    stamp = datetime.now(UTC)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{stamp:%Y%m%d-%H%M%S}.json"
    whole = {"kind": kind, "taken": stamp.isoformat(timespec="seconds"), "commit": commit(ROOT), **result}
    path.write_text(json.dumps(msgspec.to_builtins(whole), indent=1) + "\n", encoding="utf-8")
    return path
