"""How far each running request has got, in memory that outlives the process.

A file mapped into memory belongs to the kernel: what was stored in it before a kill -9 can be read after it.
So a number is stored for every chunk before the chunk is sent, at the cost of a memory write, and whoever
recovers bills what was delivered, plus at most the last chunk that was not sent. A power cut loses what the
kernel had not written back; then the progress last renewed in the database counts.

The process holds a lock on its file. A file without a lock is a dead process's.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
import socket
import struct
from pathlib import Path
from typing import IO

import msgspec

__all__ = ["NOTE_BYTES", "Board", "Progress"]

SLOT = struct.Struct("<40s4qI948s")
"""Reservation id; prompt, cached, cache-write and completion tokens, 8-byte aligned; a note with its length:
1,024 bytes."""
NOTE_BYTES = 948
COUNTS = struct.Struct("<4q")
COMPLETION = struct.Struct("<q")
ID_BYTES = 40
FIRST = 256
"""Slots in a new file; doubled when they are all taken."""


class Progress(msgspec.Struct, frozen=True):
    """Tokens so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    completion_tokens: int = 0
    note: bytes = b""
    """Whatever else was put down when the slot was taken."""


class Board:
    """The file of one process. Not thread-safe, except that ``read_slot`` may be called from anywhere.

    Raises OSError when the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = secrets.token_hex(8)
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{self.name}"
        self.path = folder / f"{self.name}.board"
        self._file: IO[bytes] = self.path.open("x+b")
        try:
            # Locked before it is of any size: an empty file is nobody's to recover.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._fill(FIRST * SLOT.size)
            self._map = mmap.mmap(self._file.fileno(), FIRST * SLOT.size)
        except BaseException:
            self._file.close()
            self.path.unlink()
            raise
        self._free = list(range(FIRST - 1, -1, -1))
        self._slots = FIRST

    def take(self, id: str, prompt_tokens: int, note: bytes = b"") -> int:
        """A slot for a request, from now on recoverable. O(1). Raises OSError when it cannot grow."""
        name = id.encode()
        if not 0 < len(name) <= ID_BYTES:
            raise ValueError(f"{id!r} is no id of a reservation")
        if len(note) > NOTE_BYTES:
            raise ValueError(f"a note of {len(note)} bytes does not fit")
        if not self._free:
            self._grow()
        slot = self._free.pop()
        SLOT.pack_into(self._map, slot * SLOT.size, name, prompt_tokens, 0, 0, 0, len(note), note)
        return slot

    def note(self, slot: int, completion_tokens: int) -> None:
        """Tokens of output that will have been delivered with the next chunk."""
        COMPLETION.pack_into(self._map, slot * SLOT.size + ID_BYTES + 24, completion_tokens)

    def note_prompt(self, slot: int, prompt_tokens: int, cached: int, cache_write: int = 0) -> None:
        """What is known of the prompt by now."""
        done = self.read_slot(slot).completion_tokens
        COUNTS.pack_into(self._map, slot * SLOT.size + ID_BYTES, prompt_tokens, cached, cache_write, done)

    def read_slot(self, slot: int) -> Progress:
        """As last noted."""
        return Progress(*COUNTS.unpack_from(self._map, slot * SLOT.size + ID_BYTES))

    def free(self, slot: int) -> None:
        """Settled for good: nothing to recover."""
        SLOT.pack_into(self._map, slot * SLOT.size, b"", 0, 0, 0, 0, 0, b"")
        self._free.append(slot)

    def close(self, *, remove: bool) -> None:
        """Let go of the lock; ``remove`` the file when nothing in it is owed."""
        self._map.close()
        if remove:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        self._file.close()

    def _grow(self) -> None:
        size = self._slots * 2
        self._fill((size - self._slots) * SLOT.size)
        self._map.resize(size * SLOT.size)
        self._free = list(range(size - 1, self._slots - 1, -1))
        self._slots = size

    def _fill(self, count: int) -> None:
        """Really written, not left as a hole: storing into a hole of a full disk would kill the process."""
        self._file.seek(0, os.SEEK_END)
        self._file.write(bytes(count))
        self._file.flush()

    @staticmethod
    def alive(path: Path) -> bool:
        """Whether a process of this machine holds the file."""
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    @staticmethod
    def read(path: Path) -> dict[str, Progress]:
        """Every request on a board, by reservation id."""
        found: dict[str, Progress] = {}
        raw = path.read_bytes()
        for at in range(0, len(raw) - SLOT.size + 1, SLOT.size):
            name, *counts, length, note = SLOT.unpack_from(raw, at)
            id = name.rstrip(b"\0").decode("utf-8", "replace")
            if id:
                prompt, cached, cache_write, completion = counts
                found[id] = Progress(prompt, cached, cache_write, completion, note[:length])
        return found
