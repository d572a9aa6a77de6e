"""Verify a Galley audit log, or one proof from it, with nothing of Galley: this file is all it takes.

    python verifier.py log FOLDER --key VKEY [--seen CHECKPOINT]... [--witness VKEY]... [--deep]
    python verifier.py proof FILE --key VKEY
    python verifier.py consistency FILE --key VKEY

Needs Python 3.11 and, for the signatures, the package ``cryptography``. VKEY is the log's verifier key,
``NAME+ID+KEY``, or a file that holds it; get it from the operator by a way that the log's holder cannot
change. Exit code 0: all of it verifies. 1: it does not, and the first bad entry is named. 2: wrong usage.
RFC 6962 §2.1; C2SP tlog-tiles, tlog-checkpoint, signed-note, tlog-cosignature, tlog-proof; docs/AUDIT.md.
"""

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

WIDTH, HASH = 256, 32
EMPTY = hashlib.sha256(b"").digest()


class Wrong(Exception):
    """Something does not verify. ``entry`` is the first bad entry, where one can be named."""

    def __init__(self, why: str, *, where: str = "", entry: int | None = None) -> None:
        super().__init__(why)
        self.why, self.where, self.entry = why, where, entry

    def __str__(self) -> str:
        place = [] if self.entry is None else [f"entry {self.entry}"]
        return ": ".join([*place, *([self.where] if self.where else []), self.why])


class Head(NamedTuple):
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
    unsigned_bytes: int = 0  # of entries after the checkpoint, which nothing signs yet
    witnesses: dict[str, int] = field(default_factory=dict)  # name, and Unix seconds of the cosignature


def leaf(entry: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + entry).digest()


def node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def join(hashes: Sequence[bytes]) -> bytes:
    """Root of the tree over subtrees of one height."""
    level = list(hashes)
    while len(level) > 1:
        odd = level[-1:] if len(level) % 2 else []
        level = [*map(node, level[::2], level[1::2]), *odd]
    return level[0] if level else EMPTY


def read_head(note: bytes) -> Head:
    text, blank, tail = note.rpartition(b"\n\n")
    lines = text.split(b"\n")
    try:
        found = base64.b64decode(lines[2], validate=True)
        size = int(lines[1])
        marks = [line.split(" ") for line in tail[:-1].decode().split("\n")]
        good = blank and tail.endswith(b"\n") and str(size).encode() == lines[1] and len(found) == HASH
        if not good or any(dash != "—" for dash, _, _ in marks):
            raise ValueError
        signatures = [(name, base64.b64decode(made, validate=True)) for _, name, made in marks]
        return Head(lines[0].decode(), size, found, text + b"\n", signatures)
    except (ValueError, IndexError) as error:
        raise Wrong("this is no signed checkpoint", where="checkpoint") from error


def check_signature(head: Head, vkey: str) -> int | None:
    """The time of a cosignature, 0 for a log's signature, None without one. Raises Wrong for a bad one."""
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
    for made in [made for by, made in head.signatures if by == name and made[:4] == mark]:
        seconds, message, signature = 0, head.text, made[4:]
        if raw[0] == 4:
            seconds, signature = int.from_bytes(made[4:12], "big"), made[12:]
            message = b"cosignature/v1\ntime %d\n%s" % (seconds, head.text)
        try:
            Ed25519PublicKey.from_public_bytes(raw[1:]).verify(signature, message)
        except InvalidSignature:
            raise Wrong(f"the signature of {name} is wrong", where="checkpoint") from None
        return seconds
    return None


def read_signed(note: bytes, vkey: str) -> Head:
    """A checkpoint of this log, signed with its key. Raises Wrong."""
    head, name = read_head(note), vkey.partition("+")[0].strip()
    if check_signature(head, vkey) is None or head.origin != name:
        raise Wrong(f"it is not of the log {name}, or has not its signature", where="checkpoint")
    return head


def check_inclusion(hash: bytes, index: int, size: int, path: list[bytes], root: bytes) -> None:
    """The path of RFC 6962 §2.1.1 leads from the leaf to the root. Raises Wrong."""
    rest = list(path)

    def rise(place: int, width: int) -> bytes:
        if width == 1:
            return hash
        half, beside = 1 << (width - 1).bit_length() - 1, rest.pop()
        if place < half:
            return node(rise(place, half), beside)
        return node(beside, rise(place - half, width - half))

    try:
        good = 0 <= index < size and rise(index, size) == root and not rest
    except IndexError:
        good = False
    if not good:
        raise Wrong("the proof does not lead from the entry to the signed root", entry=index)


