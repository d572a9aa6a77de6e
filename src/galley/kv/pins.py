"""Records of prefixes that must stay: pins (until dropped) and holds (until a time). One small file each."""

import builtins
import contextlib
import os
import re
from pathlib import Path

import msgspec

from galley.errors import InvalidRequest
from galley.kv.files import read_plain, write_whole

__all__ = ["Record", "Records"]

RECORD_BYTES = 16384
"""No record is larger."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One kept prefix.

    Attributes:
        leaf: hex name of its last block. until: Unix seconds, None for a pin.
        blocks, tokens, bytes: its size as it was when kept.
        folder: the store's folder of its weights and numerics.
        model, tenant: for people. salted: whether a cache salt is part of its namespace.
    """

    name: str
    leaf: str
    folder: str
    until: float | None = None
    blocks: int = 0
    tokens: int = 0
    bytes: int = 0
    model: str = ""
    tenant: str = ""
    salted: bool = False
    created: float = 0.0

    @property
    def key(self) -> "builtins.bytes":
        """The leaf's key in the index."""
        return bytes.fromhex(self.folder + self.leaf)


class Records:
    """The records of one folder. Written to a temporary name, synced and renamed: whole or not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def stamp(self) -> int:
        """Changes when a record is added, replaced or removed by any process."""
        try:
            return self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def all(self) -> dict[str, Record]:
        """Every record that can be read, by name. What cannot be read protects nothing and is skipped."""
        found: dict[str, Record] = {}
        for path in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError, ValueError):
                record = msgspec.json.decode(read_plain(path, RECORD_BYTES), type=Record)
                if record.name == path.stem and len(record.key) == 32:
                    found[record.name] = record
        return found

    def write(self, record: Record, *, sync: bool) -> None:
        """Add or replace; ``sync`` makes it survive a power cut too. Raises OSError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = self.folder / f".{record.name}.{os.getpid()}"
        write_whole(self.folder / f"{record.name}.json", scratch, msgspec.json.encode(record), sync=sync)

    def remove(self, name: str) -> None:
        """Forget a record; nothing happens when it is not there. Raises OSError."""
        (self.folder / f"{name}.json").unlink(missing_ok=True)


def check_name(name: str) -> str:
    """A pin's name. Raises InvalidRequest unless 1 to 64 letters, digits, dots, dashes, underscores."""
    if NAME.fullmatch(name) is None:
        raise InvalidRequest(
            f"{name[:80]!r} is no name for a pin: up to 64 letters, digits, dots, dashes and underscores.",
            param="name",
        )
    return name
