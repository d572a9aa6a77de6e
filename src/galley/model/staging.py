"""Staging: a locked folder in which one pull works, and which the next one may reuse after a crash."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import msgspec

from galley.errors import GalleyError
from galley.model.progress import Progress

CHUNK = 1 << 20
MARK = "source"
"""The file in a staging folder that says what is being fetched."""


def model_name(text: str) -> str:
    """A name for the store made from a file's or a repository's."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:128] or "model"


class PullError(GalleyError):
    """A model could not be fetched from where it was said to be."""

    status = 502
    type = "server_error"
    code = "pull_failed"
    exit_code = 6


class DigestMismatch(PullError):
    """Bytes arrived that are not the ones promised. They are deleted and never used."""

    code = "digest_mismatch"


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """A file in staging (or, for ``file:``, in its own place), complete and verified."""

    path: Path
    sha256: str
    in_place: bool = False
    """The store refers to the file where it is and never deletes it."""
    package_sha256: str | None = None
    revision: str | None = None
    license: str | None = None


class Staging:
    """``with Staging(folder) as staging``: one pull of one source at a time, across processes.

    The kernel drops the lock when the process dies, so a kill -9 leaves files behind but no lock. Child
    processes given ``lock_fd`` hold it too, so that an orphaned download is waited for, not raced.
    """

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder = folder
        self.progress = progress
        self._lock: IO[bytes] | None = None

    @property
    def lock_fd(self) -> int:
        """To be inherited by child processes. Raises ValueError outside the ``with``."""
        if self._lock is None:
            raise ValueError("staging is not locked")
        return self._lock.fileno()

    def __enter__(self) -> Self:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        try:
            self.folder.mkdir(exist_ok=True)
        except BaseException:
            self._lock.close()
            raise
        return self

    def _locked(self) -> IO[bytes]:
        """The lock file, held; again if the pull before removed it between the opening and the locking."""
        told = False
        while True:
            lock = self._lock_path.open("wb")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    self.progress.note("Another pull of this model is under way; waiting for it.")
                told = True
                fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(lock.fileno()).st_ino == self._lock_path.stat().st_ino:
                    return lock
            lock.close()

    @property
    def _lock_path(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.lock"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        # What a pull can go on with stays, however it ended; an empty folder is of no use to anybody.
        if not any(path.name != MARK and path.is_file() for path in self.folder.rglob("*")):
            self.clear()
        if not self.folder.exists():
            self._lock_path.unlink(missing_ok=True)
        self._lock.close()
        self._lock = None

    def clear(self) -> None:
        """Remove what the pull left; called once its result is safely in the store."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def room(self, needed: int) -> None:
        """Raises PullError when the disk has not ``needed`` bytes free."""
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise PullError(
                f"Not enough room at {self.folder}: {needed:,} bytes needed, {free:,} free.",
                hint="galley rm NAME frees some, or set GALLEY_HOME to a larger disk",
            )

    def digest(self, path: Path, title: str) -> str:
        """sha256 of a file, counted as a phase of verified bytes."""
        self.progress.phase(title, path.stat().st_size)
        sha, done = hashlib.sha256(), 0
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                sha.update(chunk)
                done += len(chunk)
                self.progress.advance(done)
        return sha.hexdigest()

    def write(self, chunks: Iterable[bytes], path: Path, *, title: str, total: int) -> str:
        """Write a stream to ``path`` so that it survives a power cut; returns its sha256.

        Starts from zero: what an earlier, killed write left there is not trusted. Raises PullError when the
        stream is not ``total`` bytes long or the disk refuses.
        """
        self.progress.phase(title, total)
        sha, done = hashlib.sha256(), 0
        try:
            with path.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                    sha.update(chunk)
                    done += len(chunk)
                    self.progress.advance(done)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            path.unlink(missing_ok=True)
            raise PullError(f"Could not write {path}: {error}") from error
        if done != total:
            path.unlink(missing_ok=True)
            raise PullError(f"{path.name}: expected {total:,} bytes and got {done:,}.")
        return sha.hexdigest()
