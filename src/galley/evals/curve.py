"""How good a router is: the curve of quality against cost that it traces, its summary figures, and how far
each figure would move with other prompts (paired bootstrap over rows).

Figures, with the weak model w (cheapest) and the strong one s (best single on these rows), and the cost axis
scaled so that w is 0 and s is 1:

* PGR = (quality - q_w) / (q_s - q_w): the share of the gap closed (RouteLLM, Ong et al. 2024).
* ``apgr``: trapezoid over PGR at costs 0, 0.1 .. 1.
* ``cpt20/50/80``: least cost at which PGR reaches 20, 50, 80 %.
* ``aiq``: area under the non-decreasing convex hull of (cost, quality), extended to cost 1 (RouterBench, Hu
  et al. 2024).
* ``cost_saved_at_best_single``: 1 - cost of matching s in quality / cost of s, in money; 0 if never matched.
* ``quality_at_best_single_cost``, and ``regret``: what the oracle has more.

A policy that has one operating point only (always this model) has PGR 0 left of it: it cannot be had cheaper.
"""

import itertools

import msgspec
import numpy as np
import numpy.typing as npt

from galley.evals.outcomes import Outcomes

__all__ = ["FIGURES", "Curve", "Figure", "measure"]

Floats = npt.NDArray[np.float64]
GRID = np.linspace(0.0, 1.0, 11)
FIGURES = (
    "apgr",
    "cpt20",
    "cpt50",
    "cpt80",
    "aiq",
    "cost_saved_at_best_single",
    "quality_at_best_single_cost",
    "regret",
)


class Figure(msgspec.Struct, frozen=True):
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Curve:
    """A policy's operating points on a set of rows.

    Attributes:
        choice: int [points, N], the model each row goes to at each point.
    """

    def __init__(self, choice: "npt.NDArray[np.intp]") -> None:
        self.choice = choice

    @classmethod
    def of_gain(cls, gain: Floats, *, seed: int = 0) -> "Curve":
        """Two models: the rows of highest predicted gain go to the strong one, 0 to 100 % in steps of 1 %.
        Ties are broken by a seeded shuffle, so that a score without information is the random router."""
        n = len(gain)
        shuffled = np.random.default_rng(seed).permutation(n)
        order = shuffled[np.argsort(-gain[shuffled], kind="stable")]
        rank = np.empty(n, np.intp)
        rank[order] = np.arange(n)
        points = np.rint(np.linspace(0, n, 101)).astype(np.intp)
        return cls((rank[None, :] < points[:, None]).astype(np.intp))

    @classmethod
    def of_scores(cls, scores: Floats, cost: Floats) -> "Curve":
        """Many models: the highest ``scores - price of quality * cost``, over 81 prices from none to so high
        that the cheapest is always taken. Total cost cannot rise as the price does."""
        spread = max(float(scores.max() - scores.min()), 1e-9)
        least = cost - cost.min(axis=1, keepdims=True)
        step = float(least[least > 0].min()) if (least > 0).any() else 1.0
        prices = np.concatenate(
            [[0.0], np.geomspace(1e-4 * spread / least.max(initial=step), 2 * spread / step, 80)]
        )
        return cls(np.stack([(scores - price * cost).argmax(axis=1) for price in prices]))

    @classmethod
    def constant(cls, model: int, rows: int) -> "Curve":
        """Always the same model."""
        return cls(np.full((1, rows), model, np.intp))


class _Frame:
    """What a curve is measured against, under any weighting of the rows."""

    def __init__(self, outcomes: Outcomes, weights: Floats) -> None:
        # [B, M] means under each of B weightings
        self.quality = weights @ outcomes.quality
        self.cost = weights @ outcomes.cost
        strong = int(outcomes.quality.mean(axis=0).argmax())
        self.q_weak, self.q_strong = self.quality[:, 0], self.quality[:, strong]
        self.c_weak, self.c_strong = self.cost[:, 0], self.cost[:, strong]
        best = outcomes.quality.max(axis=1)
        self.oracle = weights @ best


