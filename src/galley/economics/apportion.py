"""Dividing a whole number of pico-dollars so that the shares add up to it exactly."""

from collections.abc import Sequence
from fractions import Fraction

__all__ = ["apportion", "nearest"]


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Shares of ``total`` in proportion to the weights, each within one unit of the exact proportion.

    The method of the largest remainder (Hamilton): everybody gets the whole part, and what is left over goes,
    a unit each, to the largest fractions; of equal ones to the first. A weight of 0 gets 0.

    Args:
        total: at least 0.
        weights: at least 0 each.

    O(n log n). Raises ValueError for a negative number, and where there is something to divide and nobody
    with a weight to take it.
    """
    if total < 0 or any(weight < 0 for weight in weights):
        raise ValueError("nothing negative can be apportioned")
    whole = sum(weights)
    if whole == 0:
        if total:
            raise ValueError(f"{total} to apportion, and no weight above zero")
        return [0] * len(weights)
    divided = [divmod(total * weight, whole) for weight in weights]
    shares = [share for share, _ in divided]
    left = total - sum(shares)
    order = sorted(range(len(weights)), key=lambda number: -divided[number][1])
    for number in order[:left]:
        shares[number] += 1
    return shares


def nearest(amount: Fraction) -> int:
    """The whole number nearest to an amount, half to even."""
    return round(amount)
