"""Files that are whole or not there: the few calls the disk tier makes."""

import contextlib
import os
import re
import stat
from pathlib import Path

__all__ = [
    "alive",
    "fsync_file",
    "fsync_folder",
    "open_plain",
    "read_plain",
    "rounded",
    "sweep",
    "write_whole",
]

SCRATCH = re.compile(r"\.tmp-([0-9]{1,10})-[0-9a-f]+-[0-9]+")
"""Name of a file that is being written, with the number of the process that writes it."""


def open_plain(file: Path) -> int:
    """A descriptor to read a plain file by. A link, a pipe or a device is refused: a cache folder has none of
    its own, and reading one might never end. Raises OSError."""
    fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{file.name} is no plain file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_plain(file: Path, most: int) -> bytes:
    """A plain file of at most ``most`` bytes, whole; of a larger one ``most + 1`` bytes, so that the caller
    sees that it is too large without reading it. Raises OSError."""
    with os.fdopen(open_plain(file), "rb", buffering=0) as opened:
        pieces, left = [], most + 1
        while left and (piece := opened.read(left)):
            pieces.append(piece)
            left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def write_whole(file: Path, scratch: Path, data: bytes, *, sync: bool = False) -> None:
    """Write ``data`` to a scratch name and rename it, so that a reader sees all of it or nothing.

    ``sync`` makes it survive a power cut too. Raises OSError, with the scratch file removed.
    """
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        scratch.rename(file)
        if sync:
            fsync_folder(file.parent)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def rounded(size: int) -> int:
    """Bytes a file takes on disk, in pages of 4 KiB."""
    return -(-size // 4096) * 4096


def alive(pid: int) -> bool:
    """Whether a process of that number runs here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # somebody else's, or no number of a process at all
    return True


def fsync_file(file: Path) -> None:
    """Make a file's bytes survive a power cut. Raises OSError."""
    fsync_of(open_plain(file))


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut. Raises OSError."""
    fsync_of(os.open(folder, os.O_RDONLY))


def fsync_of(fd: int) -> None:
    """Sync and close a descriptor. Raises OSError."""
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sweep(path: Path, now: float) -> None:
    """Remove what killed writers left behind in the folders under ``path``."""
    for file in path.glob("*/.tmp-*"):
        match = SCRATCH.fullmatch(file.name)
        with contextlib.suppress(OSError):
            if match is None or not alive(int(match[1])) or now - file.stat().st_mtime > 600.0:
                file.unlink()
