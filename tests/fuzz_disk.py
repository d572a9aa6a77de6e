"""Damaged cache folders: the ``disk`` target of ``python -m tests.fuzz``.

A good folder is made once. Each turn damages a copy of it in a few places (bits, lengths, names, swapped
files, links, pipes and folders where files should be, records of pins and holds) and puts it through the
store's verbs, with more damage between them; every fiftieth goes under a whole engine instead. What is read
must be what was written, and answers those of a cold engine.
"""

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from galley.errors import GalleyError
from galley.kv import chain
from galley.kv.blockfile import BlockFile
from galley.kv.disk import DiskStore
from galley.runtime.engine import Engine
from galley.runtime.tier import DiskOptions
from tests.faults import kill_cycles
from tests.tiny import tiny_gguf

HANG_S = 30
SIZE, BYTES, LIMIT = 2, 64, 64 * 4096
SPACES = [chain.namespace("m", tenant="a"), chain.namespace("m", tenant="b", salt="s")]
PREFIXES = [tuple((7 * i + k) % 5 for i in range(2 * depth)) for k in range(4) for depth in (1, 3, 6)]
WORDS = (b"", b"{}", b"[]", b"null", b"\xff\xfe", b"\x00" * 5000, b'{"name":"p"}', b'{"leaf":1}')


def payload(space: chain.Namespace, tokens: tuple[int, ...]) -> bytes:
    return blake2b(repr((space, tokens)).encode(), digest_size=BYTES).digest()


