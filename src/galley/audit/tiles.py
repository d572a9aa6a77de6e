"""A log on disk in the layout of C2SP tlog-tiles: ``checkpoint``, ``tile/<L>/<N>``, ``tile/entries/<N>``.

Only names, encodings and reading; ``audit.log`` decides what is written when.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from galley.audit.merkle import root
from galley.errors import GalleyError

__all__ = ["HASH", "MOST", "WIDTH", "AuditDamaged", "Tiles", "Tree", "pack", "tile_path", "unpack"]

WIDTH = 256
"""Hashes of a full tile, and entries of a full bundle."""
HASH = 32
"""Bytes of a hash."""
MOST = 65_535
"""Most bytes of an entry: its length is a big-endian uint16."""


class AuditDamaged(GalleyError):
    """The audit log does not agree with itself or with its signed checkpoint."""

    code = "audit_damaged"


def tile_path(level: int | None, index: int, width: int = WIDTH) -> str:
    """``tile/0/x001/234``, ``tile/1/000.p/17``; ``level`` None is a bundle of entries."""
    parts = [f"{index % 1000:03d}"]
    while index >= 1000:
        index //= 1000
        parts.append(f"x{index % 1000:03d}")
    number = "/".join(reversed(parts))
    part = "" if width == WIDTH else f".p/{width}"
    return f"tile/{'entries' if level is None else level}/{number}{part}"


def pack(entries: list[bytes]) -> bytes:
    """A bundle: each entry behind its length as a big-endian uint16."""
    return b"".join(struct.pack(">H", len(entry)) + entry for entry in entries)


def unpack(bundle: bytes, count: int) -> list[bytes]:
    """The first ``count`` entries. Raises AuditDamaged when there are fewer."""
    found: list[bytes] = []
    place = 0
    while len(found) < count:
        length = int.from_bytes(bundle[place : place + 2], "big")
        entry = bundle[place + 2 : place + 2 + length]
        if place + 2 > len(bundle) or len(entry) != length:
            raise AuditDamaged(f"a bundle of {count} entries ends within entry {len(found)}")
        found.append(entry)
        place += 2 + length
    return found


class Tiles:
    """The files below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, level: int | None, index: int, width: int) -> bytes:
        """A tile or bundle; where the partial one is gone, the full one, of which it is the beginning.

        Raises AuditDamaged when neither is there.
        """
        for size in dict.fromkeys((width, WIDTH)):
            try:
                return (self.folder / tile_path(level, index, size)).read_bytes()
            except FileNotFoundError:
                continue
        raise AuditDamaged(f"{self.folder}: {tile_path(level, index, width)} is missing")

    def hashes(self, level: int, index: int, width: int) -> list[bytes]:
        """The first ``width`` hashes of a tile. Raises AuditDamaged."""
        data = self.read(level, index, width)
        if len(data) < width * HASH:
            raise AuditDamaged(f"{self.folder}: {tile_path(level, index, width)} is cut short")
        return [data[i : i + HASH] for i in range(0, width * HASH, HASH)]

    def entries(self, index: int, width: int) -> list[bytes]:
        """The first ``width`` entries of a bundle. Raises AuditDamaged."""
        return unpack(self.read(None, index, width), width)

    def drop_partial(self, level: int | None, index: int) -> None:
        """Remove the partial forms of what is full now."""
        folder = self.folder / (tile_path(level, index) + ".p")
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return
        for name in names:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


class Tree:
    """The first ``size`` entries of a log, as ``merkle.Nodes``. Tiles read are kept in memory.

    Trusts the tiles; who must not, compares the root with a signed checkpoint's.
    """

    def __init__(self, tiles: Tiles, size: int) -> None:
        self.size = size
        self._tiles = tiles
        self._kept: dict[tuple[int, int], list[bytes]] = {}

    def node(self, height: int, index: int) -> bytes:
        """As ``merkle.Nodes``. Raises AuditDamaged."""
        level, part = divmod(height, 8)
        first = index << part
        tile, place = divmod(first, WIDTH)
        return root(self._hashes(level, tile)[place : place + (1 << part)])

    def leaf(self, index: int) -> bytes:
        """Hash of an entry."""
        return self.node(0, index)

    def entry(self, index: int) -> bytes:
        """An entry. Raises AuditDamaged."""
        bundle, place = divmod(index, WIDTH)
        return self._tiles.entries(bundle, min(WIDTH, self.size - bundle * WIDTH))[place]

    def bundles(self) -> Iterator[list[bytes]]:
        """All entries, a bundle at a time. Raises AuditDamaged."""
        for index in range(0, self.size, WIDTH):
            yield self._tiles.entries(index // WIDTH, min(WIDTH, self.size - index))

    def edge(self, level: int) -> list[bytes]:
        """The hashes of the unfinished tile at a level; empty when there is none."""
        tile, width = divmod(self.size >> 8 * level, WIDTH)
        return self._hashes(level, tile) if width else []

    def _hashes(self, level: int, tile: int) -> list[bytes]:
        found = self._kept.get((level, tile))
        if found is None:
            width = min(WIDTH, (self.size >> 8 * level) - tile * WIDTH)
            found = self._kept[level, tile] = self._tiles.hashes(level, tile, width)
        return found
