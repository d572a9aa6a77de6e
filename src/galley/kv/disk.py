"""The disk tier's files: KV blocks that survive a restart, bounded in bytes, every read verified.

One file a block, named by its place in the chain: ``<digest>-<parent>-<depth>.kv``, in a folder for each
identity (weights, numerics, layout, RoPE). So the folder's listing alone is the index, a block appears by one
rename and vanishes by one unlink, several processes may share the folder, and after kill -9 at any moment
there is nothing to repair: a file is whole, or has a temporary name. Blocks are not fsynced: after a power
cut a file may be torn, which its checksum tells. Pins, and what they pin, are fsynced.
"""

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from pathlib import Path

import msgspec

from galley.errors import CacheFull
from galley.kv.blockfile import HEADER_BYTES, BlockFile, DamagedError
from galley.kv.figures import DiskStats
from galley.kv.files import fsync_file, fsync_folder, open_plain, read_plain, rounded, sweep, write_whole
from galley.kv.index import Entry, Index, listed
from galley.kv.kept import Kept
from galley.kv.pins import Record, check_name

__all__ = ["DiskStats", "DiskStore"]

log = logging.getLogger(__name__)

PAUSE_S = 30.0
"""After a write that the disk refused, nothing is written for so long."""
COUNTS = ("saved", "loaded", "evicted", "damaged", "refused", "failures", "fault")
STAMP_S = 60.0
"""A file's time follows its use at most so often."""


