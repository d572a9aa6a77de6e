"""The price curve: what a need costs when it is delivered now, or within an hour, eight, a day."""

from collections.abc import Sequence

import msgspec

from galley.router.market.book import Book
from galley.router.market.need import Need
from galley.router.market.past import Past

__all__ = ["HORIZONS_S", "Curve", "Point"]

HORIZONS_S = (0, 3600, 8 * 3600, 24 * 3600)
FINE_S = (0, 1800, 3600, 2 * 3600, 4 * 3600, 8 * 3600, 16 * 3600, 24 * 3600)
"""Horizons that are told apart where work is timed."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """The price of a need begun within ``within_s`` seconds.

    ``firm``: a lot on the book offers it; otherwise it is expected from the past, and nobody owes it.
    """

    within_s: int
    pico: int
    firm: bool
    lot: str = ""
    """The lot that offers it."""


class Curve(msgspec.Struct, frozen=True):
    """Points by horizon. Waiting never costs more than not waiting: who may wait may also go at once."""

    points: list[Point]

    @classmethod
    def of(
        cls,
        book: Book,
        past: Past | None,
        reference_pico: int | None,
        need: Need,
        at: int,
        *,
        horizons_s: Sequence[int] = HORIZONS_S,
        percent: int = 50,
    ) -> "Curve":
        """Of firm lots, those valid later included, and of the past.

        Args:
            past: of the model's reference need; None is no forecast.
            reference_pico: what the reference need costs now; the forecast moves in proportion to it.
        Empty when nothing is on offer now or within the longest horizon.
        """
        points: list[Point] = []
        best: Point | None = None
        horizons = sorted(horizons_s)
        starts = moments(book, need.model, at, horizons[-1])
        for within in horizons:
            while starts and starts[0] <= at + within:
                for match in book.matches(need, starts.pop(0))[:1]:
                    if best is None or match.pico < best.pico:
                        best = Point(within_s=within, pico=match.pico, firm=True, lot=match.lot.id)
            if best is None:
                continue
            if within and past is not None and reference_pico and points:
                low = past.lowest(within, at, percent=percent)
                if low is not None:
                    hoped = -(-points[0].pico * low // reference_pico)
                    if hoped < best.pico:
                        best = Point(within_s=within, pico=hoped, firm=False)
            points.append(msgspec.structs.replace(best, within_s=within))
        return cls(points)

    def by(self, within_s: int) -> Point | None:
        """The point of the longest horizon that fits into ``within_s`` seconds."""
        fitting = [point for point in self.points if point.within_s <= within_s]
        return fitting[-1] if fitting else None


def moments(book: Book, model: str, at: int, within: int) -> list[int]:
    """Times at which the book's prices of a model change, from ``at`` to ``at + within``."""
    starts = {lot.valid_from for lot in book.of(model) if at < lot.valid_from <= at + within}
    return [at, *sorted(starts)]
