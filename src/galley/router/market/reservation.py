"""A reservation: units of a lot, bought by the second at a price that no longer moves."""

from typing import Literal

import msgspec

__all__ = ["Reservation"]


class Reservation(msgspec.Struct, kw_only=True):
    """Times are whole Unix seconds; ``end`` is outside.

    Attributes:
        pico_s: pico-dollars a unit-second, as at the trade; 0 for a lot that is priced by tokens.
        limit_pico: most pico-dollars the whole of it may cost; None for no limit.
        taken: it is being taken away at ``end``: nothing new may begin on it.
    """

    id: int
    lot: str
    units: int
    start: int
    end: int
    pico_s: int
    min_s: int = 1
    limit_pico: int | None = None
    preemptible: bool = False
    tag: str = ""
    taken: bool = False
    state: Literal["held", "ended"] = "held"
    cost_pico: int = 0
    """Once it has ended."""

    def cost(self, end: int) -> int:
        """Pico-dollars if it ends at ``end``. What was taken away before it began is free."""
        if self.taken and end <= self.start:
            return 0
        return max(self.min_s, end - self.start) * self.units * self.pico_s