class DiskStore:
    """Blocks under ``path``, at most ``limit`` bytes of them, least recently used leaf out first.

    Any thread may call it; disk work is done in the caller's thread, and large reads and writes outside the
    lock. Processes that share a folder keep to the limit each by its own count and meet again at ``sync``.

    Args:
        identity: everything that must be equal for a block to be usable; another identity is another folder
            and so a clean miss. None opens the folder only to look after it (``galley cache``).
        clock: Unix seconds.

    Raises OSError when the folder cannot be made or read.
    """

    def __init__(
        self,
        path: Path,
        limit: int,
        *,
        identity: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.limit = limit
        self.clock = clock
        label = msgspec.json.encode(dict(sorted((identity or {}).items())))
        self.identity = blake2b(label, digest_size=32).digest()
        self.folder = self.identity[:16].hex()
        self._own = self.identity[:16]
        self.fault: str | None = None
        self.saved = self.loaded = self.evicted = self.damaged = self.refused = self.failures = 0
        self._lock = threading.RLock()
        self._index = Index()
        self._kept = Kept(path, self._index, limit, clock)
        self._paused_until = 0.0
        self._scratch = 0
        self._token = secrets.token_hex(4)
        self._stamp = -1
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if identity is not None:
            (path / self.folder).mkdir(mode=0o700, exist_ok=True)
        sweep(path, self.clock())
        if identity is not None:
            self._write(path / self.folder / "identity.json", label)
        self.sync()

    # ---- looking

    def has(self, digest: bytes) -> bool:
        """Whether a block of this identity is there. O(1), no disk access."""
        return self._own + digest in self._index.entries

    def stats(self) -> DiskStats:
        """Cheap; any thread."""
        return DiskStats(
            limit=self.limit,
            bytes=self._index.bytes,
            blocks=len(self._index),
            kept_bytes=self._index.kept_bytes,
            **{name: getattr(self, name) for name in COUNTS},
        )

    def entries(self) -> list[Entry]:
        """Every block known, of all identities."""
        with self._lock:
            return list(self._index.entries.values())

    def records(self) -> list[Record]:
        """Pins and unexpired holds, oldest first."""
        with self._lock:
            return self._kept.all()

    def check(self) -> list[str]:
        """What is wrong with the index, in words; for tests. O(n)."""
        with self._lock:
            faults = self._index.check()
            if self._index.bytes > self.limit:
                faults.append(f"{self._index.bytes} bytes, limit {self.limit}")
        return faults

    def room(self, blocks: int, block_bytes: int) -> bool:
        """Whether so many more blocks could be pinned or held now."""
        with self._lock:
            self._kept.expire()
            return self._index.kept_bytes + blocks * rounded(HEADER_BYTES + block_bytes) <= self._kept.most

    # ---- blocks

    def load(self, block: BlockFile, size: int) -> memoryview | None:
        """The block's ``size`` payload bytes, verified; None when it is not there, or not what it must be.

        A damaged file is removed together with its descendants, and counted. O(size).
        """
        entry = self._index.get(self._own + block.digest)
        if entry is None:
            return None
        why = None
        try:
            payload = block.payload(read_plain(self._file(entry), HEADER_BYTES + size), size)
        except FileNotFoundError:
            pass  # another process evicted it
        except (OSError, DamagedError) as error:
            why = str(error)
        else:
            self.loaded += 1
            return payload
        with self._lock:
            if why is not None:
                self.damaged += 1
                log.warning("KV block %s on disk is damaged (%s) and is removed", entry.name, why)
            if self._index.get(entry.key) is entry:
                self._remove(entry)
        return None

    def prefetch(self, digests: Iterable[bytes]) -> None:
        """Tell the system that these blocks are about to be read, so that it reads ahead of ``load``."""
        if not hasattr(os, "posix_fadvise"):
            return
        for digest in digests:
            entry = self._index.get(self._own + digest)
            if entry is not None:
                with contextlib.suppress(OSError):  # advice only: ``load`` finds out what is wrong
                    fd = open_plain(self._file(entry))
                    try:
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
                    finally:
                        os.close(fd)

    def save(self, block: BlockFile, payload: bytes) -> bool:
        """Write one block; True when it is there afterwards. Its parent must be there already.

        False when there is no room beside what is kept, when the parent is missing, and when the disk
        refuses, which is counted, logged and not tried again for ``PAUSE_S``. Raises nothing of the disk's.
        """
        size = rounded(HEADER_BYTES + len(payload))
        entry = Entry(
            block.digest,
            block.parent,
            depth=block.depth,
            folder=self.folder,
            size=size,
            used=self.clock(),
        )
        with self._lock:
            if self.has(block.digest):
                return True
            if not self._index.fits(entry) or self.clock() < self._paused_until:
                return False
            parent = self._index.get(entry.above) if block.depth else None
            if not self._make_room(size, parent):
                self.refused += 1
                return False
        try:
            self._write(self.path / self.folder / entry.name, block.encode(payload))
        except OSError as error:
            self._fail(error)
            return False
        with self._lock:
            if not self._index.fits(entry):
                if not self.has(block.digest):
                    self._unlink(entry)  # the parent went while the file was written
                return self.has(block.digest)
            self._add(entry)
            self.saved += 1
            self.fault = None
        return True

    def touch(self, digest: bytes) -> None:
        """The prefix that ends here was used."""
        with self._lock:
            entry = self._index.get(self._own + digest)
            if entry is None:
                return
            now = self.clock()
            self._index.touch(entry, now)
            late = now - entry.stamped > STAMP_S
            entry.stamped = now if late else entry.stamped
        if late:
            with contextlib.suppress(OSError):  # only the order of eviction after a restart depends on it
                os.utime(self._file(entry), (now, now))

    # ---- what must stay

    def hold(self, digest: bytes, ttl_s: float, *, tokens: int = 0, model: str = "") -> bool:
        """Keep a prefix for at least ``ttl_s`` seconds from now. False when it is not there, or when too much
        is kept already. A later hold of the same prefix may lengthen it, never shorten."""
        now = self.clock()
        with self._lock:
            self._kept.expire()
            leaf = self._index.get(self._own + digest)
            if leaf is None:
                return False
            before = self._kept.held(leaf)
            if before is not None and (before.until or now) >= now + 0.9 * ttl_s:
                return True  # renewed on every use, written only when that makes a difference
            if before is None and not self._kept.room(leaf):
                self.refused += 1
                return False
            record = self._kept.record(leaf.key.hex(), leaf, tokens=tokens, model=model, until=now + ttl_s)
            self._kept.protect(record)
        try:
            self._kept.holds.write(record, sync=False)
        except OSError as error:
            self._fail(error)  # held by this process all the same
        return True

    def pin(self, name: str, digest: bytes, *, tokens: int, model: str, tenant: str, salted: bool) -> Record:
        """Keep a prefix until it is dropped, across restarts and power cuts.

        Raises InvalidRequest for a bad name; CacheFull when the prefix is not on disk, or pins and holds
        would take more than three quarters of the limit; OSError when the disk refuses.
        """
        check_name(name)
        with self._lock:
            self._kept.expire()
            leaf = self._index.get(self._own + digest)
            if leaf is None:
                raise CacheFull("The prefix is not on disk: there was no room for it.", param="kv.disk_bytes")
            old = self._kept.pin(name)
            if old is not None:
                self._kept.release(old)
            chain = list(self._index.up(leaf.key))
            if not self._kept.room(leaf):
                if old is not None:
                    self._kept.protect(old)
                raise self.full(sum(entry.size for entry in chain))
            record = self._kept.record(
                name, leaf, tokens=tokens, model=model, tenant=tenant, salted=salted, until=None
            )
            self._kept.protect(record)
        for entry in chain:
            fsync_file(self._file(entry))
        fsync_folder(self.path / self.folder)
        self._kept.pins.write(record, sync=True)
        return record

    def full(self, wanted: int) -> CacheFull:
        """The error that says how much may be kept, and how much is."""
        return self._kept.full(wanted)

    def drop(self, name: str) -> Record | None:
        """Forget a pin and remove the blocks that nothing else needs. None when there is no such pin.

        Raises OSError when the record cannot be removed.
        """
        with self._lock:
            self.sync()
            record = self._kept.pin(name)
            if record is None:
                return None
            self._kept.forget(record)
            entry = self._index.get(record.key)
            while entry is not None and not entry.children and not entry.kept:
                above = self._index.get(entry.above) if entry.depth else None
                self._remove(entry)
                entry = above
            return record

    def clear(self) -> int:
        """Remove every block, pin and hold, of all models; the bytes that were freed."""
        with self._lock:
            self.sync()
            freed = self._index.bytes
            for record in self._kept.all():
                self._kept.forget(record)
            for entry in [entry for entry in self._index.entries.values() if entry.depth == 0]:
                self._remove(entry)
            return freed

    # ---- the index

    def sync(self) -> None:
        """Read the folder again: what other processes added, removed or pinned. O(files)."""
        with self._lock:
            self._stamp = self._kept.pins.stamp()
            known = dict(self._index.entries)
            found = sorted(listed(self.path), key=lambda entry: entry.depth)
            self._index.clear()
            for entry in found:
                if entry.size <= self.limit and self._index.fits(entry):
                    before = known.get(entry.key)
                    entry.used = max(entry.used, before.used if before is not None else 0.0)
                    self._index.add(entry)
                else:
                    # Its head was removed by hand or by a crash between two unlinks, or no block is so large.
                    self._unlink(entry)
            self._kept.reload()
            while self._index.bytes > self.limit and self._evict():
                pass

    def follow(self) -> None:
        """``sync`` if a pin was set or dropped by another process since. One stat."""
        if self._kept.pins.stamp() != self._stamp:
            self.sync()

    def _add(self, entry: Entry) -> None:
        self._index.add(entry)
        self._kept.changed(entry)  # a kept prefix that had been damaged may be whole again

    def _remove(self, entry: Entry) -> None:
        """Take a block and its descendants out, leaves first, so that a crash leaves no orphan."""
        gone = self._index.remove(entry)
        for each in gone:
            self._unlink(each)
        for each in gone:
            if each.kept:
                self._kept.changed(each)
                break

    def _make_room(self, size: int, parent: Entry | None) -> bool:
        """Evict until ``size`` more bytes fit; what is about to be extended is not evicted for it."""
        self._kept.expire()
        if self._index.bytes + size > self.limit:
            self.follow()
            parent = self._index.get(parent.key) if parent is not None else None
        if parent is not None:
            parent.busy += 1
        try:
            while self._index.bytes + size > self.limit and self._evict():
                pass
        finally:
            if parent is not None:
                parent.busy -= 1
        return self._index.bytes + size <= self.limit

    def _evict(self) -> bool:
        victim = self._index.victim()
        if victim is None:
            return False
        self._remove(victim)
        self.evicted += 1
        return True

    # ---- files

    def _file(self, entry: Entry) -> Path:
        return self.path / entry.folder / entry.name

    def _write(self, file: Path, data: bytes) -> None:
        with self._lock:
            self._scratch += 1
            scratch = file.with_name(f".tmp-{os.getpid()}-{self._token}-{self._scratch}")
        write_whole(file, scratch, data)

    def _unlink(self, entry: Entry) -> None:
        with contextlib.suppress(OSError):  # gone already, or not ours to remove: it is not used either way
            self._file(entry).unlink()

    def _fail(self, error: OSError) -> None:
        with self._lock:
            self.failures += 1
            if self.fault is None:
                log.warning("KV on disk: %s; nothing more is written for %.0f s", error, PAUSE_S)
            self.fault = str(error)
            self._paused_until = self.clock() + PAUSE_S
