"""The sidecar file that holds receipts while the database cannot.

One JSON object a line. It is locked with flock while written and while replayed, so that processes sharing a
home lose no line to one another.
"""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from galley.types import Receipt

__all__ = ["Spool", "encode", "tell_stderr"]


def tell_stderr(line: str) -> None:
    """One line to stderr; a closed stderr is not a reason to lose the caller."""
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # nobody is left to tell; the failure is still counted


def encode(receipt: Receipt) -> bytes:
    """A receipt as one line of JSON. Text that is not Unicode (lone surrogates) is stored as ``?``."""
    try:
        return msgspec.json.encode(receipt)
    except UnicodeEncodeError:
        plain = json.dumps(msgspec.to_builtins(receipt), ensure_ascii=False, separators=(",", ":"))
        return plain.encode("utf-8", "replace")


class Spool:
    """``with Spool(path) as spool``: locked, ``spool.receipts`` read; ``drop`` once they are committed."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path = path
        self.receipts: list[Receipt] = []
        self._tell = tell
        self._fd: int | None = None
        self._rejects: list[bytes] = []

    @staticmethod
    def _open(path: Path, flags: int) -> int:
        """Open and lock; again if the file was replayed and unlinked between the two."""
        while True:
            fd = os.open(path, flags, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                if os.fstat(fd).st_ino == path.stat().st_ino:
                    return fd
            except FileNotFoundError:
                pass
            os.close(fd)

    @classmethod
    def append(cls, path: Path, lines: bytes) -> None:
        """Add whole lines and sync them. Raises OSError; then nothing of them is left in the file."""
        fd = cls._open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            size = os.fstat(fd).st_size
            try:
                rest = memoryview(lines)
                while rest:
                    rest = rest[os.write(fd, rest) :]
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)

    @staticmethod
    def read(path: Path) -> list[Receipt]:
        """What lies in the spool now, changing nothing; lines that are no receipts are left out (``drop``
        tells of them). Raises OSError when there is a spool that cannot be read."""
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                lines = file.read().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
                found.append(msgspec.json.decode(line, type=Receipt))
        return found

    def __enter__(self) -> "Spool":
        try:
            self._fd = self._open(self.path, os.O_RDWR)
        except FileNotFoundError:
            return self
        for line in self.path.read_bytes().splitlines():
            try:
                self.receipts.append(msgspec.json.decode(line, type=Receipt))
            except (msgspec.MsgspecError, UnicodeDecodeError):
                self._rejects.append(line)
        return self

    def drop(self) -> None:
        """The receipts are committed: remove the file; lines that were no receipts are put beside it."""
        if self._fd is None:
            return
        if self._rejects:
            beside = self.path.with_suffix(".rejects")
            self._tell(f"galley: {len(self._rejects)} unreadable lines of {self.path} moved to {beside}")
            with beside.open("ab") as file:
                file.write(b"\n".join(self._rejects) + b"\n")
        self.path.unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
