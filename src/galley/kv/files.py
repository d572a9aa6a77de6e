"""Files that are whole or not there: the few calls the disk tier makes."""

import os
from pathlib import Path

__all__ = ["alive", "fsync_file", "fsync_folder", "rounded", "write_whole"]


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
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut. Raises OSError."""
    fsync_file(folder)
