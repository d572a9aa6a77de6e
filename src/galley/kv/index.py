"""What the disk tier knows of its files: chains of blocks, which must stay, and which goes first."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from pathlib import Path

from galley.kv.files import rounded

__all__ = ["Entry", "Index", "listed"]

FOLDER = re.compile(r"[0-9a-f]{32}")
FILE = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})-([0-9]{1,7})\.kv")


class Entry:
    """One block on disk. ``kept`` counts its pins and holds; ``busy`` spares it for a moment."""

    __slots__ = (
        "above",
        "busy",
        "children",
        "depth",
        "digest",
        "folder",
        "kept",
        "key",
        "parent",
        "size",
        "stamped",
        "used",
    )

    def __init__(
        self, digest: bytes, parent: bytes, *, depth: int, folder: str, size: int, used: float
    ) -> None:
        self.digest = digest
        self.parent = parent
        self.key = key_of(folder, digest)
        self.above = key_of(folder, parent)
        """The parent's key; of no entry when ``depth`` is 0."""
        self.depth = depth
        self.folder = folder
        self.size = size
        self.used = used
        self.stamped = used
        self.children: set[bytes] = set()
        self.kept = 0
        self.busy = 0

    @property
    def name(self) -> str:
        """The file's name in its folder."""
        return f"{self.digest.hex()}-{self.parent.hex()}-{self.depth}.kv"


def key_of(folder: str, digest: bytes) -> bytes:
    """A block's key in the index: the same name may stand in the folders of two identities."""
    return bytes.fromhex(folder) + digest


class Index:
    """Blocks by key, linked to their parents; every block's ancestors are there too (KV-7 on disk).

    ``victim`` is the least recently used leaf that nothing keeps, from a heap whose stale items are skipped:
    O(log n) amortised. ``keep`` and ``free`` cost the depth of the chain.
    """

    def __init__(self) -> None:
        self.entries: dict[bytes, Entry] = {}
        self.bytes = 0
        self.kept_bytes = 0
        self._leaves: list[tuple[float, bytes]] = []

    def __len__(self) -> int:
        return len(self.entries)

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()
        self._leaves.clear()
        self.bytes = self.kept_bytes = 0

    def get(self, key: bytes) -> Entry | None:
        return self.entries.get(key)

    def fits(self, entry: Entry) -> bool:
        """Whether an entry may be added: unknown so far, and its parent is there, one step up."""
        parent = self.entries.get(entry.above)
        linked = entry.depth == 0 or (parent is not None and parent.depth == entry.depth - 1)
        return linked and entry.key not in self.entries

    def add(self, entry: Entry) -> None:
        """Add an entry that ``fits``."""
        self.entries[entry.key] = entry
        self.bytes += entry.size
        if entry.depth:
            self.entries[entry.above].children.add(entry.key)
        self._offer(entry)

    def remove(self, entry: Entry) -> list[Entry]:
        """Take out an entry and its descendants; returns them, leaves first."""
        order, waiting = list[Entry](), [entry.key]
        while waiting:
            each = self.entries.pop(waiting.pop())
            order.append(each)
            waiting.extend(each.children)
            self.bytes -= each.size
            self.kept_bytes -= each.size if each.kept else 0
        parent = self.entries.get(entry.above) if entry.depth else None
        if parent is not None:
            parent.children.discard(entry.key)
            self._offer(parent)
        return order[::-1]

    def touch(self, entry: Entry, now: float) -> None:
        """The chain that ends here was used; its ancestors cannot go before it anyway."""
        entry.used = now
        self._offer(entry)

    def victim(self) -> Entry | None:
        """The leaf to give up next, or None when all that is left must stay."""
        spared: list[tuple[float, bytes]] = []
        found = None
        while self._leaves and found is None:
            used, key = heappop(self._leaves)
            entry = self.entries.get(key)
            if entry is None or entry.children or entry.kept or entry.used != used:
                continue
            if entry.busy:
                spared.append((used, key))
            else:
                found = entry
        for item in spared:
            heappush(self._leaves, item)
        if found is not None:
            self._offer(found)
        return found

    def up(self, leaf: bytes) -> Iterator[Entry]:
        """From a block to its chain's first one; nothing when the block is not there."""
        entry = self.entries.get(leaf)
        while entry is not None:
            yield entry
            entry = self.entries.get(entry.above) if entry.depth else None

    def more(self, leaf: bytes) -> int:
        """Bytes of a chain that nothing keeps yet."""
        return sum(entry.size for entry in self.up(leaf) if not entry.kept)

    def keep(self, leaf: bytes) -> None:
        """Keep a chain; counted, so that each ``keep`` needs its ``free``."""
        for entry in self.up(leaf):
            if entry.kept == 0:
                self.kept_bytes += entry.size
            entry.kept += 1

    def free(self, leaf: bytes) -> None:
        """Undo one ``keep`` of the same chain."""
        for entry in self.up(leaf):
            entry.kept -= 1
            if entry.kept == 0:
                self.kept_bytes -= entry.size
                self._offer(entry)

    def recount(self, leaves: Iterable[bytes]) -> None:
        """``keep`` exactly these chains; after a kept block was lost or came back. O(n)."""
        for entry in self.entries.values():
            entry.kept = 0
        self.kept_bytes = 0
        for leaf in leaves:
            self.keep(leaf)
        self._rebuild()

    def check(self) -> list[str]:
        """What is wrong, in words; empty when all is well. O(n); for tests."""
        faults = []
        entries = self.entries.values()
        if sum(entry.size for entry in entries) != self.bytes:
            faults.append("bytes are miscounted")
        if sum(entry.size for entry in entries if entry.kept > 0) != self.kept_bytes:
            faults.append("kept bytes are miscounted")
        listed = set(self._leaves)
        for entry in entries:
            parent = self.entries.get(entry.above)
            if entry.depth and (parent is None or entry.key not in parent.children):
                faults.append(f"KV-7: {entry.name} is an orphan")
            if any(child not in self.entries for child in entry.children):
                faults.append(f"{entry.name} lists a child that is gone")
            if entry.kept < 0 or entry.busy:
                faults.append(f"{entry.name} is kept {entry.kept} times, busy {entry.busy}")
            if not entry.children and not entry.kept and (entry.used, entry.key) not in listed:
                faults.append(f"{entry.name} can never be evicted")
        return faults

    def _offer(self, entry: Entry) -> None:
        if not entry.children and not entry.kept:
            heappush(self._leaves, (entry.used, entry.key))
            if len(self._leaves) > 2 * len(self.entries) + 64:
                self._rebuild()

    def _rebuild(self) -> None:
        self._leaves = [(e.used, e.key) for e in self.entries.values() if not e.children and not e.kept]
        heapify(self._leaves)


def listed(path: Path) -> Iterator[Entry]:
    """Every block file in the folders of all identities, in no order; links and other files are not ours.

    Raises OSError when a folder cannot be read.
    """
    for folder in sorted(path.iterdir()):
        if FOLDER.fullmatch(folder.name) is None or not folder.is_dir():
            continue
        for item in os.scandir(folder):
            match = FILE.fullmatch(item.name)
            if match is None:
                continue
            with contextlib.suppress(FileNotFoundError):
                if not item.is_file(follow_symlinks=False):
                    continue
                stat = item.stat(follow_symlinks=False)
                yield Entry(
                    bytes.fromhex(match[1]),
                    bytes.fromhex(match[2]),
                    depth=int(match[3]),
                    folder=folder.name,
                    size=rounded(stat.st_size),
                    used=stat.st_mtime,
                )
