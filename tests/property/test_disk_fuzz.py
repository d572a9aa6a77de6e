"""Anything at all in the cache folder: the store opens, gives nothing wrong, and keeps to its limit."""

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from galley.kv import chain
from galley.kv.blockfile import HEADER_BYTES, BlockFile
from galley.kv.disk import DiskStore

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
