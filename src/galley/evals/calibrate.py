"""Fitting a cascade's judge: from the signals of answers whose worth is known to the share of good ones.

A logistic regression on the signals, then isotonic regression (pool adjacent violators, Ayer et al. 1955)
from its logit to the share of good answers, in groups large enough that no share rests on a handful. What the
file says of itself (ECE, AUROC, Brier, thresholds) is of predictions on rows that were held out in turn.
"""

import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from galley.errors import InvalidRequest
from galley.evals.outcomes import prompt_key
from galley.router.cascade import SIGNALS, VERSION, Calibration

__all__ = ["Answers", "Question", "auroc", "calibrate", "ece", "graded", "read_answers"]

Floats = npt.NDArray[np.float64]
FOLDS = 5
LEAST = 50
"""Rows below which nothing is fitted, and a fifth of them: the least of either kind."""
PENALTY = 1.0
LEVELS = (60, 70, 80, 90, 95)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Answers:
    """N answers: signals float64 [N, len(SIGNALS)], good float64 [N] in 0..1, keys of their prompts.

    Raises InvalidRequest: fewer than LEAST rows, or nearly all of one kind.
    """

    def __init__(self, signals: Floats, good: Floats, keys: list[int]) -> None:
        if len(good) < LEAST:
            raise InvalidRequest(
                f"{len(good)} answers are too few to calibrate on; {LEAST} at least", param="data"
            )
        rare = min(good.sum(), (1 - good).sum())
        if rare < LEAST / 5:
            raise InvalidRequest(
                f"{good.mean():.1%} of {len(good)} answers are good; of both kinds {LEAST // 5} are needed",
                param="data",
            )
        self.signals = signals
        self.good = good
        self.keys = keys


class Question:
    """One prompt and what a good answer holds."""

    def __init__(self, prompt: str, answer: str) -> None:
        self.prompt = prompt
        self.answer = answer


def read_answers(path: Path) -> tuple[list[Question], list[tuple[list[float], float, int]]]:
    """A jsonl (gzipped or not) of ``{question, answer}``, to be asked, or of ``{signals: {name: value}, good:
    0..1}`` (and perhaps ``question``), as recorded elsewhere. Raises InvalidRequest naming the line."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path}: cannot be read: {error}", param="data") from error
    questions: list[Question] = []
    recorded: list[tuple[list[float], float, int]] = []
    for line, piece in enumerate(text.split("\n"), 1):
        if not piece.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(piece)
            if "signals" in row:
                signals = [float(row["signals"][name]) for name in SIGNALS]
                good = float(row["good"])
                if not all(map(math.isfinite, signals)) or not 0 <= good <= 1:
                    raise ValueError("a signal is not finite, or good lies outside 0..1")
                recorded.append((signals, good, prompt_key(str(row.get("question", f"line {line}")))))
            else:
                questions.append(Question(str(row["question"]), str(row["answer"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(
                f"{path}: line {line}: {error!r}; a row is {{question, answer}} or {{signals, good}}",
                param="data",
            ) from error
    if not questions and not recorded:
        raise InvalidRequest(f"{path}: the file is empty", param="data")
    return questions, recorded


def graded(output: str, answer: str) -> bool:
    """Whether an output is right: its last number equals the answer's (what follows ``####``, if that is
    there, or an answer that is a number); else the answer occurs in it as whole words, in any case."""
    gold = answer.rsplit("####", 1)[-1].strip()
    wanted = _NUMBER.fullmatch(gold)
    if wanted:
        found = _NUMBER.findall(output)
        return bool(found) and float(found[-1].replace(",", "")) == float(gold.replace(",", ""))
    return re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", output, re.I) is not None


def calibrate(
    answers: Answers,
    *,
    model: str,
    weights: str,
    tokens: int,
    source: str,
    tell: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Fit. Deterministic; folds are by prompt key."""
    x, good = answers.signals, answers.good
    place = np.array([key % FOLDS for key in answers.keys])
    held = np.zeros(len(good))
    for fold in range(FOLDS):
        test = place == fold
        if test.any() and not test.all():
            held[test] = Fit(x[~test], good[~test]).confidence(x[test])
    fit = Fit(x, good)
    found = {f"accept{share}": float(np.quantile(held, 1 - share / 100)) for share in (25, 50, 75)}
    order = np.argsort(-held, kind="stable")
    right = np.cumsum(good[order]) / np.arange(1, len(good) + 1)
    for level in LEVELS:
        # The lowest threshold: the longest beginning of the most confident of which so many are good.
        enough = np.flatnonzero(right >= level / 100)
        if len(enough) and enough[-1] >= LEAST / 5:
            found[f"right{level}"] = float(held[order[enough[-1]]])
    tell(f"{len(good)} answers, {good.mean():.1%} good")
    return Calibration(
        version=VERSION,
        model=model,
        weights=weights,
        tokens=tokens,
        signals=list(SIGNALS),
        centre=fit.centre.tolist(),
        spread=fit.spread.tolist(),
        slopes=fit.slopes.tolist(),
        intercept=fit.intercept,
        knots=fit.knots.tolist(),
        shares=fit.shares.tolist(),
        thresholds=found,
        rows=len(good),
        good=float(good.mean()),
        ece=ece(held, good),
        auroc=auroc(held, good),
        brier=float(((held - good) ** 2).mean()),
        source=source,
        keys=sorted(answers.keys),
    )


