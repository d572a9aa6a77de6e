"""Evaluating routers: cross-validated from outcomes, or a trained file on rows it has not seen."""

import hashlib
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from galley.errors import InvalidRequest
from galley.evals.curve import Curve, Figure, measure
from galley.evals.outcomes import Outcomes
from galley.evals.train import target, thresholds, train, train_plain
from galley.router.scorer import RouterFile, Scorer

__all__ = ["Report", "cross_validate", "evaluate", "folds", "trained"]

Floats = npt.NDArray[np.float64]
By = Literal["prompt", "subject"]
Report = dict[str, dict[str, Figure]]


def folds(outcomes: Outcomes, by: By, count: int) -> "npt.NDArray[np.intp]":
    """Fold of each row, by a hash of the prompt or of its subject: nothing else decides, so adding rows
    moves none. Raises InvalidRequest when there are fewer subjects than folds."""
    if by == "prompt":
        return np.array([key % count for key in outcomes.keys], dtype=np.intp)
    subjects = sorted(set(outcomes.groups), key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(subjects) < count:
        raise InvalidRequest(
            f"{outcomes.name}: {len(subjects)} subjects cannot make {count} folds", param="by"
        )
    place = {subject: i % count for i, subject in enumerate(subjects)}
    return np.array([place[group] for group in outcomes.groups], dtype=np.intp)


def scores_of(file: RouterFile, outcomes: Outcomes) -> Floats:
    """float64 [N, outputs] of a router on prompts."""
    scorer = Scorer(file)
    return np.array([scorer.scores(prompt) for prompt in outcomes.prompts])


def curve_of(outcomes: Outcomes, scores: Floats) -> Curve:
    """The operating points of scores: gains for a pair, else a quality for each model."""
    if len(outcomes.models) == 2:
        return Curve.of_gain(scores[:, 0])
    return Curve.of_scores(scores, outcomes.cost)


def constants(outcomes: Outcomes, best_single: str) -> dict[str, Curve]:
    """The baselines that need no training. ``best-single`` is the model that was best in training."""
    n, m = len(outcomes), len(outcomes.models)
    rng = np.random.default_rng(7)
    length = np.array([len(prompt) for prompt in outcomes.prompts], dtype=np.float64)
    dearest = int(outcomes.cost.mean(axis=0).argmax())
    found = {
        "random": Curve.of_gain(rng.random(n)) if m == 2 else _mixed(outcomes, best_single, rng),
        "always-small": Curve.constant(0, n),
        "always-large": Curve.constant(dearest, n),
        "best-single": Curve.constant(outcomes.models.index(best_single), n),
        "oracle": curve_of(outcomes, target(outcomes)[1]),
    }
    if m == 2:
        found["prompt-length"] = Curve.of_gain(length)
    return found


def _mixed(outcomes: Outcomes, best_single: str, rng: np.random.Generator) -> Curve:
    """Random between the cheapest and the best single model."""
    strong = outcomes.models.index(best_single)
    draw = rng.random(len(outcomes))
    return Curve(np.stack([np.where(draw < share, strong, 0) for share in np.linspace(0, 1, 101)]))


def cross_validate(
    outcomes: Outcomes,
    by: By,
    *,
    count: int = 5,
    resamples: int = 1000,
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Every row is scored by a router that saw neither it nor, with ``by="subject"``, its subject. Scores
    are pooled as ranks within their fold for a pair (folds have different offsets), as they are otherwise.
    """
    place = folds(outcomes, by, count)
    outputs = target(outcomes)[1].shape[1]
    pooled = {name: np.zeros((len(outcomes), outputs)) for name in ("galley", "tfidf-logistic")}
    for fold in range(count):
        rows, test = np.flatnonzero(place != fold), np.flatnonzero(place == fold)
        if not len(test) or not len(rows):
            continue
        known, unseen = outcomes.take(rows), outcomes.take(test)
        found = {
            "galley": scores_of(train(known, seed=seed, lean=True), unseen),
            "tfidf-logistic": scores_of(train_plain(known), unseen),
        }
        for name, scores in found.items():
            pooled[name][test] = ranked(scores) if outputs == 1 else scores
        tell(f"{outcomes.name}: fold {fold + 1} of {count}: {len(rows)} rows trained, {len(test)} scored")
    best = outcomes.models[int(outcomes.quality.mean(axis=0).argmax())]
    curves = {name: curve_of(outcomes, scores) for name, scores in pooled.items()}
    return measure(outcomes, {**curves, **constants(outcomes, best)}, resamples=resamples, seed=seed)


def ranked(scores: Floats) -> Floats:
    """Ranks 0..1 within one fold."""
    return np.argsort(np.argsort(scores[:, 0], kind="stable"), kind="stable")[:, None] / len(scores)


def trained(
    outcomes: Outcomes, *, holdout: float, by: By = "prompt", seed: int = 0
) -> tuple[RouterFile, Outcomes]:
    """Train on all rows but a share held out by hash; thresholds come from four inner folds of the rest.

    Raises InvalidRequest when nothing is left to train on.
    """
    parts = 100
    if by == "prompt":
        place = np.array([key % parts for key in outcomes.keys])
    else:
        place = np.array(
            [int.from_bytes(hashlib.sha256(g.encode()).digest()[:4], "big") % parts for g in outcomes.groups]
        )
    rows = np.flatnonzero(place >= holdout * parts)
    held = np.flatnonzero(place < holdout * parts)
    if len(rows) < 20:
        raise InvalidRequest(f"{outcomes.name}: {len(rows)} rows are too few to train on", param="data")
    known = outcomes.take(rows)
    inner = folds(known, "prompt", 4)
    scores = np.zeros((len(known), target(known)[1].shape[1]))
    for fold in range(4):
        test = np.flatnonzero(inner == fold)
        if len(test):
            file = train(known.take(np.flatnonzero(inner != fold)), seed=seed, lean=True)
            scores[test] = scores_of(file, known.take(test))
    file = msgspec.structs.replace(train(known, seed=seed), thresholds=thresholds(known, scores))
    return file, outcomes.take(held)


def evaluate(file: RouterFile, outcomes: Outcomes, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """A trained router and the baselines on the rows of a data set that it was not trained on.

    Raises InvalidRequest when the models differ, or every row was trained on.
    """
    if sorted(file.models) != sorted(outcomes.models):
        raise InvalidRequest(
            f"the router knows {', '.join(file.models)}; {outcomes.name} has {', '.join(outcomes.models)}",
            param="router",
        )
    known = set(file.keys)
    rows = np.array([i for i, key in enumerate(outcomes.keys) if key not in known], dtype=np.intp)
    if len(rows) < 20:
        raise InvalidRequest(
            f"{outcomes.name}: only {len(rows)} of {len(outcomes)} rows were not trained on; nothing to say",
            param="data",
            hint="Train with --holdout, or evaluate on other data.",
        )
    unseen = outcomes.take(rows)
    curves = {"galley": _curve(file, unseen)}
    if file.plain is not None:
        curves["tfidf-logistic"] = _curve(file.plain, unseen)
    curves |= constants(unseen, file.best_single)
    return {
        "dataset": outcomes.name,
        "rows": len(unseen),
        "left_out_as_trained_on": len(outcomes) - len(unseen),
        "cost_unit": outcomes.unit,
        "policies": measure(unseen, curves, resamples=resamples, seed=seed),
    }


def _curve(file: RouterFile, outcomes: Outcomes) -> Curve:
    scores = scores_of(file, outcomes)
    if len(file.outputs) > 1:
        scores = scores[:, [file.outputs.index(model) for model in outcomes.models]]
    return curve_of(outcomes, scores)
