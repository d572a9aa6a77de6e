"""The planner: buy now, and what, or wait. The live server and the simulator ask the same one."""

import msgspec

from galley.router.market.book import Match
from galley.router.market.curve import FINE_S, Curve
from galley.router.market.desk import Desk
from galley.router.market.lot import Lot
from galley.router.market.need import Need
from galley.router.market.past import Past

__all__ = ["Buy", "Decline", "Planner", "Wait"]


class Buy(msgspec.Struct, frozen=True):
    """Buy now of this lot."""

    match: Match
    why: str


class Wait(msgspec.Struct, frozen=True):
    """Ask again at ``until``, or before when prices move."""

    until: int
    why: str


class Decline(msgspec.Struct, frozen=True):
    """It cannot be had within its limits."""

    why: str


class Planner:
    """Times and places work over one desk.

    The rule, for work that may wait: what would be left of its time if it began now on capacity that cannot
    be taken away is its *slack*. Without slack it goes there. With slack it buys when now is no dearer than
    what is expected within the slack, and waits otherwise.

    Capacity that may be taken away is bought only where that cannot cost a deadline: either its notice covers
    the start of firm capacity and the leaving of this one, or the slack covers one interruption, its lost
    work, and the time until the next look. And only while there is as much firm capacity free as is exposed,
    so that all of it could move at once.

    Args:
        pasts: the past of each model's reference need.
        reference: work by which pasts are kept; its model is replaced.
        look_s: most seconds between two looks at waiting work.
        percent: see ``Past.lowest``: higher waits less.
        wait: False never puts work off.
        spot: False buys firm capacity alone.
    """

    def __init__(
        self,
        desk: Desk,
        reference: Need,
        *,
        look_s: int = 300,
        percent: int = 40,
        wait: bool = True,
        spot: bool = True,
    ) -> None:
        self.desk = desk
        self.pasts: dict[str, Past] = {}
        self._reference = reference
        self._look_s = look_s
        self._percent = percent
        self._wait = wait
        self._spot = spot

    def note(self, model: str, at: int) -> None:
        """Look at the book: what the reference need costs now becomes past."""
        price = self._reference_price(model, at)
        if price is not None:
            self.pasts.setdefault(model, Past()).note(at, price)

    def _reference_price(self, model: str, at: int) -> int | None:
        need = msgspec.structs.replace(self._reference, model=model)
        found = self.desk.book.matches(need, at)
        return found[0].pico if found else None

    def curve(self, need: Need, at: int, *, fine: bool = False) -> Curve:
        """The price curve of a need."""
        horizons = {"horizons_s": FINE_S} if fine else {}
        return Curve.of(
            self.desk.book,
            self.pasts.get(need.model),
            self._reference_price(need.model, at),
            need,
            at,
            percent=self._percent,
            **horizons,
        )

    def options(self, need: Need, at: int, *, term_s: int = 1, on: str = "") -> list[Match]:
        """Lots with a free unit for ``term_s`` seconds that can take the need, cheapest first. The lot ``on``
        is where the work runs already: there it pays no start-up again."""
        found = []
        for match in self.desk.book.matches(need, at):
            lot = match.lot
            end = min(at + term_s, lot.valid_to)
            if (self._spot or not lot.preemptible) and end > at and self.desk.free(lot, at, end) >= 1:
                if lot.id == on:
                    warm = msgspec.structs.replace(lot, start_s=0)
                    found.append(Match(lot, warm.expected(need)))
                else:
                    found.append(match)
        if on:
            found.sort(key=lambda match: (match.pico, match.lot.listed, match.lot.id))
        return found

    def plan(self, need: Need, at: int, *, term_s: int = 1, on: str = "") -> Buy | Wait | Decline:
        """What to do with a piece of work at ``at``.

        Args:
            term_s: how long a purchase would be for.
            on: the lot it runs on already, if any.
        Work without a deadline is interactive: it buys at once.
        """
        # Without its deadline, to see also those that would be late: they are better than nothing.
        anytime = msgspec.structs.replace(need, deadline=None)
        options = self.options(anytime, at, term_s=term_s, on=on)
        firm = [match for match in options if not match.lot.preemptible]
        if not options:
            later = self._later(anytime, need, at)
            if later is None:
                return Decline("nothing is on offer within its limits")
            return Wait(later, "nothing on offer has room within its limits")
        slack = 0
        if need.deadline is not None:
            fastest = min(match.lot.done(need, at) for match in firm) if firm else need.deadline
            slack = need.deadline - fastest
        safe = [match for match in options if self._is_safe(match.lot, need, slack, firm, at=at, on=on)]
        if not safe:
            # Every choice may be late: the one that is done first does least harm.
            soonest = min(options, key=lambda match: (match.lot.done(need, at), match.pico))
            return Buy(soonest, "nothing is safe; this is done first")
        best = safe[0]
        if need.deadline is None or slack <= self._look_s or not self._wait:
            return Buy(best, "the cheapest that meets its limits")
        point = self.curve(anytime, at, fine=True).by(slack - self._look_s)
        if point is None or best.pico <= point.pico:
            return Buy(best, "no dearer than is expected before it must begin")
        until = min(at + self._look_s, need.deadline)
        return Wait(until, f"expected to fall from {best.pico} to {point.pico} pico-dollars")

    def _is_safe(self, lot: Lot, need: Need, slack: int, firm: list[Match], *, at: int, on: str) -> bool:
        start_s = 0 if lot.id == on else lot.start_s
        if need.deadline is not None and at + start_s + lot.lasts(need) > need.deadline:
            return False
        if not lot.preemptible:
            return True
        room = sum(self.desk.free(each.lot, at, at + 1) for each in firm)
        if room <= self.desk.exposed():
            return False
        if need.deadline is not None and slack > self._look_s + need.redo_s + need.drain_s + lot.start_s:
            return True
        return lot.notice_s >= min(each.lot.start_s for each in firm) + need.drain_s

    def _later(self, anytime: Need, need: Need, at: int) -> int | None:
        """When to ask again though nothing can be had now; None when that is in vain."""
        lots = self.desk.book.of(need.model)
        look = at + self._look_s
        starts = [
            lot.valid_from for lot in lots if lot.valid_from > at and not lot.refuses(anytime, lot.valid_from)
        ]
        full = any(lot.refuses(anytime, at) is None for lot in lots)
        if full or (need.deadline is not None and look < need.deadline):
            return min([look, *starts])
        return min(starts, default=None)