def blocks(store: DiskStore, space: chain.Namespace, tokens: tuple[int, ...]) -> Iterator[BlockFile]:
    """The blocks of a prefix, first to last."""
    proof, parent = chain.Proof(space), chain.root(space)
    for place in range(len(tokens) // SIZE):
        piece = tokens[place * SIZE : (place + 1) * SIZE]
        digest = chain.extend(parent, piece)
        yield BlockFile(
            identity=store.identity,
            digest=digest,
            parent=parent,
            proof=proof.push(piece),
            depth=place,
            tokens=SIZE,
        )
        parent = digest


def open_store(path: Path, limit: int = LIMIT) -> DiskStore:
    return DiskStore(path, limit, identity={"weights": "w"})


def fill(path: Path) -> None:
    """A good folder: chains, a pin, a hold, and another identity's blocks."""
    store = open_store(path)
    for space in SPACES:
        for tokens in PREFIXES:
            save(store, space, tokens)
    leaf = list(blocks(store, SPACES[0], PREFIXES[2]))[-1].digest
    store.pin("p", leaf, tokens=12, model="m", tenant="a", salted=False)
    store.hold(list(blocks(store, SPACES[1], PREFIXES[1]))[-1].digest, 3600.0, tokens=6, model="m")
    other = DiskStore(path, LIMIT, identity={"weights": "other"})
    for block in blocks(other, SPACES[0], PREFIXES[0]):
        other.save(block, bytes(BYTES))


def save(store: DiskStore, space: chain.Namespace, tokens: tuple[int, ...]) -> None:
    for place, block in enumerate(blocks(store, space, tokens)):
        if not store.save(block, payload(space, tokens[: (place + 1) * SIZE])):
            return


def put(file: Path, data: bytes | bytearray) -> None:
    """In the place of whatever is there: writing into a pipe would wait for a reader."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        file.unlink()
    file.write_bytes(data)


def damage(dice: random.Random, path: Path) -> str:
    """Spoil one thing in the folder; says what."""
    files = sorted(file for file in path.rglob("*") if file.is_symlink() or not file.is_dir())
    if not files:
        return "nothing left"
    file, other = dice.choice(files), dice.choice(files)
    kind = dice.choice(KINDS)
    try:
        kind(dice, file, other)
    except OSError:
        return f"{kind.__name__}: not to be had"
    return f"{kind.__name__} {file.relative_to(path)} {other.name}"


def flipped(dice: random.Random, file: Path, _: Path) -> None:
    data = bytearray(contents(file))
    for _ in range(dice.choice((1, 1, 3))):
        if data:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    put(file, data)


def header(dice: random.Random, file: Path, _: Path) -> None:
    """A word of the header becomes a number that somebody might multiply or allocate."""
    data = bytearray(contents(file))
    at = 4 * dice.randrange(45)
    if at + 8 <= len(data):
        word = dice.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF))
        data[at : at + 4] = word.to_bytes(4, "little")
    put(file, data)


def cut(dice: random.Random, file: Path, _: Path) -> None:
    os.truncate(file, dice.randrange(max(1, len(contents(file)))))


def longer(dice: random.Random, file: Path, _: Path) -> None:
    """With a hole of up to a tebibyte: whoever reads it whole does not come back."""
    os.truncate(file, dice.choice((4096, 1 << 20, 1 << 40)) + dice.randrange(100))


def swapped(_: random.Random, file: Path, other: Path) -> None:
    data = contents(file)
    put(file, contents(other))
    put(other, data)


def gone(_: random.Random, file: Path, __: Path) -> None:
    file.unlink()


def renamed(dice: random.Random, file: Path, other: Path) -> None:
    """Another name of the right form: digest, parent, depth."""
    parts = file.name.split("-")
    if len(parts) == 3 and file.suffix == ".kv":
        place = dice.randrange(3)
        parts[place] = dice.choice(
            (other.name.split("-")[min(place, other.name.count("-"))], "0" * 32, "9" * 12)
        )
        if place == 2 and not parts[2].endswith(".kv"):
            parts[2] += ".kv"
    file.rename(file.with_name("-".join(parts)))


def linked(dice: random.Random, file: Path, other: Path) -> None:
    file.unlink()
    file.symlink_to(
        dice.choice((other, Path("/dev/zero"), Path("/dev/full"), file, Path("/nowhere"), Path(".")))
    )


def piped(_: random.Random, file: Path, __: Path) -> None:
    """A pipe without a writer: whoever opens it plainly does not come back."""
    file.unlink()
    os.mkfifo(file)


def folder(_: random.Random, file: Path, __: Path) -> None:
    file.unlink()
    file.mkdir()


def stray(dice: random.Random, file: Path, _: Path) -> None:
    name = dice.choice(
        (".tmp-1-ab-1", ".tmp-99999999999-ab-1", "x.json", "-.kv", "ä.kv", "0" * 32, f"{'a' * 32}.kv")
    )
    put(file.with_name(name), dice.choice(WORDS))


def record(dice: random.Random, file: Path, _: Path) -> None:
    """A pin or a hold that is none, or one of something odd."""
    top = file.parents[1] if file.parent.name in ("pins", "holds") else file.parent.parent
    sort = top / dice.choice(("pins", "holds"))
    sort.mkdir(exist_ok=True)
    name = dice.choice(("p", "q", "0" * 64, "a b", ".x"))
    fields: dict[str, Any] = {"name": dice.choice((name, "p", 3, None)), "leaf": "0" * 32, "folder": "f" * 32}
    fields |= {
        dice.choice(("leaf", "folder")): dice.choice(("", "zz", "0" * 31, "0" * 64, 5, file.name[:32]))
    }
    fields |= {"until": dice.choice((None, 0, -1, 1e300, "x")), "blocks": dice.choice((-1, 2**70, "x"))}
    raw = dice.choice((*WORDS, json.dumps(fields).encode(), json.dumps(fields).encode()))
    put(sort / f"{name}.json", raw)


VERBS = ("load", "load", "load", "save", "touch", "pin", "drop", "hold", "sync", "clear", "again", "damage")
KINDS: tuple[Callable[[random.Random, Path, Path], None], ...] = (
    flipped, flipped, header, cut, longer, swapped, gone, renamed, linked, piped, folder, stray, record,
)  # fmt: skip


def contents(file: Path) -> bytes:
    """A plain file's first bytes; nothing of a link, a pipe or a folder."""
    if file.is_symlink() or not file.is_file():
        return b""
    with file.open("rb") as opened:
        return opened.read(1 << 16)


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """TimeoutError when the block takes longer, also out of a system call that waits for ever."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def store_turn(dice: random.Random, path: Path, done: list[str]) -> str | None:
    """One folder through the store's verbs; what is wrong, or None."""
    limit = dice.choice((LIMIT, LIMIT, 16 * 4096))
    store = open_store(path, limit)
    for _ in range(dice.randrange(2, 9)):
        space, tokens = dice.choice(SPACES), dice.choice(PREFIXES)
        leaf = list(blocks(store, space, tokens))[-1].digest
        verb = dice.choice(VERBS)
        done.append(verb)
        if verb == "load":
            store.prefetch(block.digest for block in blocks(store, space, tokens))
            for place, block in enumerate(blocks(store, space, tokens)):
                have = store.load(block, BYTES)
                if have is None:
                    break
                if bytes(have) != payload(space, tokens[: (place + 1) * SIZE]):
                    return "a corrupt read"
        elif verb == "save":
            save(store, space, tokens)
        elif verb == "touch":
            store.touch(leaf)
        elif verb == "pin":
            store.pin(dice.choice("pq"), leaf, tokens=len(tokens), model="m", tenant="", salted=False)
        elif verb == "drop":
            store.drop(dice.choice("pq"))
        elif verb == "hold":
            store.hold(leaf, dice.choice((1.0, 3600.0)))
        elif verb == "sync":
            store.sync()
        elif verb == "clear" and dice.random() < 0.2:
            store.clear()
        elif verb == "again":
            store = open_store(path, limit)
        elif verb == "damage":
            done.append(damage(dice, path))
        store.records()
        # Damage can make what is pinned larger than all that may be kept; then nothing is left to evict.
        over = store.stats().kept_bytes > limit
        if faults := [fault for fault in store.check() if not (over and "limit" in fault)]:
            return f"the index is wrong: {faults}"
    return None


class Whole:
    """An engine over a damaged folder, its answers beside those of a cold one."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny_gguf(folder / "tiny.gguf", types="Q8_0", hidden=64, ffn=96, seed=5)
        self.good = folder / "good"
        self.prompts = kill_cycles.PROMPTS[:6]
        self.answers = self.ask(None)
        self.ask(self.good)

    def ask(self, path: Path | None) -> list[list[int]]:
        """What an engine over this folder says to each prompt."""
        disk = None if path is None else DiskOptions(path=path, limit=1 << 22)
        engine: Engine = kill_cycles.engine_of(self.model, disk)
        said: dict[str, list[int]] = {str(i): [] for i in range(len(self.prompts))}
        ended: set[str] = set()

        def on_step(out: Any) -> None:
            said[out.job_id].extend(out.token_ids)
            if out.last:
                ended.add(out.job_id)

        try:
            for i, prompt in enumerate(self.prompts):
                engine.submit(str(i), prompt, kill_cycles.PARAMS, on_step=on_step)
            until = time.monotonic() + HANG_S
            while len(ended) < len(self.prompts):
                if time.monotonic() > until:
                    raise TimeoutError("the engine does not answer")
                time.sleep(0.001)
            stats = engine.stats()
            if stats.faults or stats.violations:
                raise RuntimeError(f"the engine is not well: {stats}")
        finally:
            engine.close()
            engine.backend.close()
        return list(said.values())


def disk(seconds: float, dice: random.Random) -> tuple[int, str | None, bytes]:
    """Cache folders; how many, what is wrong, and with which damage."""
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        good, bad = Path(place) / "good", Path(place) / "bad"
        fill(good)
        whole = Whole(Path(place))
        count, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            count += 1
            served = count % 50 == 0
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(whole.good if served else good, bad)
            done = [damage(dice, bad) for _ in range(dice.choice((1, 1, 2, 8)))]
            fault = None
            try:
                with alarm(2 * HANG_S):
                    if served:
                        fault = None if whole.ask(bad) == whole.answers else "a wrong answer"
                    else:
                        fault = store_turn(dice, bad, done)
                    seen["served" if served else "read"] += 1
            except (GalleyError, OSError) as error:
                if isinstance(error, TimeoutError):
                    return count, str(error), repr(done).encode()
                seen[type(error).__name__] += 1  # typed, or what the store says it raises
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
            if fault:
                return count, fault, repr(done).encode()
    print(f"folders: {dict(seen)}")
    return count, None, b""
