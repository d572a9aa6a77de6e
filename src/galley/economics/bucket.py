"""Token buckets in whole numbers, so that nothing is lost or won by rounding, however often it is asked."""

import msgspec

__all__ = ["MINUTE_US", "Bucket"]

MINUTE_US = 60_000_000


class Bucket(msgspec.Struct):
    """So much a minute, a minute's worth at once. The level is kept in units times microseconds a minute:
    what flows in during ``dt`` microseconds is exactly ``dt * per_minute``.

    Attributes:
        level: in units * MINUTE_US; below zero is debt, and what is refunded never lifts it above a minute's
            worth.
        at_us: microseconds of Unix time at which the level held.
    """

    per_minute: int
    level: int
    at_us: int

    @classmethod
    def full(cls, per_minute: int, now_us: int) -> "Bucket":
        """A minute's worth."""
        return cls(per_minute, per_minute * MINUTE_US, now_us)

    def refill(self, now_us: int) -> None:
        """Let time pass; a clock that went back adds nothing."""
        flown = max(0, now_us - self.at_us) * self.per_minute
        self.level = min(self.per_minute * MINUTE_US, self.level + flown)
        self.at_us = max(self.at_us, now_us)

    def remaining(self) -> int:
        """Whole units there are; 0 in debt."""
        return max(0, self.level // MINUTE_US)

    def waits_us(self, units: int) -> int:
        """Microseconds until so many are there; 0 for now. More than a minute's worth never comes: that is
        the caller's to refuse."""
        lacking = units * MINUTE_US - self.level
        return max(0, -(-lacking // self.per_minute))

    def take(self, units: int) -> None:
        """Debit, into debt if need be; a negative number refunds."""
        self.level = min(self.per_minute * MINUTE_US, self.level - units * MINUTE_US)
