"""What another policy would have earned, from logs of what one policy did and with which probability.

IPS: mean of reward x [same choice] / propensity (Horvitz and Thompson 1952); SNIPS divides by the mean
weight instead; DR (Dudik et al. 2011) adds the correction to a model of the reward, and is unbiased when
either the propensities or the model are right.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from galley.evals.curve import Figure

__all__ = ["Estimates", "Logged", "estimate"]


class Logged(msgspec.Struct, frozen=True, kw_only=True):
    """One decision: what was chosen with which probability, what it earned, and what the other policy would
    choose. ``expected`` is a model's guess of the reward, by model, for DR."""

    chosen: str
    propensity: float
    reward: float
    other: str
    expected: dict[str, float] = {}


class Estimates(msgspec.Struct, frozen=True, kw_only=True):
    """Mean rewards with 95 % bootstrap intervals. ``matched`` is the share of decisions both made alike;
    ``effective`` the sample size that the weights leave, (sum w)^2 / sum w^2."""

    logged: Figure
    ips: Figure
    snips: Figure
    dr: Figure | None
    matched: float
    effective: float


def estimate(log: Sequence[Logged], *, resamples: int = 1000, seed: int = 0) -> Estimates:
    """Raises ValueError for an empty log or a propensity outside (0, 1]."""
    if not log:
        raise ValueError("an empty log")
    if any(not 0 < row.propensity <= 1 for row in log):
        raise ValueError("a propensity outside (0, 1]: the choice could not have been made")
    reward = np.array([row.reward for row in log])
    same = np.array([row.chosen == row.other for row in log], dtype=np.float64)
    weight = same / np.array([row.propensity for row in log])
    modelled = all(row.expected for row in log)
    terms = np.zeros(len(log))
    if modelled:
        other = np.array([row.expected[row.other] for row in log])
        chosen = np.array([row.expected[row.chosen] for row in log])
        terms = other + weight * (reward - chosen)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(log), (resamples, len(log)))

    def interval(values: "np.typing.NDArray[np.float64]", at: float) -> Figure:
        low, high = np.percentile(values, [2.5, 97.5])
        return Figure(at, float(low), float(high))

    weighted = weight * reward
    total = weight.sum()
    sums = weight[picks].sum(axis=1)
    ratio = weighted[picks].sum(axis=1) / np.maximum(sums, 1e-12)
    return Estimates(
        logged=interval(reward[picks].mean(axis=1), float(reward.mean())),
        ips=interval(weighted[picks].mean(axis=1), float(weighted.mean())),
        snips=interval(ratio, float(weighted.sum() / total) if total else 0.0),
        dr=interval(terms[picks].mean(axis=1), float(terms.mean())) if modelled else None,
        matched=float(same.mean()),
        effective=float(total**2 / (weight**2).sum()) if total else 0.0,
    )
