"""Anything at all in the cache folder: the store opens, gives nothing wrong, and keeps to its limit."""

import contextlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from galley.errors import CacheFull
from galley.kv import chain
from galley.kv.blockfile import HEADER_BYTES, BlockFile
from galley.kv.disk import DiskStore
from tests import fuzz_disk

SPACE = chain.namespace("m", tenant="t")
SIZE = 64
HEX = st.binary(min_size=16, max_size=16).map(bytes.hex)
NAMES = st.one_of(
    st.builds("{}-{}-{}.kv".format, HEX, HEX, st.integers(0, 3)),
    st.builds(".tmp-{}-ab-{}".format, st.integers(0, 10**9), st.integers(0, 9)),
    st.text("abcdef0123456789-.kvtmp", min_size=1, max_size=40).filter(lambda s: s.strip(".")),
)
QUIET = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


def block(store, tokens=(1, 2)):
    root = chain.root(SPACE)
    return BlockFile(
        identity=store.identity,
        digest=chain.extend(root, tokens),
        parent=root,
        proof=chain.Proof(SPACE).push(tokens),
        depth=0,
        tokens=2,
    )


@settings(max_examples=300, **QUIET)
@given(data=st.binary(max_size=2 * (HEADER_BYTES + SIZE)), tail=st.booleans())
def test_any_bytes_under_a_right_name_are_a_miss(tmp_path_factory, data, tail):
    store = DiskStore(tmp_path_factory.mktemp("kv"), 1 << 20, identity={"w": "1"})
    wanted = block(store)
    good = wanted.encode(bytes(SIZE))
    store.save(wanted, bytes(SIZE))
    (file,) = store.path.glob("*/*.kv")
    written = good[: len(good) - len(data)] + data if tail else data
    file.write_bytes(written)
    have = store.load(wanted, SIZE)
    assert have is None or written == good
    assert store.check() == []


@settings(max_examples=150, **QUIET)
@given(names=st.lists(st.tuples(NAMES, st.binary(max_size=64)), max_size=8), own=st.booleans())
def test_any_files_in_the_folder(tmp_path_factory, names, own):
    path = tmp_path_factory.mktemp("kv")
    store = DiskStore(path, 1 << 14, identity={"w": "1"})
    store.save(block(store), bytes(SIZE))
    folder = path / (store.folder if own else "0" * 32)
    folder.mkdir(exist_ok=True)
    for name, data in names:
        (folder / name).write_bytes(data)
    again = DiskStore(path, 1 << 14, identity={"w": "1"})
    assert again.check() == []
    assert again.stats().bytes <= 1 << 14
    have = again.load(block(again), SIZE)
    assert have is None or bytes(have) == bytes(SIZE)


RECORDS = st.one_of(
    st.binary(max_size=60),
    st.fixed_dictionaries(
        {
            "name": st.text(max_size=5),
            "leaf": st.text("0af", max_size=34),
            "folder": st.text("0f", max_size=34),
        },
        optional={
            "until": st.one_of(st.none(), st.floats()),
            "blocks": st.integers(),
            "created": st.floats(),
        },
    ).map(lambda record: json.dumps(record).encode()),
)


@settings(max_examples=150, **QUIET)
@given(records=st.lists(RECORDS, max_size=4), sort=st.sampled_from(["pins", "holds"]))
def test_any_records_of_pins_and_holds(tmp_path_factory, records, sort):
    path: Path = tmp_path_factory.mktemp("kv")
    store = DiskStore(path, 1 << 20, identity={"w": "1"})
    store.save(block(store), bytes(SIZE))
    (path / sort).mkdir()
    for number, data in enumerate(records):
        try:
            name = json.loads(data)["name"]
        except Exception:
            name = str(number)
        if name and "/" not in name and "\x00" not in name:
            (path / sort / f"{name}.json").write_bytes(data)
    again = DiskStore(path, 1 << 20, identity={"w": "1"})
    again.records()
    assert again.check() == []
    assert again.load(block(again), SIZE) is not None


def test_the_fuzz_target_for_a_moment(tmp_path):
    """``python -m tests.fuzz disk`` goes on for as long as one likes."""
    dice = random.Random(20)
    fuzz_disk.fill(tmp_path / "good")
    for turn in range(40):
        folder = tmp_path / str(turn)
        shutil.copytree(tmp_path / "good", folder)
        done = [fuzz_disk.damage(dice, folder) for _ in range(3)]
        with fuzz_disk.alarm(60), contextlib.suppress(CacheFull, OSError):
            assert fuzz_disk.store_turn(dice, folder, done) is None, done


@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "terabyte"])
def test_what_is_no_block_file_is_not_read(tmp_path, kind):
    """A pipe has no end to wait for, a device none to reach; neither may hold up who reads the cache."""
    store = DiskStore(tmp_path, 1 << 20, identity={"w": "1"})
    store.save(block(store), bytes(SIZE))
    (file,) = tmp_path.glob("*/*.kv")
    file.unlink()
    {
        "pipe": lambda: os.mkfifo(file),
        "endless": lambda: file.symlink_to("/dev/zero"),
        "folder": file.mkdir,
        "terabyte": lambda: (file.touch(), os.truncate(file, 1 << 40)),
    }[kind]()
    with fuzz_disk.alarm(60):
        store.prefetch([block(store).digest])
        assert store.load(block(store), SIZE) is None
        again = DiskStore(tmp_path, 1 << 20, identity={"w": "1"})
        again.prefetch([block(again).digest])
        assert again.load(block(again), SIZE) is None
        assert again.check() == [] and again.stats().bytes == 0


def test_a_pipe_in_place_of_a_record_holds_nobody_up(tmp_path):
    for name in ("pins", "holds"):
        (tmp_path / name).mkdir()
        os.mkfifo(tmp_path / name / "p.json")
    with fuzz_disk.alarm(60):
        assert DiskStore(tmp_path, 1 << 20, identity={"w": "1"}).records() == []


def test_a_pipe_in_place_of_the_identity_is_replaced(tmp_path):
    store = DiskStore(tmp_path, 1 << 20, identity={"w": "1"})
    label = tmp_path / store.folder / "identity.json"
    label.unlink()
    os.mkfifo(label)
    with fuzz_disk.alarm(60):
        DiskStore(tmp_path, 1 << 20, identity={"w": "1"})
    assert json.loads(label.read_text()) == {"w": "1"}