def check_consistency(first: int, old: bytes, second: int, new: bytes, path: list[bytes]) -> None:
    """The proof of RFC 6962 §2.1.2: one tree is the beginning of another. Raises Wrong."""
    rest = list(path)

    def rise(was: int, now: int, whole: bool) -> tuple[bytes, bytes]:
        if was == now:
            same = old if whole else rest.pop()
            return same, same
        half, beside = 1 << (now - 1).bit_length() - 1, rest.pop()
        if was <= half:
            a, b = rise(was, half, whole)
            return a, node(b, beside)
        a, b = rise(was - half, now - half, False)
        return node(beside, a), node(beside, b)

    try:
        good = rise(first, second, True) == (old, new) if 0 < first <= second else first == 0 and old == EMPTY
    except IndexError:
        good = False
    if not good or rest:
        raise Wrong(f"the tree of {second} entries does not begin with that of {first}")


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
        if (folder / name).is_file():
            return name, (folder / name).read_bytes(), size == width
    first = index << (8 * level + 8 if isinstance(level, int) else 8)
    raise Wrong("the file is missing", where=name_of(level, index, width), entry=first)


def split_bundle(folder: Path, index: int, width: int) -> tuple[list[bytes], Wrong | None]:
    """The entries of a bundle, as far as it goes, and what is wrong with its form."""
    found: list[bytes] = []
    try:
        name, data, exact = read_file(folder, "entries", index, width)
    except Wrong as wrong:
        return found, wrong
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


