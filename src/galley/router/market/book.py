"""The book: every lot on offer, and which of them match a need, best first."""

from collections.abc import Iterator

import msgspec

from galley.router.market.lot import Lot
from galley.router.market.need import Need

__all__ = ["Book", "Match"]


class Match(msgspec.Struct, frozen=True):
    """A lot that can take a need, and what the work is expected to cost there, in pico-dollars."""

    lot: Lot
    pico: int


class Book:
    """Lots by id. Not thread-safe: it lives on one event loop, or in one simulation."""

    def __init__(self) -> None:
        self._lots: dict[str, Lot] = {}
        self._models: dict[str, dict[str, Lot]] = {}

    def __iter__(self) -> Iterator[Lot]:
        return iter(self._lots.values())

    def __len__(self) -> int:
        return len(self._lots)

    def find(self, id: str) -> Lot | None:
        """The lot of that id."""
        return self._lots.get(id)

    def put(self, lot: Lot) -> None:
        """Offer a lot, or change one. It keeps its place in time while its price stays the same, and loses it
        when the price moves."""
        before = self._lots.get(lot.id)
        if before is not None:
            if (before.price, before.second_pico) == (lot.price, lot.second_pico):
                lot = msgspec.structs.replace(lot, listed=before.listed)
            if before.model != lot.model:
                del self._models[before.model][lot.id]
        self._lots[lot.id] = lot
        self._models.setdefault(lot.model, {})[lot.id] = lot

    def withdraw(self, id: str) -> Lot | None:
        """Offer it no more. What was bought of it is the desk's to keep."""
        lot = self._lots.pop(id, None)
        if lot is not None:
            del self._models[lot.model][id]
        return lot

    def expire(self, at: int) -> list[Lot]:
        """Drop every lot whose time is over. Returns them."""
        over = [lot for lot in self._lots.values() if lot.valid_to <= at]
        for lot in over:
            self.withdraw(lot.id)
        return over

    def of(self, model: str) -> list[Lot]:
        """The lots of a model."""
        return list(self._models.get(model, {}).values())

    def matches(self, need: Need, at: int) -> list[Match]:
        """Lots that can take the need at ``at``, the lowest expected total price first; at equal prices the
        one listed earlier, then by id. O(n log n) in the model's lots. Free capacity is not looked at."""
        lots = self._models.get(need.model, {}).values()
        found = [Match(lot, lot.expected(need)) for lot in lots if lot.refuses(need, at) is None]
        return sorted(found, key=lambda match: (match.pico, match.lot.listed, match.lot.id))
