"""What a month will come to: an estimate with an interval, in whole pico-dollars."""

import calendar
from collections.abc import Mapping
from datetime import date, timedelta
from fractions import Fraction
from math import isqrt

import msgspec

__all__ = ["Forecast", "forecast"]

WINDOW = 28
"""Days looked back at, at most: four of each day of the week."""
T95 = (
    6314, 2920, 2353, 2132, 2015, 1943, 1895, 1860, 1833, 1812, 1796, 1782, 1771, 1761, 1753, 1746, 1740,
    1734, 1729, 1725, 1721, 1717, 1714, 1711, 1708, 1706, 1703,
)  # fmt: skip
"""Student's t at 95 %, in thousandths, for 1 to 27 degrees of freedom: a two-sided interval of 90 %."""


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """Spending of the month of a day, pico-dollars. ``low`` to ``high`` is a prediction interval of 90 %."""

    month: str
    spent: int
    """So far, today included."""
    estimate: int
    low: int
    high: int
    days: int
    """Complete days that it rests on."""


def forecast(days: Mapping[str, int], today: date) -> Forecast | None:
    """From spending by day: what was spent before today, and the mean of the last complete days (at most
    ``WINDOW``, from the first with spending on; days without any count as 0) for today and each day left.

    The interval is the normal-theory prediction interval for a sum of k further days, t · s · √(k + k²/n):
    it takes days as independent and alike, so a weekly rhythm or a trend widens s but is not modelled.
    None of the three is below what is spent already. None with fewer than two complete days.
    """
    known = sorted(day for day in days if day < today.isoformat())
    if not known:
        return None
    first = max(date.fromisoformat(known[0]), today - timedelta(days=WINDOW))
    count = (today - first).days
    if count < 2:
        return None
    past = [days.get((first + timedelta(days=number)).isoformat(), 0) for number in range(count)]
    mean = Fraction(sum(past), count)
    variance = sum(((each - mean) ** 2 for each in past), Fraction(0)) / (count - 1)
    left = calendar.monthrange(today.year, today.month)[1] - today.day + 1
    month = today.isoformat()[:7]
    before = sum(pico for day, pico in days.items() if day[:7] == month and day < today.isoformat())
    spent = before + days.get(today.isoformat(), 0)
    middle = before + mean * left
    wide = variance * (left + Fraction(left * left, count)) * T95[count - 2] ** 2 / 10**6
    half = isqrt(wide.numerator // wide.denominator)
    return Forecast(
        month=month,
        spent=spent,
        estimate=max(spent, round(middle)),
        low=max(spent, round(middle - half)),
        high=max(spent, round(middle + half)),
        days=count,
    )