@dataclass
class Log:
    """A log's files, read from the first entry to the last.

    All stored tiles are compared with the hashes of the entries, and the root with the signed one. Where they
    differ, tiles that do lead to the signed root say which entry is bad; else the first difference is named.
    """

    folder: Path

    def bundles(self, size: int) -> Iterator[tuple[int, list[bytes], Wrong | None]]:
        for index in range((size + WIDTH - 1) // WIDTH):
            yield index, *split_bundle(self.folder, index, min(WIDTH, size - index * WIDTH))

    def verify(self, head: Head, *, deep: bool = False, sizes: Sequence[int] = ()) -> dict[int, bytes]:
        """Raises Wrong. Returns the roots of the smaller trees asked for by ``sizes``."""
        first: Wrong | None = None
        roots: list[bytes] = []  # of the level-0 tiles; all but the last are complete, and of one height
        parts: dict[int, list[bytes]] = {}
        for index, entries, wrong in self.bundles(head.size):
            hashes = [leaf(entry) for entry in entries]
            first = first or wrong or self._tile(0, index, hashes)
            first = first or (self._deep(index, entries) if deep else None)
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
            return wrong
        wanted = b"".join(hashes)
        if (data if exact else data[: len(wanted)]) == wanted:
            return None
        for number, each in enumerate(hashes):
            if data[number * HASH : number * HASH + HASH] != each:
                return Wrong(
                    "a hash is not that of what is below", where=name, entry=base + (number << 8 * level)
                )
        return Wrong("it goes on after its last hash", where=name, entry=base)

    def _upper(self, hashes: list[bytes]) -> Wrong | None:
        """The tiles of the levels from 1 up, from the roots of the full tiles of level 0."""
        level = 1
        while hashes:
            for index in range((len(hashes) + WIDTH - 1) // WIDTH):
                if wrong := self._tile(level, index, hashes[index << 8 : (index + 1) << 8]):
                    return wrong
            hashes = [join(hashes[i << 8 : (i + 1) << 8]) for i in range(len(hashes) >> 8)]
            level += 1
        return None

    def _blame(self, head: Head) -> Wrong | None:
        """The first entry that the stored tiles contradict, when those do make the signed root."""
        leaves: list[list[bytes]] = []
        for index in range((head.size + WIDTH - 1) // WIDTH):
            width = min(WIDTH, head.size - index * WIDTH)
            try:
                data = read_file(self.folder, 0, index, width)[1]
            except Wrong:
                return None
            leaves.append([data[i : i + HASH] for i in range(0, width * HASH, HASH)])
        if join([join(each) for each in leaves]) != head.root:
            return None
        for index, entries, wrong in self.bundles(head.size):
            for number, hash in enumerate(leaves[index]):
                at = (index << 8) + number
                if number >= len(entries):
                    return wrong
                if leaf(entries[number]) != hash:
                    return Wrong("it is not what was signed", where=name_of("entries", index), entry=at)
        return None

    @staticmethod
    def _deep(index: int, entries: list[bytes]) -> Wrong | None:
        """Every entry is JSON in the one spelling that docs/AUDIT.md gives."""
        for number, entry in enumerate(entries):
            try:
                value = json.loads(entry, parse_float=lambda text: None)
                spelled = json.dumps(
                    value, sort_keys=True, ensure_ascii=False, separators=(",", ":")
                ).encode()
            except ValueError:
                value, spelled = None, b""
            if spelled != entry or not isinstance(value, dict) or "type" not in value:
                at = (index << 8) + number
                return Wrong("it is not canonical JSON", where=name_of("entries", index), entry=at)
        return None


def verify_log(
    folder: Path, vkey: str, *, seen: Sequence[bytes] = (), witnesses: Sequence[str] = (), deep: bool = False
) -> Report:
    """The whole log. ``seen`` are checkpoints noted earlier (or held by a witness): each must be signed by
    the log and be of a beginning of it. Each witness must have cosigned one of them or the present one.
    Raises Wrong, OSError."""
    if not (folder / "checkpoint").is_file():
        raise Wrong("the file is missing", where="checkpoint")
    head = read_signed((folder / "checkpoint").read_bytes(), vkey)
    report = Report(head.origin, head.size, head.root.hex())
    heads = [head]
    for old in [read_signed(text, vkey) for text in seen]:
        if old.size > head.size:
            raise Wrong(f"the log had {old.size} entries and has {head.size}", entry=head.size)
        heads.append(old)
    for witness in witnesses:
        name = witness.partition("+")[0]
        times = [time for each in heads if (time := check_signature(each, witness)) is not None]
        if not times:
            raise Wrong(f"{name} has cosigned none of the checkpoints", where="checkpoint")
        report.witnesses[name] = max(times)
    roots = Log(folder).verify(head, deep=deep, sizes=[old.size for old in heads[1:]])
    for old in heads[1:]:
        if roots[old.size] != old.root:
            raise Wrong(f"the first {old.size} entries are not those signed before", where="checkpoint")
    report.unsigned_bytes = sum(tail.stat().st_size for tail in folder.glob("tail"))
    return report


def verify_proof(text: bytes, vkey: str) -> tuple[int, bytes, Head]:
    """A C2SP tlog-proof whose ``extra`` is the entry itself. Its index and bytes. Raises Wrong."""
    top, blank, note = text.partition(b"\n\n")
    lines = top.split(b"\n")
    try:
        if lines[0] != b"c2sp.org/tlog-proof@v1" or not blank or not lines[1].startswith(b"extra "):
            raise ValueError
        entry = base64.b64decode(lines[1][6:], validate=True)
        word, index = lines[2][:6], int(lines[2][6:])
        path = [base64.b64decode(line, validate=True) for line in lines[3:]]
        if word != b"index " or any(len(each) != HASH for each in path):
            raise ValueError
    except (ValueError, IndexError) as error:
        raise Wrong("this is no proof with its entry", where="proof") from error
    head = read_signed(note, vkey)
    check_inclusion(leaf(entry), index, head.size, path, head.root)
    return index, entry, head


def verify_consistency(text: bytes, vkey: str) -> tuple[Head, Head]:
    """``{"old": CHECKPOINT, "new": CHECKPOINT, "path": [BASE64, …]}``. Raises Wrong."""
    try:
        given: Any = json.loads(text)
        old, new = (read_signed(given[name].encode(), vkey) for name in ("old", "new"))
        path = [base64.b64decode(each, validate=True) for each in given["path"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Wrong("this is no proof of consistency", where="proof") from error
    check_consistency(old.size, old.root, new.size, new.root, path)
    return old, new


def key_of(given: str) -> str:
    """A key as given, or from a file."""
    return given if "+" in given else Path(given).read_text(encoding="utf-8").strip()


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
            seen, keys = [path.read_bytes() for path in given.seen], [key_of(each) for each in given.witness]
            report = verify_log(given.path, key, seen=seen, witnesses=keys, deep=given.deep)
            print(f"{report.origin}: {report.size} entries verify, root {report.root}")
        elif given.what == "proof":
            index, entry, head = verify_proof(given.path.read_bytes(), key)
            print(f"{head.origin}: entry {index} of {head.size} verifies\n{entry.decode()}")
        else:
            old, new = verify_consistency(given.path.read_bytes(), key)
            print(f"{new.origin}: the tree of {new.size} entries begins with that of {old.size}")
    except (Wrong, OSError, ImportError) as error:
        print(f"NOT VERIFIED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