class Fit:
    """Logistic regression by Newton's method, then isotonic regression on its logits."""

    def __init__(self, x: Floats, good: Floats) -> None:
        self.centre = x.mean(axis=0)
        spread = x.std(axis=0)
        self.spread = np.where(spread < 1e-9, 1.0, spread)
        z = np.hstack([self._scaled(x), np.ones((len(x), 1))])
        penalty = np.diag([PENALTY] * x.shape[1] + [0.0])
        w = np.zeros(z.shape[1])
        for _ in range(50):
            p = 1 / (1 + np.exp(-np.clip(z @ w, -30, 30)))
            hessian = (z * (p * (1 - p))[:, None]).T @ z + penalty + 1e-9 * np.eye(len(w))
            step = np.linalg.solve(hessian, z.T @ (good - p) - penalty @ w)
            # A full step can overshoot where classes are almost separable.
            w = w + step * min(1.0, 2.0 / max(1e-12, float(np.abs(step).max())))
            if np.abs(step).max() < 1e-8:
                break
        self.slopes, self.intercept = w[:-1], float(w[-1])
        self.knots, self.shares = isotonic(z @ w, good)

    def confidence(self, x: Floats) -> Floats:
        """float64 [N], as ``Calibration.confidence`` gives it."""
        logit = self._scaled(x) @ self.slopes + self.intercept
        return np.asarray(np.interp(logit, self.knots, self.shares), dtype=np.float64)

    def _scaled(self, x: Floats) -> Floats:
        scaled: Floats = np.clip((x - self.centre) / self.spread, -4.0, 4.0)
        return scaled


def isotonic(logit: Floats, good: Floats) -> tuple[Floats, Floats]:
    """Knots (mean logit of a block, strictly ascending) and shares (ascending): pool adjacent violators over
    groups of at least 20 rows, or a twentieth of them."""
    order = np.argsort(logit, kind="stable")
    size = max(20, len(good) // 20)
    groups = np.array_split(order, max(1, len(good) // size))
    blocks: list[list[float]] = []  # rows, sum of logits, sum of good
    for group in groups:
        blocks.append([float(len(group)), float(logit[group].sum()), float(good[group].sum())])
        while len(blocks) > 1 and blocks[-2][2] / blocks[-2][0] >= blocks[-1][2] / blocks[-1][0]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
        while len(blocks) > 1 and blocks[-1][1] / blocks[-1][0] <= blocks[-2][1] / blocks[-2][0]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    table = np.array(blocks)
    # One good and one bad row are added to every block: no share of a finite sample is 0 or 1.
    return table[:, 1] / table[:, 0], (table[:, 2] + 1) / (table[:, 0] + 2)


def ece(confidence: Floats, good: Floats, bins: int = 10) -> float:
    """Expected calibration error over bins of equal size."""
    parts = np.array_split(np.argsort(confidence, kind="stable"), bins)
    gaps = [abs(confidence[p].mean() - good[p].mean()) * len(p) for p in parts if len(p)]
    return float(sum(gaps) / len(good))


def auroc(confidence: Floats, good: Floats) -> float:
    """Probability that a good answer has the higher confidence; ties count half."""
    values, place = np.unique(confidence, return_inverse=True)
    above = np.zeros(len(values))
    np.add.at(above, place, good)
    below = np.zeros(len(values))
    np.add.at(below, place, 1 - good)
    pairs = good.sum() * (1 - good).sum()
    wins = (above * (np.cumsum(below) - below + below / 2)).sum()
    return float(wins / pairs) if pairs else 0.5
