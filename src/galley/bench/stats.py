"""What a set of noisy samples says: quartiles and percentiles, always with their count."""

import math
from collections.abc import Iterable, Sequence

import msgspec

__all__ = ["Latency", "Spread", "quantile", "spread"]


def quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of ascending values, linear between neighbours (Hyndman and Fan 1996, type 7).

    Raises ValueError for no values or a share outside 0..1.
    """
    if not ordered or not 0.0 <= share <= 1.0:
        raise ValueError(f"no quantile {share} of {len(ordered)} values")
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    left = ordered[low]
    if low + 1 == len(ordered):
        return left
    right = ordered[low + 1]
    # Clamped: rounding must not lead outside the two neighbours.
    return min(right, max(left, left + (right - left) * (place - low)))


class Spread(msgspec.Struct, frozen=True):
    """Median and quartiles of some samples."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    count: int


def spread(samples: Iterable[float]) -> Spread:
    """Median and quartiles. Raises ValueError for no samples or a non-finite one."""
    ordered = _ordered(samples)
    low, middle, high = (quantile(ordered, share) for share in (0.25, 0.5, 0.75))
    return Spread(median=middle, low=low, high=high, count=len(ordered))


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles of some durations, in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    most: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> "Latency | None":
        """None for no samples. Raises ValueError for a non-finite one. O(n log n)."""
        ordered = list(samples)
        if not ordered:
            return None
        ordered = _ordered(ordered)
        p50, p90, p95, p99 = (quantile(ordered, share) for share in (0.5, 0.9, 0.95, 0.99))
        mean = math.fsum(ordered) / len(ordered)
        return cls(count=len(ordered), mean=mean, p50=p50, p90=p90, p95=p95, p99=p99, most=ordered[-1])


def _ordered(samples: Iterable[float]) -> list[float]:
    found = [float(value) for value in samples]
    if not found:
        raise ValueError("no samples")
    if not all(map(math.isfinite, found)):
        raise ValueError(f"a sample is not finite: {found[:10]}")
    return sorted(found)
