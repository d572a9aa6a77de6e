"""Training a router from outcomes. Needs scikit-learn (extra ``router``); serving what was trained does not.

Two views of a prompt, averaged with fixed equal weights: a ridge regression on TF-IDF of words, pairs and
character n-grams plus the figures of form; and extremely randomised trees (Geurts et al. 2006) on the
figures of form alone. The first knows topics, the second knows shapes and carries over to topics it never
saw. The target is the gain of strong over weak for a pair, else each model's quality; squared error makes
both expectations, so a threshold on them is a price.

Settings are constants, not tuned per data set: see docs/ROUTING.md for how they were chosen.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from galley.errors import ConfigError
from galley.evals.outcomes import Outcomes
from galley.router.features import FORM, form, grams, words
from galley.router.scorer import VERSION, RouterFile, Trees

__all__ = ["ALPHA", "TREES", "target", "thresholds", "train", "train_plain"]

Floats = npt.NDArray[np.float64]
ALPHA = 6.0
TREES = 100
LEAF = 12
SHARE = 0.5
"""Weight of the trees; the ridge has the rest."""
FORM_SCALE = 0.1
VOCABULARY = 60_000
"""Most features kept of each block, the most frequent."""


def _sklearn() -> Any:
    try:
        import sklearn
    except ImportError as error:
        raise ConfigError(
            "Training a router needs scikit-learn.", hint="pip install 'galley[router]'"
        ) from error
    return sklearn


def word_features(text: str) -> list[str]:
    """Words and pairs of words, as ``Scorer`` looks them up."""
    split = words(text)
    return ["w:" + word for word in split] + [f"{a} {b}" for a, b in itertools.pairwise(split)]


def gram_features(text: str) -> list[str]:
    """Character n-grams of the longer words, as ``Scorer`` looks them up."""
    return [gram for word in words(text) if len(word) > 3 for gram in grams(word)]


def target(outcomes: Outcomes) -> tuple[list[str], Floats]:
    """Names of the outputs, and float64 [N, outputs]."""
    if len(outcomes.models) == 2:
        return ["gain"], outcomes.quality[:, 1:2] - outcomes.quality[:, 0:1]
    return list(outcomes.models), outcomes.quality


def train(outcomes: Outcomes, *, seed: int = 0, lean: bool = False) -> RouterFile:
    """Fit. About a minute for 7,500 prompts on one core. Deterministic for a seed.

    Args:
        lean: leave out keys and the baseline (cross-validation needs neither here).
    """
    _sklearn()
    from scipy.sparse import csr_matrix, hstack
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    outputs, y = target(outcomes)
    blocks, vocabulary, idf = [], [], []
    for analyser in (word_features, gram_features):
        vectorizer = TfidfVectorizer(
            analyzer=analyser, min_df=2, sublinear_tf=True, max_features=VOCABULARY, dtype=np.float32
        )
        try:
            blocks.append(vectorizer.fit_transform(outcomes.prompts))
        except ValueError:
            continue  # no feature occurs twice: the block is empty, and so it is in the file
        vocabulary += vectorizer.get_feature_names_out().tolist()
        idf.append(vectorizer.idf_.astype(np.float32))
    figures = np.array([form(prompt) for prompt in outcomes.prompts])
    centre, spread = figures.mean(axis=0), figures.std(axis=0) + 1e-6
    scaled = ((figures - centre) / spread).clip(-4, 4)
    x = hstack([*blocks, csr_matrix(scaled * FORM_SCALE)]).tocsr().astype(np.float64)
    ridge = Ridge(alpha=ALPHA, solver="sparse_cg", tol=1e-3).fit(x, y)
    forest = ExtraTreesRegressor(
        TREES, min_samples_leaf=LEAF, max_features=0.4, random_state=seed, n_jobs=1
    ).fit(scaled, y if y.shape[1] > 1 else y.ravel())
    weights = np.atleast_2d(ridge.coef_).T * (1 - SHARE)  # [features, outputs]
    count = len(vocabulary)
    return RouterFile(
        version=VERSION,
        name=outcomes.name,
        outputs=outputs,
        models=list(outcomes.models),
        vocabulary=vocabulary,
        idf=(np.concatenate(idf) if idf else np.zeros(0, np.float32)).tobytes(),
        weights=np.ascontiguousarray(weights[:count], dtype=np.float32).tobytes(),
        intercept=(np.atleast_1d(ridge.intercept_) * (1 - SHARE)).tolist(),
        centre=centre.tolist(),
        spread=spread.tolist(),
        form_weights=(weights[count:] * FORM_SCALE).tolist(),
        trees=_flatten(forest.estimators_, y.shape[1]),
        tree_weight=SHARE,
        thresholds={},
        best_single=outcomes.models[int(outcomes.quality.mean(axis=0).argmax())],
        keys=[] if lean else sorted(outcomes.keys),
        plain=None if lean else train_plain(outcomes),
    )


def _flatten(estimators: Sequence[Any], outputs: int) -> Trees:
    roots: list[int] = []
    parts: list[list[npt.NDArray[Any]]] = [[], [], [], [], []]
    at = 0
    for estimator in estimators:
        tree = estimator.tree_
        roots.append(at)
        parts[0].append(np.where(tree.children_left < 0, -1, tree.feature).astype(np.int32))
        parts[1].append(tree.threshold.astype(np.float64))
        parts[2].append((tree.children_left + at).astype(np.int32))
        parts[3].append((tree.children_right + at).astype(np.int32))
        parts[4].append(tree.value.reshape(tree.node_count, outputs).astype(np.float32))
        at += tree.node_count
    joined = [np.concatenate(part) for part in parts]
    return Trees(roots, *(part.tobytes() for part in joined))


def thresholds(outcomes: Outcomes, scores: Floats) -> dict[str, float]:
    """Calibrated on scores of rows that were not trained on (out of fold), float64 [N, outputs].

    For a pair: ``cost25``, ``cost50``, ``cost75`` send that share of such traffic to the strong model;
    ``quality80``, ``quality95`` are the highest that keep that much of the gap. For many models the price of
    quality (per scaled price) is a choice, not a share: ``cost0`` is none.
    """
    if scores.shape[1] > 1:
        return {"cost50": 0.1, "quality100": 0.0}
    gain = scores[:, 0]
    found = {f"cost{share}": float(np.quantile(gain, 1 - share / 100)) for share in (25, 50, 75)}
    order = np.argsort(-gain, kind="stable")
    true = (outcomes.quality[:, 1] - outcomes.quality[:, 0])[order]
    if true.sum() > 0:
        closed = np.cumsum(true) / true.sum()
        for level in (80, 95):
            at = int(np.argmax(closed >= level / 100))
            found[f"quality{level}"] = float(gain[order[at]]) - 1e-9
    return found


def train_plain(outcomes: Outcomes) -> RouterFile:
    """What a day's work gives, as a file of the same kind: TF-IDF of single words, and a logistic regression
    on whether the strong model alone is right (a pair), or a ridge on each model's quality."""
    _sklearn()
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    def single(text: str) -> list[str]:
        return ["w:" + word for word in words(text)]

    outputs, y = target(outcomes)
    vectorizer = TfidfVectorizer(analyzer=single, min_df=2, sublinear_tf=True, dtype=np.float64)
    x = vectorizer.fit_transform(outcomes.prompts)
    label = y[:, 0] > 0
    if y.shape[1] > 1 or label.all() or not label.any():
        model: Any = Ridge(alpha=1.0, solver="sparse_cg", tol=1e-3).fit(x, y)
    else:
        model = LogisticRegression(C=1.0, max_iter=200, solver="liblinear").fit(x, label)
    empty = b""
    return RouterFile(
        version=VERSION,
        name=outcomes.name,
        outputs=outputs,
        models=list(outcomes.models),
        vocabulary=vectorizer.get_feature_names_out().tolist(),
        idf=vectorizer.idf_.astype(np.float32).tobytes(),
        weights=np.ascontiguousarray(np.atleast_2d(model.coef_).T, dtype=np.float32).tobytes(),
        intercept=np.atleast_1d(model.intercept_).tolist(),
        centre=[0.0] * len(FORM),
        spread=[1.0] * len(FORM),
        form_weights=[[0.0] * len(outputs) for _ in FORM],
        trees=Trees([], empty, empty, empty, empty, empty),
        tree_weight=0.0,
        thresholds={},
        best_single=outcomes.models[int(outcomes.quality.mean(axis=0).argmax())],
        keys=[],
    )
