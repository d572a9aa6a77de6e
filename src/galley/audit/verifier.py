"""Verify a Galley audit log, or one proof from it, with nothing of Galley: this file is all it takes.

    python verifier.py log FOLDER --key VKEY [--seen CHECKPOINT]... [--witness VKEY]... [--deep]
    python verifier.py proof FILE --key VKEY
    python verifier.py consistency FILE --key VKEY

Needs Python 3.11 and, for the signatures, the package ``cryptography``. VKEY is the log's verifier key,
``NAME+ID+KEY``, or a file that holds it; get it from the operator by a way that the log's holder cannot
change. Exit code 0: all of it verifies. 1: it does not, and the first bad entry is named. 2: wrong usage.

Specifications: RFC 6962 §2.1 and RFC 9162 §2.1.3–2.1.4 (tree and proofs); C2SP tlog-tiles, tlog-checkpoint,
signed-note, tlog-cosignature, tlog-proof. docs/AUDIT.md has the format of an entry.
"""

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDTH, HASH = 256, 32
EMPTY = hashlib.sha256(b"").digest()


class Wrong(Exception):
    """Something does not verify. ``entry`` is the first bad entry, where one can be named."""

    def __init__(self, why: str, *, where: str = "", entry: int | None = None) -> None:
        super().__init__(why)
        self.why, self.where, self.entry = why, where, entry

    def __str__(self) -> str:
        place = f"entry {self.entry}: " if self.entry is not None else ""
        return f"{place}{self.where + ': ' if self.where else ''}{self.why}"


@dataclass
class Head:
    """A checkpoint: the tree it is of, and what was signed."""

    origin: str
    size: int
    root: bytes
    text: bytes
    signatures: list[tuple[str, bytes]]


@dataclass
class Report:
    """What was verified."""

    origin: str = ""
    size: int = 0
    root: str = ""
    unsigned_bytes: int = 0
    """Of entries after the checkpoint, which nothing signs yet."""
    witnesses: dict[str, int] = field(default_factory=dict)
    """Name and Unix seconds of each witness that cosigned."""


def leaf(entry: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + entry).digest()


def join(hashes: Sequence[bytes]) -> bytes:
    """Root of the tree over subtrees of one height."""
    sha, level = hashlib.sha256, list(hashes)
    while len(level) > 1:
        odd = level[-1:] if len(level) % 2 else []
        level = [sha(b"\x01" + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)] + odd
    return level[0] if level else EMPTY


def read_head(note: bytes) -> Head:
    text, blank, tail = note.rpartition(b"\n\n")
    lines = text.split(b"\n")
    try:
        found = base64.b64decode(lines[2], validate=True)
        size = int(lines[1])
        if not blank or not tail.endswith(b"\n") or str(size).encode() != lines[1] or len(found) != HASH:
            raise ValueError
        signatures = []
        for line in tail[:-1].decode().split("\n"):
            dash, name, made = line.split(" ")
            if dash != "—":
                raise ValueError
            signatures.append((name, base64.b64decode(made, validate=True)))
        return Head(lines[0].decode(), size, found, text + b"\n", signatures)
    except (ValueError, IndexError) as error:
        raise Wrong("this is no signed checkpoint", where="checkpoint") from error


