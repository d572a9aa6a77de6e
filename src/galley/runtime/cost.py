"""What a step will take: ``T(n)``, fitted to measured steps. Pure arithmetic, no clock and no backend."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from galley.runtime.plan import Plan

__all__ = ["CostModel", "Forecast", "Sample", "fit", "shape_of"]

CROWD = 0.3
"""Processors wanted by others beyond what is free, above which figures mean nothing."""
ERROR = 0.25
"""Relative error above which a fit means nothing."""


class Sample(msgspec.Struct, frozen=True):
    """One measured step. The four numbers are those of ``CostModel.predict``."""

    tokens: int
    context: int
    outputs: int
    chunked: int
    seconds: float


class CostModel(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one step (forward and greedy draw) as a sum of four terms.

    The tokens' own work and that of their rows of logits are lines through measured medians; each is
    non-decreasing. What the tokens attend to in the KV cache costs a fixed time a position. A step costs no
    less when anything in it grows.

    Attributes:
        sizes, seconds: time of ``sizes[i]`` tokens of one sequence from an empty context, no logits.
        outputs, output_seconds: what that many rows of logits add, drawing included; starts with (0, 0).
        context_s: seconds a position in the cache, for a sequence with one token in the step.
        chunk_s: seconds a pair of token and position in the cache, for one with several.
        context_measured: longest context at which the two were measured; 0 means not at all.
        error: median relative error of predictions for steps left out of the fit; None without any.
        crowd: processors' worth of work, of others and of the host, beyond what was free; mean. None where
            the system does not tell.
        taken: when it was measured, Unix seconds. spent_s: how long that took.
        source: ``measured`` on its own, or ``idle``: while serving, with short steps only.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    outputs: tuple[int, ...] = (0,)
    output_seconds: tuple[float, ...] = (0.0,)
    context_s: float = 0.0
    chunk_s: float = 0.0
    context_measured: int = 0
    error: float | None = None
    crowd: float | None = None
    taken: float = 0.0
    spent_s: float = 0.0
    source: str = "measured"

    def __post_init__(self) -> None:
        """Raises ValueError for a curve that is empty, ragged, falling or not finite."""
        for xs, ys, first in ((self.sizes, self.seconds, 1), (self.outputs, self.output_seconds, 0)):
            if not xs or len(xs) != len(ys):
                raise ValueError("a cost curve is empty or ragged")
            if xs[0] < first or any(b <= a for a, b in pairwise(xs)):
                raise ValueError("the sizes of a cost curve do not ascend")
            if any(b < a for a, b in pairwise(ys)) or ys[0] < 0:
                raise ValueError("a cost curve falls")
            if not all(math.isfinite(y) for y in ys):
                raise ValueError("a cost is not finite")
        if self.seconds[0] <= 0 or (self.outputs[0], self.output_seconds[0]) != (0, 0.0):
            raise ValueError("a step takes time, and no logits take none")
        for slope in (self.context_s, self.chunk_s):
            if not (math.isfinite(slope) and slope >= 0):
                raise ValueError("the cost of context is negative or not finite")

    def predict(self, tokens: int, context: int = 0, outputs: int = 0, chunked: int = 0) -> float:
        """Seconds of a step. Non-decreasing in every argument; O(log points).

        Between measured sizes a line, beyond the last one its last slope.

        Args:
            tokens: in the whole step. 0 is no step and takes no time.
            context: positions in the cache before the step, summed over sequences with one token in it.
            outputs: rows of logits wanted and drawn from.
            chunked: tokens times positions in the cache, summed over sequences with several.
        """
        if tokens < 1:
            return 0.0
        return (
            _along(self.sizes, self.seconds, tokens)
            + _along(self.outputs, self.output_seconds, outputs)
            + self.context_s * context
            + self.chunk_s * chunked
        )

    def ratio(self, tokens: int) -> float:
        """``t(k) / t(1)``: what verifying ``tokens`` of one sequence costs in steps of one, logits each."""
        return self.predict(tokens, outputs=tokens) / self.predict(1, outputs=1)

    @property
    def doubts(self) -> str | None:
        """Why it should be neither used nor kept, in words; None when it may."""
        if self.crowd is not None and self.crowd > CROWD:
            return f"others wanted {self.crowd:.1f} more processors than there are while it was measured"
        if self.error is not None and self.error > ERROR:
            return f"it is off by {100 * self.error:.0f} % on steps left out of the fit"
        return None

    @property
    def measured_to(self) -> int:
        """Largest measured step, in tokens; what lies beyond is extrapolated."""
        return self.sizes[-1]


class Forecast(msgspec.Struct):
    """Predicted against actual time of the steps so far; other threads may read single fields."""

    steps: int = 0
    seconds: float = 0.0
    predicted_s: float = 0.0
    error_s: float = 0.0
    """Sum of absolute differences: over ``seconds`` it is the mean error, weighted by time."""

    def note(self, predicted: float, seconds: float) -> None:
        """Count one step."""
        self.steps += 1
        self.seconds += seconds
        self.predicted_s += predicted
        self.error_s += abs(predicted - seconds)


def shape_of(plan: "Plan") -> tuple[int, int, int, int]:
    """``(tokens, context, outputs, chunked)`` of a plan not yet committed. O(jobs)."""
    context = outputs = chunked = 0
    for job, count in plan.rows.items():
        computed = job.computed
        if count == 1:
            context += computed
        else:
            chunked += count * computed
        outputs += job.outputs(count)
    return plan.tokens, context, outputs, chunked


def fit(
    samples: Iterable[Sample],
    held_out: Iterable[Sample] = (),
    *,
    crowd: float | None = None,
    taken: float = 0.0,
    spent_s: float = 0.0,
    source: str = "measured",
) -> CostModel:
    """A model through the medians of ``samples``; its error is that on ``held_out``.

    Medians that fall where they should rise are pooled (isotonic regression by pooling adjacent violators:
    Barlow et al. 1972), so that noise does not make a larger step cheaper. O(n log n).

    Raises ValueError without a sample that has tokens alone.
    """
    taken_all = list(samples)
    plain = [s for s in taken_all if not (s.context or s.chunked)]
    sizes, seconds = _curve([(s.tokens, s.seconds) for s in plain if not s.outputs])
    if not sizes:
        raise ValueError("no step without context and logits was measured")
    rest = [(s.outputs, s.seconds - _along(sizes, seconds, s.tokens)) for s in plain if s.outputs]
    outputs, output_seconds = _curve([(0, 0.0), *rest])
    body = CostModel(
        sizes=sizes,
        seconds=seconds,
        outputs=outputs,
        output_seconds=tuple(max(0.0, value) for value in output_seconds),
    )

    def slope(pairs: list[tuple[int, Sample]]) -> float:
        # Short contexts drown in the noise of the rest of the step.
        enough = max((by for by, _ in pairs), default=0) / 2
        found = [(s.seconds - body.predict(s.tokens, 0, s.outputs)) / by for by, s in pairs if by >= enough]
        return max(0.0, median(found)) if found else 0.0

    single = [(s.context, s) for s in taken_all if s.context and not s.chunked]
    several = [(s.chunked, s) for s in taken_all if s.chunked and not s.context]
    model = msgspec.structs.replace(
        body,
        context_s=slope(single),
        chunk_s=slope(several),
        context_measured=max((s.context for _, s in single), default=0),
        crowd=crowd,
        taken=taken,
        spent_s=spent_s,
        source=source,
    )
    misses = [
        abs(model.predict(*shape) - middle) / middle
        for shape, middle in _medians(held_out).items()
        if middle > 0
    ]
    return msgspec.structs.replace(model, error=median(misses) if misses else None)


def _medians(samples: Iterable[Sample]) -> dict[tuple[int, int, int, int], float]:
    groups: dict[tuple[int, int, int, int], list[float]] = {}
    for s in samples:
        groups.setdefault((s.tokens, s.context, s.outputs, s.chunked), []).append(s.seconds)
    return {shape: median(times) for shape, times in groups.items()}


def _curve(pairs: Iterable[tuple[int, float]]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Medians by size, made non-decreasing."""
    groups: dict[int, list[float]] = {}
    for size, value in pairs:
        groups.setdefault(size, []).append(value)
    sizes = sorted(groups)
    pools: list[list[float]] = []  # [mean, weight, how many sizes]
    for size in sizes:
        pools.append([median(groups[size]), float(len(groups[size])), 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, weight, count = pools.pop()
            last = pools[-1]
            last[0] = (last[0] * last[1] + mean * weight) / (last[1] + weight)
            last[1] += weight
            last[2] += count
    return tuple(sizes), tuple(mean for mean, _, count in pools for _ in range(int(count)))


def _along(xs: Sequence[int], ys: Sequence[float], x: int) -> float:
    """The polyline at ``x``; before the first point level, beyond the last along the last slope."""
    i = bisect_right(xs, x)
    if i == 0:
        return ys[0]
    if i < len(xs):
        left = ys[i - 1]
        return left + (ys[i] - left) * ((x - xs[i - 1]) / (xs[i] - xs[i - 1]))
    if len(xs) == 1:
        # Nothing is known of the slope: proportional.
        return ys[0] * x / xs[0] if xs[0] else ys[0]
    # A last piece made level by pooling says nothing of the slope either; the whole curve does.
    rise = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]) or (ys[-1] - ys[0]) / (xs[-1] - xs[0])
    return ys[-1] + rise * (x - xs[-1])
