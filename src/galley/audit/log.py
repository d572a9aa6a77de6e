"""The audit log: entries in, tiles and signed checkpoints out, in the layout of C2SP tlog-tiles.

An append writes records to one file, ``tail``, and syncs it; that makes the entries durable, for one sync a
batch. A checkpoint writes the tiles and bundles that the tail's entries belong to, syncs those, signs the new
root, replaces ``checkpoint``, and only then empties the tail. So at every moment the last signed tree plus
the tail is the whole log, and whatever was half written after it is written again from the tail.
"""

import contextlib
import fcntl
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from galley.audit.merkle import leaf_hash, root, span
from galley.audit.note import Checkpoint, Signer, Verifier, parse_checkpoint
from galley.audit.tiles import MOST, WIDTH, AuditDamaged, Tiles, Tree, pack, tile_path
from galley.errors import GalleyError, Overloaded

__all__ = ["AuditBusy", "AuditLog", "AuditUnavailable", "Held"]

HEAD = struct.Struct(">QHI")
"""Before an entry in the tail: its index, its length, and the CRC-32 of both and of the entry."""


class AuditUnavailable(Overloaded):
    """Nothing can be appended to the audit log now. Nothing was."""

    code = "audit_unavailable"


class AuditBusy(GalleyError):
    """Another process writes this log."""

    code = "audit_busy"


class Held(msgspec.Struct, frozen=True):
    """Where an appended entry is."""

    index: int
    leaf: bytes


def record(index: int, entry: bytes) -> bytes:
    """An entry as the tail has it."""
    head = struct.pack(">QH", index, len(entry))
    return HEAD.pack(index, len(entry), zlib.crc32(entry, zlib.crc32(head))) + entry


