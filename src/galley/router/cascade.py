"""Cascades: the small model answers first; where its own log-probabilities say that it was not sure, the next
model does.

How sure an answer was is read off a few figures of its tokens (``SIGNALS``), and a calibration file says what
share of answers like it were good. The file is fitted by ``galley route calibrate``; this is only arithmetic.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from galley.errors import ConfigError
from galley.router.catalog import RouteTable
from galley.router.policy import Choice, Question, number, take
from galley.types import TokenLogprob

__all__ = ["SIGNALS", "TOP", "Calibration", "Cascade", "Confidence", "Watch"]

VERSION = 1
TOP = 20
"""Alternatives asked for beside each token: the most that OpenAI's API gives."""
SIGNALS = ("mean", "least", "unsure", "first_entropy", "first_margin", "log_tokens")
FLOOR = -30.0
"""A log-probability below this counts as this: tokens that a grammar forced may have had none at all."""


class Watch:
    """The signals of one answer, token by token.

    Attributes:
        limit: tokens that are read; 0 reads all of them.
        tokens: tokens read so far.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.tokens = 0
        self._sum = 0.0
        self._least = 0.0
        self._unsure = 0
        self._entropy = 0.0
        self._margin = 0.0

    @property
    def full(self) -> bool:
        """Whether further tokens change nothing."""
        return bool(self.limit) and self.tokens >= self.limit

    def add(self, entries: Sequence[TokenLogprob]) -> None:
        """Tokens in order, with their TOP alternatives. O(entries)."""
        for entry in entries:
            if self.full:
                return
            value = max(FLOOR, entry.logprob)
            if not self.tokens:
                self._entropy, self._margin = spread(entry.top)
            self.tokens += 1
            self._sum += value
            self._least = min(self._least, value)
            self._unsure += value < math.log(0.5)

    def signals(self) -> list[float]:
        """In the order of SIGNALS. Raises ValueError before the first token.

        ``mean`` and ``least`` log-probability of the tokens drawn; ``unsure``: share of tokens below one
        half; entropy in nats, and margin between the two most likely, of the first token; logarithm of the
        number of tokens.
        """
        if not self.tokens:
            raise ValueError("no token was read")
        n = self.tokens
        return [self._sum / n, self._least, self._unsure / n, self._entropy, self._margin, math.log(n)]


def spread(top: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Entropy in nats over the alternatives given and the rest taken as one (so a lower bound), and the
    margin in log-probability between the first two. Zeros without alternatives."""
    values = [max(FLOOR, value) for _, value in top]
    rest = max(0.0, 1.0 - sum(math.exp(value) for value in values))
    entropy = -sum(value * math.exp(value) for value in values)
    if rest > 1e-9:
        entropy -= rest * math.log(rest)
    margin = values[0] - values[1] if len(values) > 1 else 0.0
    return (entropy if values else 0.0), margin


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """The file ``galley route calibrate`` writes (msgpack).

    Attributes:
        model, weights: which model's answers it is of, and the sha256 of its weights where that is known.
        tokens: how many tokens of an answer are read; 0 is the whole answer.
        signals: names, as SIGNALS; ``centre`` and ``spread`` scale them, ``slopes`` and ``intercept`` are of
            a logistic regression on them.
        knots, shares: isotonic map from the regression's logit to the share of good answers; ascending.
        thresholds: confidence needed, by name: ``accept50`` keeps half of such answers, ``right80`` is the
            lowest at which four fifths of those kept are good.
        rows: answers fitted on. good: share of them that were good.
        ece, auroc, brier: of predictions on answers held out in turn (five folds).
        source: where the answers came from, in words.
    """

    version: int
    model: str
    weights: str
    tokens: int
    signals: list[str]
    centre: list[float]
    spread: list[float]
    slopes: list[float]
    intercept: float
    knots: list[float]
    shares: list[float]
    thresholds: dict[str, float]
    rows: int
    good: float
    ece: float
    auroc: float
    brier: float
    source: str
    keys: list[int] = []
    """Prompt keys of the rows fitted on, ascending."""

    @classmethod
    def decode(cls, raw: bytes) -> "Calibration":
        """From the bytes of a file. Raises ConfigError for another kind or version."""
        try:
            found = msgspec.msgpack.decode(raw, type=cls)
        except (msgspec.DecodeError, ValueError) as error:
            raise ConfigError(f"not a calibration file: {error}") from error
        if found.version != VERSION or found.signals != list(SIGNALS):
            raise ConfigError(f"calibration of version {found.version}; this Galley reads {VERSION}")
        sizes = {len(found.centre), len(found.spread), len(found.slopes)}
        if sizes != {len(SIGNALS)} or not found.knots or len(found.knots) != len(found.shares):
            raise ConfigError("calibration file: its parts do not fit together")
        return found

    @classmethod
    def read(cls, path: Path) -> "Calibration":
        try:
            return cls.decode(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error

    def confidence(self, signals: Sequence[float]) -> float:
        """The expected share of good answers among those with such signals, 0..1."""
        logit = self.intercept
        for value, centre, width, slope in zip(signals, self.centre, self.spread, self.slopes, strict=True):
            logit += slope * max(-4.0, min(4.0, (value - centre) / width))
        at = bisect.bisect_left(self.knots, logit)
        if at == 0:
            return self.shares[0]
        if at == len(self.knots):
            return self.shares[-1]
        low, high = self.knots[at - 1], self.knots[at]
        part = (logit - low) / (high - low)
        return self.shares[at - 1] + part * (self.shares[at] - self.shares[at - 1])


class Confidence:
    """What a route asks of its first model's answers. Satisfies ``Judge``."""

    def __init__(self, calibration: Calibration, needed: float, *, keep: bool, share: float) -> None:
        self.calibration = calibration
        self.needed = needed
        self.keep = keep
        self.share = share
        self.top = TOP

    def watch(self) -> Watch:
        """A fresh reader for one answer."""
        return Watch(self.calibration.tokens)

    def confidence(self, signals: Sequence[float]) -> float:
        """See ``Calibration.confidence``."""
        return self.calibration.confidence(signals)

    def named(self, signals: Sequence[float]) -> dict[str, float]:
        """Signals by name, for the receipt."""
        return dict(zip(SIGNALS, (round(value, 4) for value in signals), strict=True))

    def foreign(self, weights: str) -> str | None:
        """Why answers of these weights cannot be judged by this calibration; None when they can."""
        known = self.calibration.weights
        if known and weights and known != weights:
            return "the calibration is of other weights"
        return None


class Cascade:
    """The first model listed answers; an answer below the confidence needed goes to the next.

    Options: ``file`` (from ``galley route calibrate``); ``target``, a threshold of the file (``accept50``,
    ``right80`` …), or ``threshold``, a number 0..1; ``keep`` (true): when nobody can take the escalation, the
    first answer is given after all, and said to be unsure; ``share`` (0.5): most of the time left that the
    first model may take.
    """

    def __init__(self, table: RouteTable, read: Callable[[str], bytes]) -> None:
        options: dict[str, Any] = take(table, {"file", "target", "threshold", "keep", "share"})
        where = f"route {table.name!r}"
        if len(table.models) < 2:
            raise ConfigError(f"{where}: a cascade needs two models or more")
        if not isinstance(options.get("file"), str):
            raise ConfigError(f'{where}: policy {table.policy!r} needs file = "..."')
        try:
            calibration = Calibration.decode(read(options["file"]))
        except OSError as error:
            raise ConfigError(f"{where}: {options['file']}: {error}") from error
        target = options.get("target", "accept50")
        if target not in calibration.thresholds:
            raise ConfigError(f"{where}: target is one of {', '.join(calibration.thresholds)}")
        if "target" in options and "threshold" in options:
            raise ConfigError(f"{where}: give target or threshold, not both")
        needed = number(table, "threshold", calibration.thresholds[target], 0.0, 1.0)
        keep = options.get("keep", True)
        if not isinstance(keep, bool):
            raise ConfigError(f"{where}: keep is true or false")
        share = number(table, "share", 0.5, 0.05, 1.0)
        self._first = table.models[0]
        self.judge = Confidence(calibration, needed, keep=keep, share=share)

    def choose(self, question: Question) -> Choice:
        """See ``Policy.choose``. What cannot be judged begins with the models after the first: unjudged, an
        answer of the first would be as good as unsure."""
        names = list(question.eligible)
        if self._first not in names or len(names) == 1:
            return Choice(order=names, reason="one model is eligible: nothing to judge")
        unjudged = self._unjudged(question)
        if unjudged is not None:
            order = [name for name in names if name != self._first] + [self._first]
            return Choice(order=order, reason=f"not judged: {unjudged}")
        needed = self.judge.needed
        reason = f"first {self._first}, kept at confidence {needed:.3f} or more"
        return Choice(order=names, judge=self.judge, reason=reason)

    def _unjudged(self, question: Question) -> str | None:
        if question.facts.choices != 1:
            return "several choices"
        if all("logprobs" in each.offer.lacks for each in question.eligible[self._first]):
            return f"nobody gives log-probabilities of {self._first}"
        return None
