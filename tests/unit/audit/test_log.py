"""The log on disk: layout, durability, and every way in which it can be cut short or tampered with."""

import base64
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from galley.audit import verifier
from galley.audit.log import AuditBusy, AuditLog, AuditUnavailable
from galley.audit.merkle import consistency_path, leaf_hash, root
from galley.audit.note import COSIGNED, BadNote, Checkpoint, Signer, Verifier, parse_checkpoint
from galley.audit.tiles import AuditDamaged, Tiles, Tree, pack, tile_path, unpack
from galley.errors import ConfigError


def entry(number: int, size: int = 40) -> bytes:
    return b'{"id":"%d","pad":"%s","type":"test"}' % (number, b"x" * (number % size))


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return Signer.kept(tmp_path / "log.key", name="example.com/log")


def write(folder: Path, signer: Signer, *sizes: int) -> None:
    """A log with a checkpoint at each of these sizes."""
    log = AuditLog(folder, signer, sync=lambda fd: None)
    for size in sizes:
        log.append([entry(i) for i in range(log.size, size)])
        log.checkpoint()
    log.close()


def test_names_of_tiles() -> None:
    assert tile_path(0, 1234067) == "tile/0/x001/x234/067"
    assert tile_path(1, 0, 17) == "tile/1/000.p/17"
    assert tile_path(None, 1000) == "tile/entries/x001/000"
    assert verifier.name_of("entries", 1234067, 3) == tile_path(None, 1234067, 3)


def test_bundles_round_trip_and_refuse_to_end_early() -> None:
    entries = [b"", b"a", b"b" * 65_535]
    assert unpack(pack(entries), 3) == entries
    with pytest.raises(AuditDamaged, match="ends within entry 2"):
        unpack(pack(entries)[:-1], 3)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 511, 70_000])
def test_layout_is_that_of_the_specification(tmp_path: Path, signer: Signer, size: int) -> None:
    """Widths of every level, as tlog-tiles gives them; 70,000 entries are its own example."""
    log = AuditLog(tmp_path / "a", signer, sync=lambda fd: None)
    while log.size < size:
        log.append([entry(i, 3) for i in range(log.size, min(size, log.size + 4096))])
    signed = log.checkpoint()
    log.close()
    level = 0
    while size >> 8 * level:
        full, part = divmod(size >> 8 * level, 256)
        for index in (0, full - 1):
            assert index < 0 or full == 0 or (tmp_path / "a" / tile_path(level, index)).stat().st_size == 8192
        if part:
            assert (tmp_path / "a" / tile_path(level, full, part)).stat().st_size == part * 32
        else:
            assert not (tmp_path / "a" / (tile_path(level, full) + ".p")).exists()
        level += 1
    assert signed.size == size and verifier.verify_log(tmp_path / "a", signer.vkey, deep=True).size == size
    assert signed.root == root([leaf_hash(entry(i, 3)) for i in range(size)])


def test_partial_tiles_go_once_the_full_one_is_there(tmp_path: Path, signer: Signer) -> None:
    write(tmp_path / "a", signer, 100, 200)
    assert sorted(os.listdir(tmp_path / "a/tile/0/000.p")) == ["100", "200"]
    old = Tree(Tiles(tmp_path / "a"), 100)
    write(tmp_path / "a", signer, 300)
    assert not (tmp_path / "a/tile/0/000.p").exists() and not (tmp_path / "a/tile/entries/000.p").exists()
    assert old.entry(99) == entry(99), "a reader of an earlier checkpoint finds the full bundle"


def test_entries_survive_and_the_tree_goes_on(tmp_path: Path, signer: Signer) -> None:
    write(tmp_path / "a", signer, 3, 260)
    first = parse_checkpoint((tmp_path / "a/checkpoint").read_text())
    write(tmp_path / "a", signer, 700)
    second = parse_checkpoint((tmp_path / "a/checkpoint").read_text())
    tree = Tree(Tiles(tmp_path / "a"), 700)
    path = consistency_path(tree, 260, 700)
    verifier.check_consistency(260, first.root, 700, second.root, path)
    assert [tree.entry(i) for i in (0, 255, 256, 699)] == [entry(i) for i in (0, 255, 256, 699)]


