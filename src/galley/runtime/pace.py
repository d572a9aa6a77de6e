"""How fast this machine computes and reads KV: the measure of whether a disk hit is worth taking."""

__all__ = ["Pace"]

SMOOTHING = 0.2
"""Weight of a new measurement."""


class Pace:
    """Seconds a token takes to compute and a byte to read, from guesses at first, then from measurements.

    Two threads may write, one field each; readers may see either value.

    Args:
        token_s: seconds to compute one prompt token. byte_s: seconds to read and verify one byte.
        trip_s: what any load costs beside its bytes.
    """

    def __init__(self, *, token_s: float, byte_s: float = 1 / 0.5e9, trip_s: float = 0.003) -> None:
        self.token_s = token_s
        self.byte_s = byte_s
        self.trip_s = trip_s

    def computed(self, tokens: int, seconds: float) -> None:
        """A step of ``tokens`` prompt tokens took so long."""
        self.token_s += SMOOTHING * (seconds / tokens - self.token_s)

    def read(self, size: int, seconds: float) -> None:
        """So many bytes were read and verified in so long."""
        self.byte_s += SMOOTHING * (seconds / size - self.byte_s)

    def load_s(self, size: int) -> float:
        """Predicted seconds to load ``size`` bytes."""
        return self.trip_s + size * self.byte_s

    def worth(self, size: int, tokens: int) -> bool:
        """Whether loading ``size`` bytes is predicted to beat computing their ``tokens``."""
        return self.load_s(size) < tokens * self.token_s
