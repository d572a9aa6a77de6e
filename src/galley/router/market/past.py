"""What a model's capacity used to cost, and what that says of the hours to come."""

from collections import deque

__all__ = ["Past"]

BUCKET_S = 300
KEPT = 14 * 24 * 3600 // BUCKET_S
LEAST = 24 * 3600 // BUCKET_S
FRESH_S = 3600


class Past:
    """The lowest expected price of one and the same reference need, every five minutes of fourteen days.

    Integers only, so that a forecast is the same on every machine.
    """

    def __init__(self) -> None:
        self._prices: deque[tuple[int, int]] = deque(maxlen=KEPT)
        self._known: dict[tuple[int, int], int | None] = {}
        self._known_at = 0

    def __len__(self) -> int:
        return len(self._prices)

    def note(self, at: int, pico: int) -> None:
        """The price at a time. Of several in one bucket the last stays."""
        bucket = at // BUCKET_S
        if self._prices and self._prices[-1][0] >= bucket:
            if self._prices[-1][0] == bucket:
                self._prices[-1] = (bucket, pico)
            return
        self._prices.append((bucket, pico))

    def lowest(self, within_s: int, at: int, *, percent: int = 50) -> int | None:
        """The price below which the cheapest moment of the next ``within_s`` seconds lies in ``percent`` of
        past stretches of that length. None with less than a day of past. O(n log n), once an hour."""
        if len(self._prices) < LEAST:
            return None
        if at - self._known_at >= FRESH_S:
            self._known.clear()
            self._known_at = at
        key = (within_s, percent)
        if key not in self._known:
            self._known[key] = self._forecast(max(1, within_s // BUCKET_S), percent)
        return self._known[key]

    def _forecast(self, length: int, percent: int) -> int | None:
        prices = [pico for _, pico in self._prices]
        if len(prices) <= length:
            return None
        lows: list[int] = []
        window: deque[int] = deque()
        for i, price in enumerate(prices):
            while window and prices[window[-1]] >= price:
                window.pop()
            window.append(i)
            if window[0] <= i - length:
                window.popleft()
            if i >= length - 1:
                lows.append(prices[window[0]])
        lows.sort()
        return lows[min(len(lows) - 1, len(lows) * percent // 100)]