def check_signature(head: Head, vkey: str) -> int:
    """Raises Wrong unless the key signed it. The time of a cosignature, else 0."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        name, shown, data = vkey.strip().split("+", 2)
        raw = base64.b64decode(data, validate=True)
        mark = hashlib.sha256(name.encode() + b"\n" + raw).digest()[:4]
        if mark.hex() != shown or len(raw) != 33 or raw[0] not in (1, 4):
            raise ValueError
    except ValueError:
        raise Wrong(f"{vkey[:80]!r} is no verifier key", where="key") from None
    for signed_by, made in head.signatures:
        if signed_by != name or made[:4] != mark:
            continue
        seconds, message, signature = 0, head.text, made[4:]
        if raw[0] == 4:
            seconds, signature = int.from_bytes(made[4:12], "big"), made[12:]
            message = b"cosignature/v1\ntime %d\n%s" % (seconds, head.text)
        try:
            Ed25519PublicKey.from_public_bytes(raw[1:]).verify(signature, message)
        except InvalidSignature:
            raise Wrong(f"the signature of {name} is wrong", where="checkpoint") from None
        return seconds
    raise Wrong(f"{name} has not signed this", where="checkpoint")


def check_origin(head: Head, vkey: str) -> None:
    if head.origin != vkey.partition("+")[0].strip():
        raise Wrong(f"it is of another log, {head.origin}", where="checkpoint")


def check_inclusion(hash: bytes, index: int, size: int, path: list[bytes], root: bytes) -> None:
    """RFC 9162 §2.1.3.2. Raises Wrong."""
    bad = Wrong("the proof does not lead from the entry to the signed root", entry=index)
    if not 0 <= index < size:
        raise bad
    place, last = index, size - 1
    for each in path:
        if last == 0:
            raise bad
        if place % 2 or place == last:
            hash = hashlib.sha256(b"\x01" + each + hash).digest()
            while not place % 2 and place:
                place, last = place >> 1, last >> 1
        else:
            hash = hashlib.sha256(b"\x01" + hash + each).digest()
        place, last = place >> 1, last >> 1
    if last or hash != root:
        raise bad


def check_consistency(first: int, old: bytes, second: int, new: bytes, path: list[bytes]) -> None:
    """RFC 9162 §2.1.4.2: one tree is the beginning of another. Raises Wrong."""
    bad = Wrong(f"the tree of {second} entries does not begin with that of {first}")
    if (
        first > second
        or (first == second and (path or old != new))
        or (first == 0 and (path or old != EMPTY))
    ):
        raise bad
    if first in (0, second):
        return
    steps = list(path)
    if first & (first - 1) == 0:
        steps.insert(0, old)
    if not steps:
        raise bad
    place, last = first - 1, second - 1
    while place % 2:
        place, last = place >> 1, last >> 1
    was = now = steps[0]
    for each in steps[1:]:
        if last == 0:
            raise bad
        if place % 2 or place == last:
            was = hashlib.sha256(b"\x01" + each + was).digest()
            now = hashlib.sha256(b"\x01" + each + now).digest()
            while not place % 2 and place:
                place, last = place >> 1, last >> 1
        else:
            now = hashlib.sha256(b"\x01" + now + each).digest()
        place, last = place >> 1, last >> 1
    if last or was != old or now != new:
        raise bad


def name_of(level: int | str, index: int, width: int = WIDTH) -> str:
    number = f"{index % 1000:03d}"
    while index >= 1000:
        index //= 1000
        number = f"x{index % 1000:03d}/{number}"
    return f"tile/{level}/{number}" + ("" if width == WIDTH else f".p/{width}")


def read_file(folder: Path, level: int | str, index: int, width: int) -> tuple[str, bytes, bool]:
    """Name and bytes of a tile, and whether it is exactly as wide as asked for."""
    for size in dict.fromkeys((width, WIDTH)):
        name = name_of(level, index, size)
        try:
            return name, (folder / name).read_bytes(), size == width
        except FileNotFoundError:
            continue
    raise Wrong("the file is missing", where=name_of(level, index, width), entry=index << 8)


def split_bundle(folder: Path, index: int, width: int) -> tuple[list[bytes], Wrong | None]:
    """The entries of a bundle, as far as it goes, and what is wrong with its form."""
    try:
        name, data, exact = read_file(folder, "entries", index, width)
    except Wrong as wrong:
        return [], wrong
    found: list[bytes] = []
    place, end = 0, len(data)
    while len(found) < width:
        stop = place + 2 + (data[place] << 8 | data[place + 1] if place + 2 <= end else 0)
        if place + 2 > end or stop > end:
            return found, Wrong("it ends too early", where=name, entry=(index << 8) + len(found))
        found.append(data[place + 2 : stop])
        place = stop
    if exact and place < end:
        return found, Wrong("it goes on after its last entry", where=name, entry=(index << 8) + width - 1)
    return found, None


class Log:
    """A log's files, read from the first entry to the last.

    All stored tiles are compared with the hashes of the entries, and the root with the signed one. Where they
    differ, the tiles that do lead to the signed root say which entry is the first bad one; where no stored
    hashes lead there, the first entry at which anything differs is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def bundles(self, size: int) -> Iterator[tuple[int, list[bytes], Wrong | None]]:
        for index in range((size + WIDTH - 1) // WIDTH):
            yield index, *split_bundle(self.folder, index, min(WIDTH, size - index * WIDTH))

    def verify(self, head: Head, *, deep: bool = False, sizes: Sequence[int] = ()) -> dict[int, bytes]:
        """Raises Wrong. Returns the roots of the smaller trees asked for by ``sizes``."""
        sha = hashlib.sha256
        first: Wrong | None = None
        roots: list[bytes] = []  # of the level-0 tiles; all but the last are complete, and of one height
        parts: dict[int, list[bytes]] = {}
        for index, entries, wrong in self.bundles(head.size):
            hashes = [sha(b"\x00" + entry).digest() for entry in entries]
            first = first or wrong or self._tile(0, index, hashes)
            if deep:
                first = first or self._deep(index, entries)
            for size in sizes:
                if size // WIDTH == index and size % WIDTH:
                    parts[size] = [join(hashes[: size % WIDTH])]
            roots.append(join(hashes))
        first = first or self._upper(roots[: head.size // WIDTH])
        if join(roots) != head.root:
            raise self._blame(head) or first or Wrong("the entries do not make the signed root", entry=0)
        if first is not None:
            raise first
        return {size: join([*roots[: size // WIDTH], *parts.get(size, [])]) for size in sizes}

    def _tile(self, level: int, index: int, hashes: list[bytes]) -> Wrong | None:
        """A stored tile against the hashes it must hold."""
        base = index << 8 * (level + 1)
        try:
            name, data, exact = read_file(self.folder, level, index, len(hashes))
        except Wrong as wrong:
            return Wrong(wrong.why, where=wrong.where, entry=base)
        wanted = b"".join(hashes)
        if (data if exact else data[: len(wanted)]) == wanted:
            return None
        for number, each in enumerate(hashes):
            if data[number * HASH : number * HASH + HASH] != each:
                below = "of the tile below" if level else "of the entry"
                return Wrong(f"a hash is not that {below}", where=name, entry=base + (number << 8 * level))
        return Wrong("it goes on after its last hash", where=name, entry=base)

    def _upper(self, hashes: list[bytes]) -> Wrong | None:
        """The tiles of the levels from 1 up, from the roots of the full tiles of level 0."""
        level = 1
        while hashes:
            for index in range((len(hashes) + WIDTH - 1) // WIDTH):
                wrong = self._tile(level, index, hashes[index << 8 : (index + 1) << 8])
                if wrong is not None:
                    return wrong
            hashes = [join(hashes[i << 8 : (i + 1) << 8]) for i in range(len(hashes) >> 8)]
            level += 1
        return None

    def _blame(self, head: Head) -> Wrong | None:
        """The first entry that the stored tiles contradict, when those do make the signed root."""
        leaves: list[list[bytes]] = []
        try:
            for index in range((head.size + WIDTH - 1) // WIDTH):
                width = min(WIDTH, head.size - index * WIDTH)
                data = read_file(self.folder, 0, index, width)[1]
                leaves.append([data[i : i + HASH] for i in range(0, width * HASH, HASH)])
        except Wrong:
            return None
        if join([join(each) for each in leaves]) != head.root:
            return None
        for index, entries, wrong in self.bundles(head.size):
            for number, hash in enumerate(leaves[index]):
                if number >= len(entries):
                    return wrong
                if leaf(entries[number]) != hash:
                    at = (index << 8) + number
                    return Wrong("it is not what was signed", where=name_of("entries", index), entry=at)
        return None

    def _deep(self, index: int, entries: list[bytes]) -> Wrong | None:
        """Every entry is JSON in the one spelling that docs/AUDIT.md gives."""
        for number, entry in enumerate(entries):
            try:
                value = json.loads(entry, parse_float=lambda text: None)
                spelled = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
                if spelled.encode() != entry or not isinstance(value, dict) or "type" not in value:
                    raise ValueError
            except ValueError:
                at = (index << 8) + number
                return Wrong("it is not canonical JSON", where=name_of("entries", index), entry=at)
        return None


def verify_log(
    folder: Path,
    vkey: str,
    *,
    seen: Sequence[bytes] = (),
    witnesses: Sequence[str] = (),
    deep: bool = False,
) -> Report:
    """The whole log. ``seen`` are checkpoints noted earlier (or held by a witness): each must be signed by
    the log and be of a beginning of it. Each witness must have cosigned one of them or the present one.
    Raises Wrong, OSError."""
    try:
        note = (folder / "checkpoint").read_bytes()
    except FileNotFoundError:
        raise Wrong("the file is missing", where="checkpoint") from None
    head = read_head(note)
    check_signature(head, vkey)
    check_origin(head, vkey)
    report = Report(head.origin, head.size, head.root.hex())
    heads = [head]
    for text in seen:
        old = read_head(text)
        check_signature(old, vkey)
        check_origin(old, vkey)
        if old.size > head.size:
            raise Wrong(f"the log had {old.size} entries and has {head.size}", entry=head.size)
        heads.append(old)
    for witness in witnesses:
        times = []
        for each in heads:
            try:
                times.append(check_signature(each, witness))
            except Wrong as wrong:
                if "not signed" not in wrong.why:
                    raise
        if not times:
            raise Wrong(
                f"{witness.partition('+')[0]} has cosigned none of the checkpoints", where="checkpoint"
            )
        report.witnesses[witness.partition("+")[0]] = max(times)
    roots = Log(folder).verify(head, deep=deep, sizes=[old.size for old in heads[1:]])
    for old in heads[1:]:
        if roots[old.size] != old.root:
            raise Wrong(f"the first {old.size} entries are not those signed before", where="checkpoint")
    tail = folder / "tail"
    report.unsigned_bytes = tail.stat().st_size if tail.exists() else 0
    return report


def verify_proof(text: bytes, vkey: str) -> tuple[int, bytes, Head]:
    """A C2SP tlog-proof whose ``extra`` is the entry itself. Its index and bytes. Raises Wrong."""
    top, blank, note = text.partition(b"\n\n")
    lines = top.split(b"\n")
    try:
        if lines[0] != b"c2sp.org/tlog-proof@v1" or not blank or not lines[1].startswith(b"extra "):
            raise ValueError
        entry = base64.b64decode(lines[1][6:], validate=True)
        word, number = lines[2].split(b" ")
        path = [base64.b64decode(line, validate=True) for line in lines[3:]]
        if word != b"index" or any(len(each) != HASH for each in path):
            raise ValueError
        index = int(number)
    except (ValueError, IndexError) as error:
        raise Wrong("this is no proof with its entry", where="proof") from error
    head = read_head(note)
    check_signature(head, vkey)
    check_origin(head, vkey)
    check_inclusion(leaf(entry), index, head.size, path, head.root)
    return index, entry, head


def verify_consistency(text: bytes, vkey: str) -> tuple[Head, Head]:
    """``{"old": CHECKPOINT, "new": CHECKPOINT, "path": [BASE64, …]}``. Raises Wrong."""
    try:
        given: Any = json.loads(text)
        old, new = read_head(given["old"].encode()), read_head(given["new"].encode())
        path = [base64.b64decode(each, validate=True) for each in given["path"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Wrong("this is no proof of consistency", where="proof") from error
    for head in (old, new):
        check_signature(head, vkey)
        check_origin(head, vkey)
    check_consistency(old.size, old.root, new.size, new.root, path)
    return old, new


def key_of(given: str) -> str:
    """A key as given, or from a file."""
    path = Path(given)
    return given if "+" in given else path.read_text(encoding="utf-8").strip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Verify a Galley audit log, or a proof from one.")
    parser.add_argument("what", choices=["log", "proof", "consistency"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--key", required=True, help="the log's verifier key, or a file with it")
    parser.add_argument("--seen", action="append", default=[], type=Path, help="a checkpoint noted earlier")
    parser.add_argument("--witness", action="append", default=[], help="a witness's verifier key")
    parser.add_argument("--deep", action="store_true", help="also check that every entry is canonical JSON")
    given = parser.parse_args(argv)
    try:
        key = key_of(given.key)
        if given.what == "log":
            seen = [path.read_bytes() for path in given.seen]
            keys = [key_of(each) for each in given.witness]
            report = verify_log(given.path, key, seen=seen, witnesses=keys, deep=given.deep)
            print(f"{report.origin}: {report.size} entries verify, root {report.root}")
        elif given.what == "proof":
            index, entry, head = verify_proof(given.path.read_bytes(), key)
            print(f"{head.origin}: entry {index} of {head.size} verifies\n{entry.decode()}")
        else:
            old, new = verify_consistency(given.path.read_bytes(), key)
            print(f"{new.origin}: the tree of {new.size} entries begins with that of {old.size}")
    except Wrong as wrong:
        print(f"NOT VERIFIED: {wrong}", file=sys.stderr)
        return 1
    except (OSError, ImportError) as error:
        print(f"NOT VERIFIED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
