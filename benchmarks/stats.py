"""Small statistics: what a handful of noisy samples says, and how far two distributions lie apart."""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from galley.bench.stats import Spread, spread

__all__ = ["Distance", "DistanceSums", "Spread", "spread"]


class Distance(msgspec.Struct, frozen=True):
    """How far logits lie from the fp32 reference, over all positions of all chunks.

    Standard errors come from the spread between chunks (positions within a chunk are not independent).
    """

    positions: int
    chunks: int
    kl_mean: float
    """Mean of KL(reference || engine) in nats."""
    kl_mean_se: float
    kl_median: float
    kl_p999: float
    kl_max: float
    top1: float
    """Share of positions at which both choose the same most likely token."""
    top1_se: float
    perplexity: float
    perplexity_reference: float
    perplexity_ratio: float
    """exp(mean(nll) - mean(nll of the reference)); 1 is equal, above 1 is worse."""
    perplexity_ratio_se: float


class DistanceSums:
    """Reduces chunks of logits to a ``Distance`` as they come: no more than two chunks are in memory."""

    def __init__(self) -> None:
        self._kl: list[npt.NDArray[np.float64]] = []
        self._same: list[npt.NDArray[np.bool_]] = []
        self._nll: list[npt.NDArray[np.float64]] = []
        self._nll_reference: list[npt.NDArray[np.float64]] = []

    def add(
        self,
        reference: npt.NDArray[np.float32],
        engine: npt.NDArray[np.float32],
        targets: npt.NDArray[np.int32],
    ) -> None:
        """One chunk: logits float32 [n, vocab] of both, and the n tokens that really came next.

        Raises ValueError when shapes differ or the engine's logits are not finite. O(n * vocab).
        """
        if reference.shape != engine.shape or len(targets) != len(reference):
            raise ValueError(f"shapes differ: {reference.shape}, {engine.shape}, {targets.shape}")
        kl = np.empty(len(targets), dtype=np.float64)
        nll = np.empty_like(kl)
        nll_reference = np.empty_like(kl)
        for start in range(0, len(targets), 64):  # few rows at a time stay in the cache
            part = slice(start, start + 64)
            a, b = reference[part], engine[part]
            rows = np.arange(len(a))
            mass, log_a = _normaliser(a)
            _, log_b = _normaliser(b)
            if not (np.isfinite(log_a).all() and np.isfinite(log_b).all()):
                raise ValueError("logits are not finite")
            # KL = sum p (a - b) - log Za + log Zb: no logarithm of small probabilities is ever taken
            kl[part] = np.einsum("rv,rv->r", mass, a - b, dtype=np.float64) - log_a + log_b
            nll[part] = log_b - b[rows, targets[part]]
            nll_reference[part] = log_a - a[rows, targets[part]]
        self._kl.append(kl)
        self._same.append(reference.argmax(axis=-1) == engine.argmax(axis=-1))
        self._nll.append(nll)
        self._nll_reference.append(nll_reference)

    def result(self) -> Distance:
        """Raises ValueError with fewer than two chunks: there is no standard error then."""
        if len(self._kl) < 2:
            raise ValueError("at least two chunks are needed")
        kl, same = np.concatenate(self._kl), np.concatenate(self._same)
        nll, nll_reference = np.concatenate(self._nll), np.concatenate(self._nll_reference)
        ratio = float(np.exp(nll.mean() - nll_reference.mean()))
        gaps = [float((a - b).mean()) for a, b in zip(self._nll, self._nll_reference, strict=True)]
        return Distance(
            positions=len(kl),
            chunks=len(self._kl),
            kl_mean=float(kl.mean()),
            kl_mean_se=_standard_error([float(c.mean()) for c in self._kl]),
            kl_median=float(np.median(kl)),
            kl_p999=float(np.quantile(kl, 0.999)),
            kl_max=float(kl.max()),
            top1=float(same.mean()),
            top1_se=_standard_error([float(c.mean()) for c in self._same]),
            perplexity=float(np.exp(nll.mean())),
            perplexity_reference=float(np.exp(nll_reference.mean())),
            perplexity_ratio=ratio,
            perplexity_ratio_se=ratio * _standard_error(gaps),
        )


def _normaliser(logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Softmax (float32) and log of its denominator (float64) per row."""
    top = logits.max(axis=-1, keepdims=True)
    mass = np.exp(logits - top)
    total = mass.sum(axis=-1, dtype=np.float64)
    mass /= total[:, None].astype(np.float32)
    return mass, np.log(total) + top[:, 0]


def _standard_error(chunk_means: Sequence[float]) -> float:
    return float(np.std(chunk_means, ddof=1) / np.sqrt(len(chunk_means)))
