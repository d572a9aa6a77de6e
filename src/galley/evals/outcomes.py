"""Outcomes: which models answered which prompts how well, read from the files a router is trained on."""

import csv
import gzip
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from galley.errors import InvalidRequest

__all__ = ["Outcomes", "Prices", "prompt_key"]

Floats = npt.NDArray[np.float64]
PAIR = ("weak_correct", "strong_correct")
OUTPUT_TOKENS = 256
"""Output tokens assumed of every answer when prices are per token and the file has no counts."""


def prompt_key(prompt: str) -> int:
    """63 bits of the prompt's sha256: by it splits are cut and trained rows are recognised."""
    return int.from_bytes(hashlib.sha256(prompt.strip().encode("utf-8", "replace")).digest()[:8], "big") >> 1


class Prices:
    """USD per million input and output tokens, by model.

    File: JSON ``{"models": {name: {"input_price": x, "output_price": y}}}``.
    Raises InvalidRequest: unreadable, or a price that is not a number >= 0.
    """

    def __init__(self, table: dict[str, tuple[float, float]], source: str) -> None:
        self.table = table
        self.source = source

    @classmethod
    def read(cls, path: Path) -> "Prices":
        try:
            models = json.loads(path.read_bytes())["models"]
            table = {
                name: (float(row["input_price"]), float(row["output_price"])) for name, row in models.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"{path}: no price file: {error!r}", param="prices") from error
        if any(not price >= 0 for pair in table.values() for price in pair):
            raise InvalidRequest(f"{path}: a price is negative or not a number", param="prices")
        return cls(table, str(path))


class Outcomes:
    """N prompts by M models.

    Attributes:
        prompts, groups: N strings; a group is the subject (or source) by which unseen groups are cut.
        models: M names, cheapest first.
        quality: float64 [N, M], 0..1.
        cost: float64 [N, M]; ``unit`` says of what.
        keys: N prompt keys.
    """

    def __init__(
        self,
        *,
        name: str,
        prompts: list[str],
        groups: list[str],
        models: list[str],
        quality: Floats,
        cost: Floats,
        unit: str,
        sort: bool = True,
    ) -> None:
        # A selection of rows keeps the order of the whole.
        order = np.argsort(cost.mean(axis=0), kind="stable") if sort else np.arange(len(models))
        self.name = name
        self.prompts = prompts
        self.groups = groups
        self.models = [models[i] for i in order]
        self.quality = np.ascontiguousarray(quality[:, order])
        self.cost = np.ascontiguousarray(cost[:, order])
        self.unit = unit
        self.keys = [prompt_key(prompt) for prompt in prompts]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: "npt.NDArray[np.intp]") -> "Outcomes":
        """Some of the rows, in the order given."""
        return Outcomes(
            name=self.name,
            prompts=[self.prompts[i] for i in rows],
            groups=[self.groups[i] for i in rows],
            models=list(self.models),
            quality=self.quality[rows],
            cost=self.cost[rows],
            unit=self.unit,
            sort=False,
        )

    @classmethod
    def read(cls, path: Path, prices: Prices | None = None) -> "Outcomes":
        """A csv with ``prompt, weak_correct, strong_correct`` (and ``subject`` or ``source``), or a jsonl of
        ``{question, scores: {model: 0..1}}``; either may be gzipped.

        Rows with ``decontaminated=0`` are left out, as their publishers do. A prompt that occurs twice is
        kept once. For a pair the cost is counted in strong calls (weak 0, strong 1). For many models it is
        micro-dollars a request by ``prices``, with prompt tokens taken as characters / 4 and OUTPUT_TOKENS
        of output; without prices every call costs 1, and ``unit`` says so.

        Raises InvalidRequest naming the file and the line.
        """
        try:
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"{path}: cannot be read: {error}", param="data") from error
        if not text.strip():
            raise InvalidRequest(f"{path}: the file is empty", param="data")
        name = path.name.split(".")[0]
        if text.lstrip().startswith("{"):
            return cls._many(name, path, text, prices)
        return cls._pair(name, path, text)

    @classmethod
    def _pair(cls, name: str, path: Path, text: str) -> "Outcomes":
        prompts: dict[str, tuple[str, float, float]] = {}
        for line, row in enumerate(csv.DictReader(io.StringIO(text)), 2):
            try:
                pair = [float(row[column]) for column in PAIR]
                prompt = row["prompt"]
            except (KeyError, TypeError, ValueError) as error:
                raise InvalidRequest(
                    f"{path}: row {line}: {error!r}; a csv needs the columns prompt, {', '.join(PAIR)}",
                    param="data",
                ) from error
            _check(path, line, prompt, pair)
            if row.get("decontaminated", "1") != "0":
                prompts.setdefault(prompt, (row.get("subject") or row.get("source") or "", pair[0], pair[1]))
        if not prompts:
            raise InvalidRequest(f"{path}: no row is left", param="data")
        quality = np.array([row[1:] for row in prompts.values()], dtype=np.float64)
        cost = np.tile(np.array([0.0, 1.0]), (len(prompts), 1))
        groups = [row[0] for row in prompts.values()]
        return cls(
            name=name,
            prompts=list(prompts),
            groups=groups,
            models=["weak", "strong"],
            quality=quality,
            cost=cost,
            unit="strong calls a request",
        )

    @classmethod
    def _many(cls, name: str, path: Path, text: str, prices: Prices | None) -> "Outcomes":
        rows: dict[str, tuple[str, dict[str, float]]] = {}
        for line, piece in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold U+2028
            if not piece.strip():
                continue
            try:
                row: dict[str, Any] = json.loads(piece)
                prompt = row["question"]
                scores = {str(model): float(score) for model, score in row["scores"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InvalidRequest(
                    f"{path}: line {line}: {error!r}; a row is {{question, scores: {{model: number}}}}",
                    param="data",
                ) from error
            _check(path, line, prompt, list(scores.values()))
            group = row.get("task") or row.get("subject") or row.get("source") or ""
            rows.setdefault(prompt, (str(group), scores))
        if not rows:
            raise InvalidRequest(f"{path}: no row is left", param="data")
        models = sorted(next(iter(rows.values()))[1])
        for prompt, (_, scores) in rows.items():
            if sorted(scores) != models:
                raise InvalidRequest(
                    f"{path}: {prompt[:60]!r} has other models than the first row", param="data"
                )
        quality = np.array([[scores[m] for m in models] for _, scores in rows.values()])
        if prices is None:
            cost, unit = np.ones_like(quality), "calls a request (no prices given)"
        else:
            unpriced = [m for m in models if m not in prices.table]
            if unpriced:
                raise InvalidRequest(
                    f"{prices.source}: no price for {', '.join(unpriced)}; an unknown price is never zero",
                    param="prices",
                )
            tokens = np.array([len(prompt) / 4 for prompt in rows])[:, None]
            table = np.array([prices.table[m] for m in models])
            cost = tokens * table[:, 0] + OUTPUT_TOKENS * table[:, 1]
            unit = f"micro-dollars a request (characters / 4 in, {OUTPUT_TOKENS} out)"
        groups = [group for group, _ in rows.values()]
        return cls(
            name=name,
            prompts=list(rows),
            groups=groups,
            models=models,
            quality=quality,
            cost=cost,
            unit=unit,
        )


def _check(path: Path, line: int, prompt: object, scores: list[float]) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidRequest(f"{path}: row {line}: the prompt is empty", param="data")
    if not scores or any(not 0 <= score <= 1 for score in scores):
        raise InvalidRequest(f"{path}: row {line}: a score lies outside 0..1", param="data")
