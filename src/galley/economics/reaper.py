"""Settling what a process that died had left open."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from galley.economics.acts import Opening, Settlement, Subject, Sunk
from galley.economics.amount import Amount
from galley.economics.bill import bill
from galley.economics.board import Board, Progress
from galley.economics.price import PriceVersion
from galley.economics.store import Store
from galley.types import Usage

__all__ = ["Reaper"]

EVERY = 200
"""Reservations settled in one transaction."""


class Reaper:
    """Finds reservations without a living owner, and bills what they are known to have delivered.

    Of a process of this machine that is its board: every token up to the last chunk. Of one elsewhere, whose
    lease has run out, the progress it last renewed. Should that process come back, its own settlement posts
    the difference.

    Args:
        folder: of the boards. mine: the owner that is alive here, so never reaped.
    """

    def __init__(self, store: Store, folder: Path, mine: str, clock_us: Callable[[], int]) -> None:
        self._store = store
        self._folder = folder
        self._mine = mine
        self._clock_us = clock_us

    def reap(self) -> int:
        """Settle what there is; how many. Raises LedgerUnavailable."""
        now = self._clock_us()
        boards = {path.stem: path for path in self._folder.glob("*.board")}
        dead = {name: path for name, path in boards.items() if self._gone(name, path)}
        progress = {name: Board.read(path) for name, path in dead.items()}
        owed: list[Settlement] = []
        for row in self._store.open_reservations():
            name = row["owner"].rpartition(":")[2]
            if row["owner"] == self._mine or (name in boards and name not in dead):
                continue
            if name in dead:
                owed.append(settlement(row, progress[name].get(row["id"]), now, stale_us=None))
            elif row["lease_us"] < now:
                owed.append(settlement(row, None, now, stale_us=now))
        done = 0
        there = {act.id for act in owed}
        for name in dead:  # what had not come as far as the database
            for id, seen in progress[name].items():
                if id not in there and seen.note:
                    opening = msgspec.json.decode(seen.note, type=Opening)
                    act = settlement(row_of(opening), seen, now, stale_us=None)
                    owed.append(msgspec.structs.replace(act, opening=opening))
        for first in range(0, len(owed), EVERY):
            results = self._store.apply(owed[first : first + EVERY])
            done += sum(result is not None and getattr(result, "first", False) for result in results)
        for path in dead.values():
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        return done

    def _gone(self, name: str, path: Path) -> bool:
        if self._mine.endswith(":" + name):
            return False
        with contextlib.suppress(FileNotFoundError):
            # An empty file is one just being made, not yet locked.
            return path.stat().st_size > 0 and not Board.alive(path)
        return False


def row_of(opening: Opening) -> dict[str, Any]:
    """What of a reservation is needed to settle it."""
    return {
        "id": opening.id,
        "facts": msgspec.json.encode(opening.subject),
        "price": msgspec.json.encode(opening.price),
        "sunk": "[]",
    }


def settlement(
    row: Mapping[str, Any], seen: Progress | None, now_us: int, *, stale_us: int | None
) -> Settlement:
    """What a reservation is settled at without the process that opened it. Without a single token of output
    a local request costs nothing; one sent elsewhere is billed its prompt, which was most likely read."""
    subject = msgspec.json.decode(row["facts"], type=Subject)
    price = msgspec.json.decode(row["price"], type=PriceVersion)
    known = seen or Progress(row["prompt_tokens"], row["cached_tokens"], 0, row["completion_tokens"])
    ran = known.completion_tokens > 0 or not subject.local
    usage = Usage()
    if ran:
        usage = Usage(
            prompt_tokens=known.prompt_tokens,
            cached_tokens=min(known.cached_tokens, known.prompt_tokens),
            completion_tokens=known.completion_tokens,
        )
    found = bill(
        subject,
        subject.provider,
        price,
        usage,
        sunk=msgspec.json.decode(row["sunk"], type=tuple[Sunk, ...]),
    )
    return Settlement(
        id=row["id"],
        spent=Amount(found.cost_pico, usage.total_tokens, int(ran)),
        usage=usage,
        entries=found.entries,
        price=price,
        provider=subject.provider,
        model=subject.model,
        now_us=now_us,
        outcome="expired",
        estimated=not subject.local or seen is None,
        stale_us=stale_us,
    )
