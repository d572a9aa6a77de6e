"""Which prefixes on disk must stay: pins until they are dropped, holds until their time is over."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from galley.errors import CacheFull
from galley.kv.index import Entry, Index
from galley.kv.pins import Record, Records

__all__ = ["Kept"]

SHARE = 0.75
"""Most of the limit that pins and holds may take together; the rest comes and goes."""


class Kept:
    """The records of one store, and their counts in its index. Not thread-safe: the store locks.

    Args:
        limit: bytes of the whole store; ``SHARE`` of it may be kept.
        clock: Unix seconds.
    """

    def __init__(self, path: Path, index: Index, limit: int, clock: Callable[[], float]) -> None:
        self.pins = Records(path / "pins")
        self.holds = Records(path / "holds")
        self.most = int(limit * SHARE)
        self._index = index
        self._clock = clock
        self._records: dict[tuple[bool, str], Record] = {}

    def reload(self) -> None:
        """Read the records again, for an index that was filled afresh."""
        self._records = {}
        for records in (self.pins, self.holds):
            for record in records.all().values():
                self.protect(record)
        self.expire()

    def all(self) -> list[Record]:
        """Pins and unexpired holds, oldest first."""
        self.expire()
        return sorted(self._records.values(), key=lambda record: record.created)

    def pin(self, name: str) -> Record | None:
        """The pin of that name."""
        return self._records.get((True, name))

    def held(self, leaf: Entry) -> Record | None:
        """The hold of that prefix."""
        return self._records.get((False, leaf.key.hex()))

    def room(self, leaf: Entry) -> bool:
        """Whether one more prefix may be kept."""
        return self._index.kept_bytes + self._index.more(leaf.key) <= self.most

    def full(self, wanted: int) -> CacheFull:
        """The error that says how much may be kept, and how much is."""
        return CacheFull(
            f"{wanted} bytes do not fit: {self._index.kept_bytes} of at most {self.most} bytes "
            f"({SHARE:.0%} of the limit) are pinned or held already.",
            param="kv.disk_bytes",
            hint="Drop a pin (galley cache drop NAME), or raise kv.disk_bytes.",
        )

    def protect(self, record: Record) -> None:
        """Keep a prefix; one of the same name and sort is replaced."""
        self.release(record)
        self._records[record.until is None, record.name] = record
        self._index.keep(record.key)

    def release(self, record: Record) -> None:
        """Undo ``protect``; nothing happens when it was not."""
        old = self._records.pop((record.until is None, record.name), None)
        if old is not None:
            self._index.free(old.key)

    def forget(self, record: Record) -> None:
        """``release``, on disk too. Raises OSError."""
        (self.pins if record.until is None else self.holds).remove(record.name)
        self.release(record)

    def expire(self) -> None:
        """Let go of the holds whose time is over."""
        now = self._clock()
        for record in list(self._records.values()):
            if record.until is not None and record.until <= now:
                self.release(record)
                with contextlib.suppress(OSError):  # it has expired for every reader
                    self.holds.remove(record.name)

    def changed(self, entry: Entry) -> None:
        """A block came or went: if it belongs to a kept prefix, the counts are made afresh."""
        if entry.kept or any(record.key == entry.key for record in self._records.values()):
            self._index.recount(record.key for record in self._records.values())

    def record(
        self,
        name: str,
        leaf: Entry,
        *,
        until: float | None,
        tokens: int,
        model: str,
        tenant: str = "",
        salted: bool = False,
    ) -> Record:
        """A record of the chain that ends here, as it is now."""
        chain = list(self._index.up(leaf.key))
        return Record(
            name=name,
            leaf=leaf.digest.hex(),
            folder=leaf.folder,
            until=until,
            blocks=len(chain),
            tokens=tokens,
            bytes=sum(entry.size for entry in chain),
            model=model,
            tenant=tenant,
            salted=salted,
            created=self._clock(),
        )
