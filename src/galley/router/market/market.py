"""The market as one server sees it: what is on offer, what it has bought, and when work is cheapest."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from galley.errors import ConfigError, GalleyError, Upstream
from galley.router.market.book import Book
from galley.router.market.desk import Desk
from galley.router.market.feed import Feed
from galley.router.market.lot import Lot
from galley.router.market.need import Need
from galley.router.market.planner import Planner, Wait
from galley.router.market.reservation import Reservation
from galley.router.market.sheet import read_sheet

__all__ = ["FeedTable", "Market", "MarketTable"]

REFERENCE = Need(model="", input=3000, output=1000)
"""Work by which the past of prices is kept: three tokens read for one written."""


class FeedTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[market.feed]]``: where a provider says what it offers."""

    provider: str
    url: str
    key_env: str
    every_s: int = 30
    max_age_s: int = 300


class MarketTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[market]``.

    Attributes:
        sheets: TOML files of lots; a path is taken from the catalog's folder.
        look_s: most seconds between two looks at work that waits.
        percent: how sure of a lower price work must be to wait: of 100 past stretches as long, in how many
            was it that low; lower waits less.
    """

    sheets: list[str] = []
    feed: list[FeedTable] = []
    look_s: int = 300
    percent: int = 40


class Market:
    """Book, desk and planner of a server, and the feeds that fill the book. Lives on one event loop.

    Args:
        folder: where relative sheets lie.
        secret: an environment variable by name.
        now: Unix seconds.
    Raises ConfigError: a sheet is wrong, a key is missing.
    """

    def __init__(
        self,
        table: MarketTable,
        folder: Path,
        secret: Callable[[str], str | None],
        *,
        now: Callable[[], float],
    ) -> None:
        self.table = table
        self.book = Book()
        self.desk = Desk(self.book)
        self.planner = Planner(self.desk, REFERENCE, look_s=table.look_s, percent=table.percent)
        self._now = now
        self._feeds = [(_open_feed(feed, secret), feed.every_s) for feed in table.feed]
        self._due = [0.0] * len(self._feeds)
        self._noted = 0.0
        for name in table.sheets:
            for lot in read_sheet(folder / Path(name).expanduser(), self.now):
                if self.book.find(lot.id) is not None:
                    raise ConfigError(f"{name}: there is a lot {lot.id!r} already", param="market.sheets")
                self.book.put(lot)
        self._note()

    @property
    def now(self) -> int:
        """Whole Unix seconds."""
        return int(self._now())

    async def refresh(self) -> tuple[list[Reservation], list[str]]:
        """Ask the feeds that are due, drop what is stale, end what has lapsed.

        Returns the reservations now being taken away, and what went wrong, in words. A feed that fails
        changes nothing: its lots go stale by themselves.
        """
        taken: list[Reservation] = []
        faults: list[str] = []
        for place, (feed, every_s) in enumerate(self._feeds):
            if self._now() < self._due[place]:
                continue
            self._due[place] = self._now() + every_s
            try:
                lots = await feed.fetch(self.now)
            except (GalleyError, Upstream) as error:
                faults.append(error.message)
                continue
            taken += self.replace(f"feed {feed.provider}", lots)
        taken += self._sweep()
        return taken, faults

    def replace(self, source: str, lots: Sequence[Lot]) -> list[Reservation]:
        """A source's lots are these now. Lots that another source has are not taken over. Returns the
        reservations that are taken away by it."""
        taken: list[Reservation] = []
        new = {lot.id for lot in lots}
        for gone in [lot.id for lot in self.book if lot.source == source and lot.id not in new]:
            taken += self.desk.withdraw(gone, self.now)
        for lot in lots:
            known = self.book.find(lot.id)
            if known is None or known.source == source:
                taken += self.desk.offer(lot, self.now)
        self._note()
        return taken

    def _sweep(self) -> list[Reservation]:
        at = self.now
        self.desk.lapse(at)
        self.book.expire(at)
        if at - self._noted >= self.table.look_s:
            self._note()
        return []

    def _note(self) -> None:
        self._noted = self.now
        for model in {lot.model for lot in self.book}:
            self.planner.note(model, self.now)

    def waits(self, need: Need) -> tuple[float, str]:
        """Seconds that deferrable work does well to wait before it is looked at again, and why; 0 is now."""
        if need.deadline is None or not self.book.of(need.model):
            return 0.0, "not deferrable, or nothing on the book for it"
        said = self.planner.plan(need, self.now)
        if isinstance(said, Wait):
            return max(0.0, said.until - self._now()), said.why
        return 0.0, said.why

    def close(self) -> None:
        """Close the feeds' connections."""
        for feed, _ in self._feeds:
            feed.close()

    def models(self) -> Iterable[str]:
        """Models with a lot, sorted."""
        return sorted({lot.model for lot in self.book})


def _open_feed(table: FeedTable, secret: Callable[[str], str | None]) -> Feed:
    key = secret(table.key_env)
    if not key:
        raise ConfigError(f"feed of {table.provider!r}: the environment has no {table.key_env}")
    return Feed(table.provider, table.url, key.encode(), max_age_s=table.max_age_s)
