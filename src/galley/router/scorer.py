"""A trained router: what it expects of each model on a prompt, in well under a millisecond.

Linear in TF-IDF of words, pairs of words and character n-grams, plus the figures of form and a
few small trees over them. Trained by ``galley.evals.train``; this is only arithmetic. Pure Python: the few
hundred features of a prompt are summed faster than numpy could be called.
"""

import math
from array import array
from pathlib import Path

import msgspec

from galley.errors import ConfigError
from galley.router.features import form, grams, words

__all__ = ["RouterFile", "Scorer"]

VERSION = 1
REMEMBERED = 50_000
"""Words whose features are remembered."""


class Trees(msgspec.Struct, frozen=True):
    """A forest as flat arrays; node i goes to ``left[i]`` when ``x[feature[i]] <= threshold[i]``, else to
    ``right[i]``; ``feature`` -1 is a leaf, whose value (one per output) is ``values[i * outputs ...]``."""

    roots: list[int]
    feature: bytes
    threshold: bytes
    left: bytes
    right: bytes
    values: bytes


class RouterFile(msgspec.Struct, frozen=True, kw_only=True):
    """The file ``galley route train`` writes (msgpack).

    Attributes:
        outputs: what each score is: model names, or the single ``gain`` of the strong over the weak.
        models: M names, cheapest first.
        vocabulary: features in the order of their weights.
        idf, weights: float32; ``weights`` is [features, outputs].
        centre, spread, form_weights: of the figures of form; float64 lists, ``form_weights`` [FORM, outputs].
        threshold: the gain above which the strong model is taken, or the price of quality, by target name.
        keys: prompt keys of the rows trained on, ascending, so that an evaluation can leave them out.
    """

    version: int
    name: str
    outputs: list[str]
    models: list[str]
    vocabulary: list[str]
    idf: bytes
    weights: bytes
    intercept: list[float]
    centre: list[float]
    spread: list[float]
    form_weights: list[list[float]]
    trees: Trees
    tree_weight: float
    thresholds: dict[str, float]
    best_single: str
    keys: list[int]
    plain: "RouterFile | None" = None
    """The TF-IDF and logistic baseline trained on the same rows, to be evaluated beside it."""


class Scorer:
    """Scores prompts. Raises ConfigError for a file of another kind or version."""

    def __init__(self, file: RouterFile) -> None:
        if file.version != VERSION:
            raise ConfigError(f"router file of version {file.version}; this Galley reads {VERSION}")
        self.file = file
        self._index = {feature: i for i, feature in enumerate(file.vocabulary)}
        self._idf = array("f", file.idf)
        weights = array("f", file.weights)
        self._outputs = len(file.outputs)
        if len(self._idf) != len(self._index) or len(weights) != len(self._index) * self._outputs:
            raise ConfigError("router file: vocabulary and weights do not fit together")
        self._columns = [weights[o :: self._outputs] for o in range(self._outputs)]
        trees = file.trees
        self._feature = array("i", trees.feature)
        self._threshold = array("d", trees.threshold)
        self._left, self._right = array("i", trees.left), array("i", trees.right)
        self._values = array("f", trees.values)
        self._grams: dict[str, tuple[int, ...]] = {}

    @classmethod
    def decode(cls, raw: bytes) -> "Scorer":
        """From the bytes of a file."""
        try:
            return cls(msgspec.msgpack.decode(raw, type=RouterFile))
        except (msgspec.DecodeError, ValueError) as error:
            raise ConfigError(f"not a router file: {error}") from error

    @classmethod
    def read(cls, path: Path) -> "Scorer":
        try:
            return cls.decode(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error

    def scores(self, text: str) -> list[float]:
        """One number per output. O(characters of the prompt)."""
        split = words(text)
        index = self._index
        first: dict[int, int] = {}
        second: dict[int, int] = {}
        previous = ""
        for word in split:
            place = index.get("w:" + word)
            if place is not None:
                first[place] = first.get(place, 0) + 1
            if previous:
                place = index.get(previous + " " + word)
                if place is not None:
                    first[place] = first.get(place, 0) + 1
            previous = word
            if len(word) > 3:
                for place in self._of_word(word):
                    second[place] = second.get(place, 0) + 1
        figures = form(text)
        out = list(self.file.intercept)
        for counts in (first, second):
            self._add(counts, out)
        centred = [
            max(-4.0, min(4.0, (value - mean) / spread))
            for value, mean, spread in zip(figures, self.file.centre, self.file.spread, strict=True)
        ]
        for o in range(self._outputs):
            out[o] += sum(value * row[o] for value, row in zip(centred, self.file.form_weights, strict=True))
        if self.file.tree_weight:
            self._forest(centred, out)
        return out

    def _of_word(self, word: str) -> tuple[int, ...]:
        found = self._grams.get(word)
        if found is None:
            index = self._index
            found = tuple(place for gram in grams(word) if (place := index.get(gram)) is not None)
            if len(self._grams) < REMEMBERED:
                self._grams[word] = found
        return found

    def _add(self, counts: dict[int, int], out: list[float]) -> None:
        """Sublinear TF, IDF, unit length, times weights: a block of features of its own."""
        idf, log = self._idf, math.log
        values = [(1.0 + log(n) if n > 1 else 1.0) * idf[place] for place, n in counts.items()]
        length = math.sqrt(sum(value * value for value in values))
        if length == 0:
            return
        for o, column in enumerate(self._columns):
            out[o] += sum(value * column[place] for value, place in zip(values, counts, strict=True)) / length

    def _forest(self, figures: list[float], out: list[float]) -> None:
        feature, threshold, left, right = self._feature, self._threshold, self._left, self._right
        outputs = self._outputs
        total = [0.0] * outputs
        for node in self.file.trees.roots:
            while (f := feature[node]) >= 0:
                node = left[node] if figures[f] <= threshold[node] else right[node]  # noqa: PLW2901
            for o in range(outputs):
                total[o] += self._values[node * outputs + o]
        share = self.file.tree_weight / max(1, len(self.file.trees.roots))
        for o in range(outputs):
            out[o] += share * total[o]