def records(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Index, entry and end of each whole record. What an append that was cut off left at the end is not
    returned; a record that is whole and wrong raises AuditDamaged."""
    place = 0
    while place < len(data):
        if place + HEAD.size > len(data) or not data[place:].strip(b"\0"):
            return
        index, length, crc = HEAD.unpack_from(data, place)
        entry = data[place + HEAD.size : place + HEAD.size + length]
        if len(entry) < length:
            return
        if zlib.crc32(entry, zlib.crc32(struct.pack(">QH", index, length))) != crc:
            raise AuditDamaged(f"the tail of the audit log is damaged at byte {place}, entry {index}")
        place += HEAD.size + length
        yield index, entry, place


class AuditLog:
    """One log, opened for appending. Not thread-safe: one thread owns it (``audit.scribe``).

    Args:
        folder: of the log; made when it is not there.
        signer: signs the checkpoints; its name is the log's origin.
        sync: makes a file's data durable; tests replace it to fail on purpose.

    Attributes:
        size: entries, those of the tail included. signed: the last checkpoint.
        unsigned: entries since then. notes: what opening had to set right, in words.

    Raises AuditBusy, AuditDamaged (the log does not agree with its last checkpoint), OSError.
    """

    def __init__(self, folder: Path, signer: Signer, *, sync: Callable[[int], None] = os.fdatasync) -> None:
        self.folder = folder
        self.tiles = Tiles(folder)
        self.notes: list[str] = []
        self._signer = signer
        self._sync = sync
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            opened.callback(os.close, self._lock)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise AuditBusy(
                    f"Another process writes the audit log in {folder}.",
                    hint="Give this one a folder of its own: audit.path.",
                ) from error
            self._tail = os.open(folder / "tail", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            opened.callback(os.close, self._tail)
            self._recover()
            self._opened = opened.pop_all()

    # ---- state, and how it comes back

    def _recover(self) -> None:
        data = os.pread(self._tail, os.fstat(self._tail).st_size, 0)
        path = self.folder / "checkpoint"
        self._staged: list[tuple[int | None, int, bytes]] = []
        self._edges: list[list[bytes]] = []
        self._full: list[int] = []
        self._bundle: list[bytes] = []
        if path.exists():
            self._stand_on(parse_checkpoint(path.read_text(encoding="utf-8")))
        elif data or (self.folder / "tile").exists():
            raise AuditDamaged(f"{self.folder}: the checkpoint is missing")
        else:
            self.size = 0
            self.signed = self._sign()
            (self.folder / "vkey").write_text(self._signer.vkey + "\n", encoding="utf-8")
        whole = 0
        before = Tree(self.tiles, self.signed.size)
        for index, entry, end in records(data):
            if index > self.size:
                raise AuditDamaged(f"{self.folder}: entry {self.size} is missing from the tail")
            if index == self.size:
                self._push(entry)
            elif index >= self.signed.size or before.leaf(index) != leaf_hash(entry):
                raise AuditDamaged(f"{self.folder}: the tail has another entry {index}")
            whole = end
        if whole < len(data):
            self.notes.append(f"{len(data) - whole} bytes of an append that was cut off were dropped")
            os.ftruncate(self._tail, whole)
        self._length = whole
        if self.size > self.signed.size or whole:
            self.notes.append(f"{self.size - self.signed.size} entries since the last checkpoint recovered")
            self.checkpoint()

    def _stand_on(self, signed: Checkpoint) -> None:
        """Take up the signed tree, once its right edge is seen to agree with it."""
        Verifier(self._signer.vkey).check(signed)
        if signed.origin != self._signer.name:
            raise AuditDamaged(f"{self.folder}: the checkpoint is of {signed.origin}")
        tree = Tree(self.tiles, signed.size)
        if span(tree, 0, signed.size) != signed.root:
            raise AuditDamaged(
                f"{self.folder}: the tiles do not make the signed root",
                hint="galley audit verify names the first bad entry.",
            )
        self.signed, self.size = signed, signed.size
        level = 0
        while signed.size >> 8 * level:
            self._edges.append(list(tree.edge(level)))
            self._full.append(signed.size >> 8 * (level + 1))
            level += 1
        width = signed.size % WIDTH
        if width:
            self._bundle = self.tiles.entries(signed.size // WIDTH, width)
            for number, (entry, leaf) in enumerate(zip(self._bundle, self._edges[0], strict=True)):
                if leaf_hash(entry) != leaf:
                    raise AuditDamaged(
                        f"{self.folder}: entry {signed.size - width + number} is not what was signed"
                    )

    def _push(self, entry: bytes) -> bytes:
        leaf = leaf_hash(entry)
        self._bundle.append(entry)
        if len(self._bundle) == WIDTH:
            self._staged.append((None, self.size // WIDTH, pack(self._bundle)))
            self._bundle = []
        self.size += 1
        level, hash = 0, leaf
        while True:
            if level == len(self._edges):
                self._edges.append([])
                self._full.append(0)
            edge = self._edges[level]
            edge.append(hash)
            if len(edge) < WIDTH:
                return leaf
            self._staged.append((level, self._full[level], b"".join(edge)))
            self._full[level] += 1
            self._edges[level] = []
            level, hash = level + 1, root(edge)

    # ---- what it is for

    @property
    def unsigned(self) -> int:
        """Entries after the last checkpoint."""
        return self.size - self.signed.size

    def append(self, entries: Sequence[bytes]) -> list[Held]:
        """Make entries durable, all or none, and say where they are. One sync.

        Raises AuditUnavailable when they cannot be written, ValueError for an entry of over 65,535 bytes.
        """
        if any(len(entry) > MOST for entry in entries):
            raise ValueError(f"an entry has more than {MOST} bytes")
        data = b"".join(record(self.size + number, entry) for number, entry in enumerate(entries))
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._tail, rest) :]
            self._sync(self._tail)
        except OSError as error:
            # What did arrive is taken back. Should even that fail, the next append must not go after it.
            os.ftruncate(self._tail, self._length)
            raise AuditUnavailable(f"The audit log cannot be written: {error}", retry_after_s=1.0) from error
        self._length += len(data)
        first = self.size
        return [Held(first + number, self._push(entry)) for number, entry in enumerate(entries)]

    def checkpoint(self) -> Checkpoint:
        """Write tiles and sign the tree as it is. Raises AuditUnavailable; then all of it is tried again by
        the next one, and nothing is lost."""
        try:
            self._write_out()
            self.signed = self._sign()
            os.ftruncate(self._tail, 0)
            self._length = 0
            done, self._staged = self._staged, []
            for level, index, _ in done:
                self.tiles.drop_partial(level, index)
        except OSError as error:
            raise AuditUnavailable(
                f"The audit log's tiles cannot be written: {error}", retry_after_s=1.0
            ) from error
        return self.signed

    def _write_out(self) -> None:
        files = {tile_path(level, index): data for level, index, data in self._staged}
        if self._bundle:
            files[tile_path(None, self.size // WIDTH, len(self._bundle))] = pack(self._bundle)
        for level, edge in enumerate(self._edges):
            # What the last signed tree has already is never touched again.
            if edge and self.signed.size >> 8 * level != self.size >> 8 * level:
                files[tile_path(level, self._full[level], len(edge))] = b"".join(edge)
        folders: set[Path] = set()
        for name, data in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(path, data)
            folders |= {each for each in path.parents if each.is_relative_to(self.folder)}
        for folder in sorted(folders):
            self._sync_folder(folder)

    def _write(self, path: Path, data: bytes) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            self._sync(fd)
        finally:
            os.close(fd)

    def _sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._sync(fd)
        finally:
            os.close(fd)

    def _sign(self) -> Checkpoint:
        """Sign the present tree and put the checkpoint in the place of the last one."""
        made = self.root()
        text = Checkpoint.written(self._signer.name, self.size, made)
        checkpoint = self._signer.sign(
            Checkpoint(origin=self._signer.name, size=self.size, root=made, text=text)
        )
        beside = self.folder / "checkpoint.new"
        self._write(beside, checkpoint.note.encode())
        beside.rename(self.folder / "checkpoint")
        self._sync_folder(self.folder)
        return checkpoint

    def root(self) -> bytes:
        """Root over all entries, those of the tail included. O(log n) hashes a level."""
        lifted: list[bytes] = []
        for edge in self._edges:
            # What is right of a level's full tiles is the last, incomplete subtree of the level above.
            level = [*edge, *lifted]
            lifted = [root(level)] if level else []
        return lifted[0] if lifted else root([])

    def close(self) -> None:
        """Sign what is unsigned and let go of the log. Idempotent. Raises AuditUnavailable; the entries are
        in the tail then, and the next opening signs them."""
        if self._lock < 0:
            return
        try:
            if self.unsigned:
                self.checkpoint()
        finally:
            self._lock = -1
            self._opened.close()
