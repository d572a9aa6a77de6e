"""The desk: buys units of lots by the second, gives them back, and tells whose are taken away."""

from collections.abc import Iterable

from galley.errors import GalleyError
from galley.router.market.book import Book
from galley.router.market.lot import Lot
from galley.router.market.need import Need
from galley.router.market.reservation import Reservation

__all__ = ["Desk", "NoTrade"]


class NoTrade(GalleyError):
    """A reservation that was not made: no capacity, or above its limit."""

    status = 503
    code = "no_trade"
    retryable = True


class Desk:
    """Reservations over a book.

    Held at every second: the units of a lot in use are at most its capacity, except for units that are being
    taken away, until their notice is over. No reservation costs more than its limit.
    """

    def __init__(self, book: Book) -> None:
        self.book = book
        self._next = 1
        self._held: dict[int, Reservation] = {}
        self._of: dict[str, dict[int, Reservation]] = {}
        self.spent_pico = 0
        """Of reservations that have ended."""

    def held(self) -> Iterable[Reservation]:
        """Reservations not ended."""
        return self._held.values()

    def find(self, id: int) -> Reservation | None:
        """A reservation not ended."""
        return self._held.get(id)

    def used(self, lot: str, start: int, end: int) -> int:
        """Most units of a lot in use at once in ``[start, end)``. O(n log n) in its reservations."""
        most = now = later = 0
        held = self._of.get(lot, {}).values()
        for each in held:
            if each.start <= start < each.end:
                now += each.units
            elif start < each.start < end:
                later += 1
        if not later:  # nothing begins in between, so the most is at the start
            return now
        edges: list[tuple[int, int]] = []
        for each in held:
            if each.start < end and start < each.end:
                edges.append((max(start, each.start), each.units))
                edges.append((each.end, -each.units))
        now = 0
        for _, change in sorted(edges):  # at one instant, ends (negative) before starts
            now += change
            most = max(most, now)
        return most

    def free(self, lot: Lot, start: int, end: int) -> int:
        """Units that can be had throughout ``[start, end)``; never below 0."""
        if start < lot.valid_from or end > lot.valid_to:
            return 0
        return max(0, lot.capacity - self.used(lot.id, start, end))

    def reserve(
        self, lot: Lot, start: int, end: int, *, units: int = 1, limit_pico: int | None = None, tag: str = ""
    ) -> Reservation:
        """Buy ``units`` of the lot for ``[start, end)`` at its price of now.

        Raises NoTrade: not on offer then, not enough free, or dearer than ``limit_pico``; ValueError for no
        units or no time.
        """
        if units < 1 or end <= start:
            raise ValueError(f"{units} units for {end - start} s")
        if self.book.find(lot.id) != lot:
            raise NoTrade(f"{lot.id} is no longer offered so")
        if self.free(lot, start, end) < units:
            raise NoTrade(f"{lot.id} has no {units} units free from {start} to {end}", code="no_capacity")
        made = Reservation(
            id=self._next,
            lot=lot.id,
            units=units,
            start=start,
            end=end,
            pico_s=lot.second_pico or 0,
            min_s=lot.min_s,
            limit_pico=limit_pico,
            preemptible=lot.preemptible,
            tag=tag,
        )
        cost = made.cost(end)
        if limit_pico is not None and cost > limit_pico:
            raise NoTrade(
                f"{lot.id} would cost {cost} pico-dollars, the limit is {limit_pico}", code="above_limit"
            )
        self._next += 1
        self._held[made.id] = made
        self._of.setdefault(lot.id, {})[made.id] = made
        return made

    def buy(self, lot: Lot, need: Need, start: int, end: int, *, tag: str = "") -> Reservation:
        """``reserve`` one unit for a need, within its limit. Raises NoTrade."""
        return self.reserve(lot, start, end, limit_pico=need.max_pico, tag=tag)

    def release(self, id: int, at: int) -> int:
        """Give it back; seconds not used are not paid, beyond the least that is billed. Returns its cost in
        pico-dollars. Idempotent."""
        found = self._held.pop(id, None)
        if found is None:
            return 0
        del self._of[found.lot][id]
        # A unit whose time is over is over; one never begun costs the least that is billed.
        found.end = max(found.start, min(at, found.end))
        found.state, found.cost_pico = "ended", found.cost(found.end)
        self.spent_pico += found.cost_pico
        return found.cost_pico

    def lapse(self, at: int) -> list[Reservation]:
        """End those whose time is over. Returns them."""
        over = [each for each in self._held.values() if each.end <= at]
        for each in over:
            self.release(each.id, at)
        return over

    def preempt(self, lot: str, at: int, *, keep: int, notice_s: int) -> list[Reservation]:
        """A lot is left with ``keep`` units from ``at + notice_s`` on. Of the reservations that may be taken
        the youngest go first. Returns those now being taken away, with their new ``end``."""
        end = at + notice_s
        mine = [each for each in self._of.get(lot, {}).values() if each.end > end]
        last = max((each.end for each in mine), default=end)
        taken = []
        for each in sorted(mine, key=lambda one: -one.id):
            if self.used(lot, end, last) <= keep:
                break
            if each.preemptible and not each.taken:
                each.end, each.taken = max(each.start, end), True
                taken.append(each)
        return taken

    def offer(self, lot: Lot, at: int) -> list[Reservation]:
        """Put a lot into the book, or change one. Where its capacity shrank below what was bought of it, the
        excess is taken away with the lot's notice. Returns what is."""
        before = self.book.find(lot.id)
        self.book.put(lot)
        if before is None or lot.capacity >= before.capacity:
            return []
        return self.preempt(lot.id, at, keep=lot.capacity, notice_s=before.notice_s)

    def withdraw(self, id: str, at: int) -> list[Reservation]:
        """Take a lot off the book. What was bought of it firmly stays; the rest is taken away with notice."""
        lot = self.book.withdraw(id)
        return [] if lot is None else self.preempt(id, at, keep=0, notice_s=lot.notice_s)

    def exposed(self) -> int:
        """Units in use that may be taken away."""
        return sum(each.units for each in self._held.values() if each.preemptible)