def test_one_writer(tmp_path: Path, signer: Signer) -> None:
    log = AuditLog(tmp_path / "a", signer)
    with pytest.raises(AuditBusy):
        AuditLog(tmp_path / "a", signer)
    log.close()
    log.close()
    AuditLog(tmp_path / "a", signer).close()


def test_too_long_an_entry_is_refused_whole(tmp_path: Path, signer: Signer) -> None:
    log = AuditLog(tmp_path / "a", signer)
    with pytest.raises(ValueError, match="65535"):
        log.append([b"fine", b"x" * 65_536])
    log.append([b"x" * 65_535])
    log.close()
    assert verifier.verify_log(tmp_path / "a", signer.vkey).size == 1


# ---- failures of the disk


class Disk:
    """A ``sync`` that fails, or stops the process, at a given call."""

    def __init__(self, at: int, error: Callable[[], BaseException]) -> None:
        self.left = at
        self.error = error

    def __call__(self, fd: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error()


class Crash(BaseException):
    """The process is gone."""


def test_a_full_disk_loses_nothing_that_was_acknowledged(tmp_path: Path, signer: Signer) -> None:
    """Whatever write fails: what ``append`` returned is there, what it refused is not, and it goes on."""
    for at in range(1, 30, 2):
        disk = Disk(at + 2, lambda: OSError(28, "No space left on device"))  # the first two make the log
        folder = tmp_path / str(at)
        log = AuditLog(folder, signer, sync=disk)
        kept: list[bytes] = []
        for step in range(8):
            batch = [entry(step * 100 + i) for i in range(70)]
            try:
                held = log.append(batch)
                assert [each.index for each in held] == list(range(len(kept), len(kept) + 70))
                kept += batch
                log.checkpoint()
            except AuditUnavailable as error:
                assert error.status == 503 and error.retryable
        log.close()
        assert verifier.verify_log(folder, signer.vkey, deep=False).size == len(kept)
        assert [e for b in Tree(Tiles(folder), len(kept)).bundles() for e in b] == kept


@pytest.mark.parametrize("torn", [False, True])
def test_a_crash_at_any_write_leaves_a_consistent_tree(tmp_path: Path, signer: Signer, torn: bool) -> None:
    """Stopped between any two of entry, tile, checkpoint and truncation; with ``torn`` the file being written
    then is also cut in the middle. Every acknowledged entry is there afterwards, in order."""
    rng = random.Random(7)
    crashes = 0
    for at in range(1, 60, 2):
        folder = tmp_path / str(at)
        kept: list[bytes] = []
        for life, crash_at in enumerate((at, 1 + at // 3, 10_000)):
            disk = Disk(crash_at, Crash)

            def sync(fd: int, disk: Disk = disk) -> None:
                state = os.fstat(fd)
                if torn and disk.left == 1 and stat.S_ISREG(state.st_mode):
                    os.ftruncate(fd, max(0, state.st_size - rng.randrange(1, 200)))
                disk(fd)

            log = None
            try:
                log = AuditLog(folder, signer, sync=sync)
                got = [e for b in Tree(Tiles(folder), log.size).bundles() for e in b]
                assert got[: len(kept)] == kept, (at, life)
                kept = got  # an append that was not acknowledged may have arrived
                for step in range(4):
                    sent = [entry(life * 1000 + step * 100 + i) for i in range(97)]
                    log.append(sent)
                    kept += sent
                    log.checkpoint()
                log.close()
            except Crash:
                crashes += 1
                if log is not None:
                    log._opened.close()  # what the system does for a process that is gone
        assert verifier.verify_log(folder, signer.vkey).size == len(kept)
        shutil.rmtree(folder)
    assert crashes > 40


def test_kill_9_under_load(tmp_path: Path, signer: Signer) -> None:
    """A process killed while it appends: what it had acknowledged is in the log of the next one."""
    program = tmp_path / "writer.py"
    program.write_text(
        textwrap.dedent("""
        import sys
        from pathlib import Path
        from galley.audit.log import AuditLog
        from galley.audit.note import Signer
        log = AuditLog(Path(sys.argv[1]), Signer.kept(Path(sys.argv[2])))
        while True:
            log.append([b'{"id":"%d"}' % i for i in range(log.size, log.size + 37)])
            print(log.size, flush=True)
            if log.unsigned > 100:
                log.checkpoint()
        """)
    )
    rng = random.Random(3)
    size = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, str(program), str(tmp_path / "a"), str(tmp_path / "log.key")],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        for _ in range(rng.randrange(3, 40)):
            size = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
        process.wait()
        process.stdout.close()
        size = int(rest.split()[-1]) if rest.endswith(b"\n") and rest.split() else size
        log = AuditLog(tmp_path / "a", signer)
        assert log.size >= size
        log.close()
        size = log.size
    tree = Tree(Tiles(tmp_path / "a"), size)
    assert [e for b in tree.bundles() for e in b] == [b'{"id":"%d"}' % i for i in range(size)]
    assert verifier.verify_log(tmp_path / "a", signer.vkey).size == size


def test_a_log_that_was_changed_is_not_gone_on_with(tmp_path: Path, signer: Signer) -> None:
    """No inconsistent checkpoint is ever signed."""
    write(tmp_path / "a", signer, 300)
    tile = tmp_path / "a" / tile_path(0, 1, 44)
    good = tile.read_bytes()
    tile.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(AuditDamaged, match="do not make the signed root"):
        AuditLog(tmp_path / "a", signer)
    tile.write_bytes(good)
    bundle = tmp_path / "a" / tile_path(None, 1, 44)
    bundle.write_bytes(bundle.read_bytes().replace(b'"270"', b'"271"'))
    with pytest.raises(AuditDamaged, match="entry 270 is not what was signed"):
        AuditLog(tmp_path / "a", signer)
    (tmp_path / "a/checkpoint").unlink()
    with pytest.raises(AuditDamaged, match="the checkpoint is missing"):
        AuditLog(tmp_path / "a", signer)


def test_a_tail_that_is_damaged_or_has_a_gap_is_not_taken(tmp_path: Path, signer: Signer) -> None:
    log = AuditLog(tmp_path / "a", signer)
    log.append([entry(i) for i in range(5)])
    log._opened.close()
    tail = tmp_path / "a/tail"
    data = tail.read_bytes()
    tail.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
    with pytest.raises(AuditDamaged, match="entry 0"):
        AuditLog(tmp_path / "a", signer)
    tail.write_bytes(data[14 + len(entry(0)) :])
    with pytest.raises(AuditDamaged, match="entry 0 is missing"):
        AuditLog(tmp_path / "a", signer)
    tail.write_bytes(data + b"\0" * 50)
    log = AuditLog(tmp_path / "a", signer)
    assert log.size == 5 and "50 bytes" in log.notes[0]
    log.close()


def test_another_key_or_another_log_is_refused(tmp_path: Path, signer: Signer) -> None:
    write(tmp_path / "a", signer, 3)
    with pytest.raises(BadNote, match="has not signed"):
        AuditLog(tmp_path / "a", Signer.kept(tmp_path / "other.key", name="example.com/log"))


# ---- keys and notes


def test_keys_are_kept_and_named(tmp_path: Path) -> None:
    made = Signer.kept(tmp_path / "k", name="example.com/x")
    again = Signer.kept(tmp_path / "k")
    assert again.vkey == made.vkey and (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    assert Signer.kept(tmp_path / "r").name.startswith("galley-log/")
    with pytest.raises(ConfigError, match="cannot name a log"):
        Signer.kept(tmp_path / "bad", name="a b")
    (tmp_path / "junk").write_text("hello")
    with pytest.raises(BadNote, match="no signing key"):
        Signer.kept(tmp_path / "junk")
    with pytest.raises(BadNote, match="no verifier key"):
        Verifier(made.vkey[:-6] + "AAAA==")


def test_a_note_signed_by_others_verifies() -> None:
    """The example of Go's ``sumdb/note``: key, text and signature were made elsewhere."""
    vkey = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    text = (
        "If you think cryptography is the answer to your problem,\n"
        "then you don't know what your problem is.\n"
    )
    made = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
    signatures = (("PeterNeumann", base64.b64decode(made)),)
    note = Checkpoint(origin="", size=0, root=b"", text=text, signatures=signatures)
    assert Verifier(vkey).check(note) == 0
    head = verifier.Head("", 0, b"", text.encode(), list(signatures))
    assert verifier.check_signature(head, vkey) == 0
    with pytest.raises(BadNote, match="is wrong"):
        Verifier(vkey).check(msgspec.structs.replace(note, text=text + "\n"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("\n\n", "\n"),
        lambda text: text.replace("\n3\n", "\n03\n"),
        lambda text: text.replace("\n3\n", "\n-3\n"),
        lambda text: text.replace("— ", "- "),
        lambda text: text[:-3],
        lambda text: "",
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, signer: Signer, spoil: Callable[[str], str]) -> None:
    text = Checkpoint.written("example.com/log", 3, b"r" * 32)
    made = signer.sign(Checkpoint(origin="example.com/log", size=3, root=b"r" * 32, text=text))
    note = made.note
    assert parse_checkpoint(note) == made
    Verifier(signer.vkey).check(made)
    verifier.check_signature(verifier.read_head(note.encode()), signer.vkey)
    bad = spoil(note)
    with pytest.raises((BadNote, verifier.Wrong)):
        verifier.read_signed(bad.encode(), signer.vkey)
    with pytest.raises(BadNote):
        Verifier(signer.vkey).check(parse_checkpoint(bad))


def test_cosignatures(tmp_path: Path, signer: Signer) -> None:
    witness = Signer.kept(tmp_path / "w.key", name="example.org/witness", kind=COSIGNED)
    text = Checkpoint.written("example.com/log", 3, b"r" * 32)
    made = signer.sign(Checkpoint(origin="example.com/log", size=3, root=b"r" * 32, text=text))
    both = witness.sign(made, seconds=1_700_000_000)
    assert Verifier(witness.vkey).check(both) == 1_700_000_000
    assert verifier.check_signature(verifier.read_head(both.note.encode()), witness.vkey) == 1_700_000_000
    Verifier(signer.vkey).check(both)
    name, raw = both.signatures[1]
    later = both.signed(name, raw)
    moved = Checkpoint(
        origin=later.origin, size=3, root=later.root, text=text,
        signatures=((name, raw[:4] + (1_800_000_000).to_bytes(8, "big") + raw[12:]),),
    )  # fmt: skip
    with pytest.raises(BadNote, match="is wrong"):
        Verifier(witness.vkey).check(moved)


# ---- tampering


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("small")
    signer = Signer.kept(folder / "k", name="example.com/log")
    write(folder / "a", signer, 20, 300)
    return folder / "a", signer.vkey


def files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("lock", "vkey", "tail"):
            yield path


def first_bad(folder: Path, vkey: str) -> int | None:
    with pytest.raises(verifier.Wrong) as caught:
        verifier.verify_log(folder, vkey)
    return caught.value.entry


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """Exhaustive over the bytes of a small log, one bit each: none verifies, and the very entry is named."""
    signer = Signer.kept(tmp_path / "k", name="example.com/log")
    write(tmp_path / "a", signer, 9)
    count = 0
    for path in files(tmp_path / "a"):
        good = path.read_bytes()
        place = owner = 0
        owners = []
        if "entries" in str(path):
            for owner in range(9):
                owners += [owner] * (2 + len(entry(owner)))
        for place in range(len(good)):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
            found = first_bad(tmp_path / "a", signer.vkey)
            if owners and place >= 2 and owners[place] == owners[place - 2]:
                assert found == owners[place], (path, place)
            elif "tile/0" in str(path):
                assert found == place // 32, (path, place)
            count += 1
        path.write_bytes(good)
    assert count > 700
    assert verifier.verify_log(tmp_path / "a", signer.vkey).size == 9


def test_dropped_exchanged_and_cut_entries_are_named(small: tuple[Path, str], tmp_path: Path) -> None:
    """Exhaustive over the entries of a log of two bundles: dropped, exchanged with the next, replaced."""
    shutil.copytree(small[0], tmp_path / "a")
    folder, vkey = tmp_path / "a", small[1]
    for index, width in ((0, 256), (1, 44)):
        path = folder / tile_path(None, index, width)
        good = path.read_bytes()
        entries = unpack(good, width)
        for place in range(0, width, 1 if width < 100 else 5):
            at = index * 256 + place
            path.write_bytes(pack(entries[:place] + entries[place + 1 :]))
            assert first_bad(folder, vkey) == at
            path.write_bytes(pack([*entries[:place], b"{}", *entries[place + 1 :]]))
            assert first_bad(folder, vkey) == at
            path.write_bytes(pack([*entries[: place + 1], b"{}", *entries[place + 1 :]]))
            assert first_bad(folder, vkey) in (at + 1, index * 256 + width - 1)
            if place + 1 < width:
                path.write_bytes(
                    pack([*entries[:place], entries[place + 1], entries[place], *entries[place + 2 :]])
                )
                assert first_bad(folder, vkey) == at
            path.write_bytes(good[: len(pack(entries[:place])) + 1])
            assert first_bad(folder, vkey) == at
        path.write_bytes(good)
    assert verifier.verify_log(folder, vkey).size == 300


def test_a_missing_file_is_named(small: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(small[0], tmp_path / "a")
    for path in list(files(tmp_path / "a")):
        good = path.read_bytes()
        path.unlink()
        needed = path.name != "20"  # partial tiles of an earlier checkpoint may go
        if needed:
            first_bad(tmp_path / "a", small[1])
        path.write_bytes(good)


def test_entries_with_tiles_made_anew_do_not_pass(small: tuple[Path, str], tmp_path: Path) -> None:
    """Whoever can write every file but has not the key: the signed root is another."""
    shutil.copytree(small[0], tmp_path / "a")
    other = Signer.kept(tmp_path / "k", name="example.com/log")
    log = AuditLog(tmp_path / "b", other, sync=lambda fd: None)
    entries = [e for b in Tree(Tiles(small[0]), 300).bundles() for e in b]
    entries[137] = b'{"type":"forged"}'
    log.append(entries)
    log.close()
    shutil.rmtree(tmp_path / "a/tile")
    shutil.copytree(tmp_path / "b/tile", tmp_path / "a/tile")
    first_bad(tmp_path / "a", small[1])
    shutil.copy(tmp_path / "b/checkpoint", tmp_path / "a/checkpoint")
    first_bad(tmp_path / "a", small[1])


def test_going_back_is_found_with_a_checkpoint_noted_earlier(tmp_path: Path, signer: Signer) -> None:
    """A truncated log with its own earlier checkpoint is whole in itself: what was noted outside tells."""
    write(tmp_path / "a", signer, 100)
    shutil.copytree(tmp_path / "a", tmp_path / "old")
    write(tmp_path / "a", signer, 150)
    noted = (tmp_path / "a/checkpoint").read_bytes()
    assert verifier.verify_log(tmp_path / "old", signer.vkey).size == 100
    with pytest.raises(verifier.Wrong, match="had 150 entries and has 100"):
        verifier.verify_log(tmp_path / "old", signer.vkey, seen=[noted])
    # A fork: the key's holder signs another history of the same length and more.
    fork = AuditLog(tmp_path / "old", signer)
    fork.append([b"{}" for _ in range(100)])
    fork.close()
    assert verifier.verify_log(tmp_path / "old", signer.vkey).size == 200
    with pytest.raises(verifier.Wrong, match="first 150 entries are not those signed before"):
        verifier.verify_log(tmp_path / "old", signer.vkey, seen=[noted])
    assert verifier.verify_log(tmp_path / "a", signer.vkey, seen=[noted]).size == 150


def test_tampering_with_a_large_log_is_found(tmp_path: Path, signer: Signer) -> None:
    """Sampled: bytes anywhere in a log of three levels of tiles."""
    log = AuditLog(tmp_path / "a", signer, sync=lambda fd: None)
    while log.size < 66_000:
        log.append([entry(i, 3) for i in range(log.size, min(66_000, log.size + 6000))])
        log.checkpoint()
    log.close()
    rng = random.Random(5)
    report = verifier.verify_log(tmp_path / "a", signer.vkey)
    assert report.size == 66_000 and report.unsigned_bytes == 0
    bundles = sorted(p for p in files(tmp_path / "a") if "entries" in str(p) and ".p" not in str(p))
    for path in rng.sample(bundles, 4):
        good = path.read_bytes()
        place = rng.randrange(len(good))
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x40]) + good[place + 1 :])
        found = first_bad(tmp_path / "a", signer.vkey)
        assert found is not None and tile_path(None, found // 256) in str(path)
        path.write_bytes(good)
    for name in ("tile/1/000", "tile/2/000.p/1"):
        path = tmp_path / "a" / name
        good = path.read_bytes()
        path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        assert first_bad(tmp_path / "a", signer.vkey) == 0
        path.write_bytes(good)


def test_the_standalone_file_verifies_by_itself(small: tuple[Path, str], tmp_path: Path) -> None:
    """Copied away from Galley, run as a program: exit codes 0 and 1."""
    program = tmp_path / "verifier.py"
    shutil.copy(Path(verifier.__file__), program)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", str(program), *words],
            capture_output=True, text=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, check=False,
        )  # fmt: skip

    good = run("log", str(small[0]), "--key", small[1])
    assert good.returncode == 0 and "300 entries verify" in good.stdout, good.stderr
    shutil.copytree(small[0], tmp_path / "a")
    path = tmp_path / "a/tile/entries/000"
    path.write_bytes(path.read_bytes().replace(b'"137"', b'"138"'))
    bad = run("log", str(tmp_path / "a"), "--key", small[1])
    assert bad.returncode == 1 and "entry 137" in bad.stderr
    text = Path(verifier.__file__).read_text()
    assert "import galley" not in text and "from galley" not in text


def test_proofs_in_the_form_of_c2sp(small: tuple[Path, str]) -> None:
    folder, vkey = small
    from galley.audit.merkle import inclusion_path

    tree = Tree(Tiles(folder), 300)
    note = (folder / "checkpoint").read_text()
    path = [base64.b64encode(each).decode() for each in inclusion_path(tree, 137, 300)]
    lines = ["c2sp.org/tlog-proof@v1", "extra " + base64.b64encode(entry(137)).decode(), "index 137", *path]
    text = ("\n".join(lines) + "\n\n" + note).encode()
    index, found, head = verifier.verify_proof(text, vkey)
    assert (index, found, head.size) == (137, entry(137), 300)
    for bad in (
        text.replace(b"index 137", b"index 138"),
        text.replace(path[0].encode() + b"\n", b""),
        text.replace(base64.b64encode(entry(137)), base64.b64encode(entry(138))),
        text.replace(b"c2sp", b"c3sp"),
    ):
        with pytest.raises(verifier.Wrong):
            verifier.verify_proof(bad, vkey)