def measure(
    outcomes: Outcomes, curves: dict[str, Curve], *, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Figure]]:
    """Every figure of every policy, with 95 % percentile intervals over the same resamples of the rows.

    O(resamples x rows x points) multiply-adds. Raises ValueError when the strong model is no better than the
    cheapest: then there is no gap to close and PGR means nothing.
    """
    n = len(outcomes)
    if not outcomes.quality.mean(axis=0).max() > outcomes.quality[:, 0].mean():
        raise ValueError("on these rows the cheapest model is the best single one: there is nothing to route")
    rng = np.random.default_rng(seed)
    weights = np.ones((resamples + 1, n))
    for b in range(1, resamples + 1):
        weights[b] = np.bincount(rng.integers(0, n, n), minlength=n)
    weights /= n
    frame = _Frame(outcomes, weights)
    rows = np.arange(n)
    found: dict[str, dict[str, Figure]] = {}
    for name, curve in curves.items():
        quality = weights @ outcomes.quality[rows, curve.choice].T
        cost = weights @ outcomes.cost[rows, curve.choice].T
        table = np.array([_figures(cost[b], quality[b], frame, b) for b in range(resamples + 1)])
        low, high = np.nanpercentile(table[1:], [2.5, 97.5], axis=0) if resamples else (table[0], table[0])
        found[name] = {
            figure: Figure(float(table[0, i]), float(low[i]), float(high[i]))
            for i, figure in enumerate(FIGURES)
        }
    return found


def _figures(cost: Floats, quality: Floats, frame: _Frame, b: int) -> list[float]:
    """One resample's figures, in the order of FIGURES."""
    q_weak, q_strong = float(frame.q_weak[b]), float(frame.q_strong[b])
    c_weak, c_strong = float(frame.c_weak[b]), float(frame.c_strong[b])
    order = np.lexsort((quality, cost))
    x = (cost[order] - c_weak) / max(c_strong - c_weak, 1e-12)
    q = quality[order]
    pgr = (q - q_weak) / (q_strong - q_weak) if q_strong > q_weak else np.zeros_like(q)
    # Left of the first point nothing can be had; right of the last, more money buys nothing more.
    at = np.interp(GRID, x, pgr)
    at[x[0] - 1e-9 > GRID] = 0.0
    fine = np.linspace(0.0, 1.0, 1001)
    dense = np.interp(fine, x, pgr)
    dense[x[0] - 1e-9 > fine] = 0.0

    def least(level: float) -> float:
        reached = np.nonzero(dense >= level - 1e-9)[0]
        return float(fine[reached[0]]) if len(reached) else 1.0

    matched = np.nonzero(dense >= 1 - 1e-9)[0]
    saved = 0.0
    if len(matched) and c_strong > 0:
        saved = 1 - (c_weak + float(fine[matched[0]]) * (c_strong - c_weak)) / c_strong
    affordable = x <= 1 + 1e-9
    best = float(q[affordable].max()) if affordable.any() else q_weak
    return [
        float(np.trapezoid(at, GRID)),
        least(0.2),
        least(0.5),
        least(0.8),
        _hull_area(x, q, q_weak),
        max(0.0, saved),
        best,
        float(frame.oracle[b]) - best,
    ]


def _hull_area(x: Floats, q: Floats, q_weak: float) -> float:
    """Area under the upper convex hull from (0, q_weak), made non-decreasing, to x = 1."""
    points = [(0.0, q_weak)]
    for px, pq in sorted(zip(x.tolist(), q.tolist(), strict=True)):
        if px > 1 + 1e-9 or pq <= points[-1][1]:
            continue  # beyond the budget, or dearer and no better
        if px <= points[-1][0]:
            points[-1] = (points[-1][0], pq)
        else:
            points.append((px, pq))
        while len(points) > 2 and _below(*points[-3:]):
            del points[-2]
    points.append((1.0, points[-1][1]))
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))


def _below(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or under the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])
