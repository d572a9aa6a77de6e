"""The disk store: bounded, verified, leaf first, shared by processes, and what pins and holds keep."""

import os
import threading
import time
from hashlib import blake2b

import pytest

from galley.errors import CacheFull, InvalidRequest
from galley.kv import chain
from galley.kv.blockfile import HEADER_BYTES, BlockFile
from galley.kv.disk import PAUSE_S, DiskStore
from galley.kv.files import alive

B, PAYLOAD = 4, 5000
FILE = 8192
"""Bytes of one block on disk: header and payload in pages."""
SPACE = chain.namespace("m", tenant="local")
IDENTITY = {"weights": "w", "kv_dtype": "f16", "rope": "10000"}


class Clock:
    def __init__(self):
        self.now = time.time()

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def open_store(tmp_path, clock):
    def build(limit=100 * FILE, identity=IDENTITY):
        return DiskStore(tmp_path / "kv", limit, identity=identity, clock=clock)

    return build


def blocks(store, tokens, space=SPACE):
    """The block files of a prompt, with the payload each ought to hold."""
    proof, parent, found = chain.Proof(space), chain.root(space), []
    for place in range(len(tokens) // B):
        piece = tokens[place * B : (place + 1) * B]
        name = chain.extend(parent, piece)
        block = BlockFile(
            identity=store.identity,
            digest=name,
            parent=parent,
            proof=proof.push(piece),
            depth=place,
            tokens=B,
        )
        found.append((block, payload(space, tokens[: (place + 1) * B])))
        parent = name
    return found


def payload(space, tokens):
    seed = blake2b(repr((space, tuple(tokens))).encode()).digest()
    return (seed * (PAYLOAD // len(seed) + 1))[:PAYLOAD]


def keep(store, tokens, space=SPACE):
    return [store.save(block, data) for block, data in blocks(store, tokens, space)]


def found(store, tokens, space=SPACE):
    """How many blocks come back, all of them right."""
    count = 0
    for block, data in blocks(store, tokens, space):
        have = store.load(block, PAYLOAD)
        if have is None:
            break
        assert bytes(have) == data
        count += 1
    return count


def test_what_was_written_comes_back_after_a_restart(open_store):
    store = open_store()
    assert keep(store, range(12)) == [True] * 3
    assert found(store, range(12)) == 3
    again = open_store()
    assert found(again, range(12)) == 3
    assert again.stats().bytes == 3 * FILE
    assert again.check() == []


@pytest.mark.parametrize("key", ["weights", "kv_dtype", "rope"])
def test_kv5_kv10_another_identity_is_a_clean_miss(open_store, key):
    keep(open_store(), range(12))
    other = open_store(identity=IDENTITY | {key: "other"})
    assert found(other, range(12)) == 0
    assert other.stats().damaged == 0
    assert found(open_store(), range(12)) == 3


def test_kv5_a_file_of_another_identity_under_the_right_name_is_refused(open_store, tmp_path):
    other = open_store(identity=IDENTITY | {"weights": "other"})
    keep(other, range(4))
    store = open_store()
    (file,) = (tmp_path / "kv" / other.folder).glob("*.kv")
    file.rename(tmp_path / "kv" / store.folder / file.name)
    store.sync()
    assert found(store, range(4)) == 0
    assert store.stats().damaged == 1


def test_kv5_namespaces_do_not_share_on_disk(open_store):
    store = open_store()
    keep(store, range(8), chain.namespace("m", tenant="a"))
    for space in (
        chain.namespace("m", tenant="b"),
        chain.namespace("m", tenant="a", salt="s"),
        chain.namespace("n", tenant="a"),
        chain.namespace("m", tenant="a", epoch=1),
    ):
        assert found(store, range(8), space) == 0


def test_kv5_a_collision_of_names_is_a_miss_and_not_a_wrong_read(open_store, monkeypatch):
    """One bit of hash: every name is one of two, and still no wrong payload is ever returned."""
    monkeypatch.setattr(chain, "extend", lambda parent, tokens: bytes(15) + bytes([sum(tokens) % 2]))
    store = open_store()
    prompts = [[a, b, c, d] for a in range(3) for b in range(2) for c in range(2) for d in range(2)]
    for tokens in prompts:
        keep(store, tokens)
    assert sum(found(store, tokens) for tokens in prompts) <= 2
    assert store.stats().damaged > 0


@pytest.mark.parametrize("where", [0, 9, 40, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + PAYLOAD - 1])
def test_a_flipped_bit_is_a_miss_and_takes_the_descendants_along(open_store, tmp_path, where):
    store = open_store()
    keep(store, range(12))
    (file,) = (tmp_path / "kv" / store.folder).glob("*-1.kv")
    data = bytearray(file.read_bytes())
    data[where] ^= 4
    file.write_bytes(data)
    assert found(store, range(12)) == 1
    assert not file.exists()
    assert store.stats().blocks == 1
    assert store.stats().damaged == 1
    assert store.check() == []
    assert keep(store, range(12)) == [True] * 3
    assert found(store, range(12)) == 3


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + PAYLOAD - 1])
def test_a_torn_tail_is_a_miss(open_store, tmp_path, length):
    store = open_store()
    keep(store, range(8))
    (file,) = (tmp_path / "kv" / store.folder).glob("*-1.kv")
    os.truncate(file, length)
    again = open_store()
    assert found(again, range(8)) == 1
    assert again.check() == []


def test_kv7_least_recently_used_leaf_goes_first_and_never_a_parent(open_store, clock):
    store = open_store(limit=4 * FILE)
    keep(store, [*range(8)])
    clock.now += 1
    keep(store, [0, 1, 2, 3, 90, 91, 92, 93])
    clock.now += 1
    store.touch(blocks(store, range(8))[-1][0].digest)
    clock.now += 1
    keep(store, [50, 51, 52, 53, 54, 55, 56, 57])
    assert found(store, range(8)) == 2
    assert found(store, [0, 1, 2, 3, 90, 91, 92, 93]) == 1
    assert found(store, [50, 51, 52, 53, 54, 55, 56, 57]) == 2
    assert store.stats().evicted == 1
    assert store.check() == []


def test_kv7_a_block_is_not_evicted_to_make_room_for_its_child(open_store):
    store = open_store(limit=2 * FILE)
    assert keep(store, range(12)) == [True, True, False]
    assert found(store, range(12)) == 2
    assert store.stats().refused == 1


def test_the_order_of_use_survives_a_restart(open_store, clock):
    store = open_store(limit=2 * FILE)
    keep(store, [1] * 4)
    keep(store, [2] * 4)
    clock.now += 100
    store.touch(blocks(store, [1] * 4)[0][0].digest)
    again = open_store(limit=2 * FILE)
    keep(again, [3] * 4)
    assert found(again, [1] * 4) == 1
    assert found(again, [2] * 4) == 0


def test_a_smaller_limit_is_kept_from_the_start(open_store):
    keep(open_store(), range(40))
    store = open_store(limit=3 * FILE)
    assert store.stats().bytes == 3 * FILE
    assert found(store, range(40)) == 3


def test_orphans_and_leftovers_are_swept(open_store, tmp_path):
    store = open_store()
    keep(store, range(12))
    folder = tmp_path / "kv" / store.folder
    next(folder.glob("*-0.kv")).unlink()
    dead = next(pid for pid in range(99_999, 1_000_000) if not alive(pid))
    (folder / f".tmp-{dead}-abcd-1").write_bytes(b"half")
    (folder / "README").write_text("mine")
    again = open_store()
    assert again.stats().blocks == 0
    assert sorted(file.name for file in folder.iterdir()) == ["README", "identity.json"]


def test_a_disk_that_refuses_is_counted_and_left_alone_for_a_while(open_store, clock, monkeypatch):
    store = open_store()
    real = os.write

    def full(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    assert keep(store, range(8)) == [False, False]
    assert store.stats().failures == 1
    assert "No space" in store.stats().fault
    monkeypatch.setattr(os, "write", real)
    assert keep(store, range(8)) == [False, False]
    clock.now += PAUSE_S + 1
    assert keep(store, range(8)) == [True, True]
    assert store.stats().fault is None
    assert [file.name for file in store.path.glob("*/.tmp*")] == []


def test_two_processes_share_a_folder(open_store):
    a, b = open_store(), open_store()
    keep(a, range(8))
    assert found(b, range(8)) == 0
    b.sync()
    assert found(b, range(8)) == 2
    a.clear()
    assert found(b, range(8)) == 0
    assert b.stats().damaged == 0
    assert b.check() == []


def test_threads_write_and_read_at_once(open_store):
    store = open_store(limit=12 * FILE)
    prompts = [[n] * 12 for n in range(8)]
    wrong = []

    def work(seed):
        try:
            for turn in range(30):
                tokens = prompts[(seed + turn) % 8]
                keep(store, tokens)
                found(store, tokens)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.check() == []
    assert store.stats().damaged == 0


# ---- pins and holds


def pin(store, name, tokens, space=SPACE):
    leaf = blocks(store, tokens, space)[-1][0].digest
    return store.pin(name, leaf, tokens=len(tokens), model="m", tenant="local", salted=False)


def test_a_pin_survives_eviction_and_restart_until_it_is_dropped(open_store):
    store = open_store(limit=8 * FILE)
    keep(store, range(16))
    record = pin(store, "system", range(16))
    assert (record.blocks, record.bytes, record.tokens) == (4, 4 * FILE, 16)
    for n in range(20):
        keep(store, [100 + n] * 8)
    again = open_store(limit=8 * FILE)
    for n in range(20):
        keep(again, [200 + n] * 8)
    assert found(again, range(16)) == 4
    assert [each.name for each in again.records()] == ["system"]
    assert again.check() == []
    assert again.drop("system").name == "system"
    assert found(again, range(16)) == 0
    assert again.drop("system") is None
    assert again.check() == []


def test_a_drop_leaves_what_another_pin_needs(open_store):
    store = open_store()
    keep(store, range(16))
    pin(store, "long", range(16))
    pin(store, "short", range(8))
    store.drop("long")
    assert found(store, range(16)) == 2
    assert store.check() == []


def test_pinning_more_than_fits_is_a_typed_error(open_store):
    store = open_store(limit=8 * FILE)
    keep(store, range(32))
    with pytest.raises(CacheFull, match="75%"):
        pin(store, "all", range(32))
    assert store.records() == []
    pin(store, "most", range(24))
    with pytest.raises(CacheFull):
        pin(store, "more", range(28))
    pin(store, "most", range(20))
    assert [(record.name, record.blocks) for record in store.records()] == [("most", 5)]
    assert store.check() == []


def test_a_pin_of_what_is_not_there_is_refused(open_store):
    store = open_store()
    with pytest.raises(CacheFull, match="not on disk"):
        pin(store, "x", range(8))
    keep(store, range(8))
    for name in ("", "a/b", "../x", ".hidden", "x" * 65, "a b"):
        with pytest.raises(InvalidRequest):
            pin(store, name, range(8))


def test_a_pin_set_by_another_process_is_honoured(open_store):
    server, tool = open_store(limit=4 * FILE), open_store(limit=4 * FILE)
    keep(tool, range(8))
    pin(tool, "p", range(8))
    server.follow()
    for n in range(10):
        keep(server, [100 + n] * 8)
    assert found(server, range(8)) == 2


def test_a_hold_keeps_for_its_time_and_no_longer(open_store, clock):
    store = open_store(limit=4 * FILE)
    keep(store, range(8))
    leaf = blocks(store, range(8))[-1][0].digest
    assert store.hold(leaf, 300.0)
    clock.now += 299
    keep(store, [9] * 16)
    again = open_store(limit=4 * FILE)
    keep(again, [8] * 16)
    assert found(again, range(8)) == 2
    clock.now += 2
    keep(again, [7] * 16)
    assert found(again, range(8)) == 0
    assert again.records() == []
    assert list((again.path / "holds").iterdir()) == []
    assert again.check() == []


def test_holds_are_renewed_never_shortened_and_bounded(open_store, clock):
    store = open_store(limit=8 * FILE)
    keep(store, range(24))
    leaf = blocks(store, range(24))[-1][0].digest
    assert store.hold(leaf, 3600.0)
    assert store.hold(leaf, 300.0)
    assert store.records()[0].until == clock.now + 3600
    clock.now += 1000
    assert store.hold(leaf, 3600.0)
    assert store.records()[0].until == clock.now + 3600
    keep(store, [9] * 8)
    assert not store.hold(blocks(store, [9] * 8)[-1][0].digest, 300.0)
    assert store.stats().refused == 1
    assert not store.hold(bytes(16), 300.0)


def test_a_damaged_pin_is_whole_again_once_recomputed(open_store, tmp_path):
    store = open_store(limit=8 * FILE)
    keep(store, range(16))
    pin(store, "p", range(16))
    (file,) = (tmp_path / "kv" / store.folder).glob("*-2.kv")
    file.write_bytes(b"x")
    assert found(store, range(16)) == 2
    assert store.check() == []
    assert keep(store, range(16)) == [True] * 4
    for n in range(20):
        keep(store, [100 + n] * 8)
    assert found(store, range(16)) == 4
    assert store.check() == []


def test_clear_empties_everything_of_every_model(open_store):
    store = open_store()
    keep(store, range(8))
    pin(store, "p", range(8))
    other = open_store(identity=IDENTITY | {"weights": "v"})
    keep(other, range(8))
    looking = open_store(identity=None)
    assert looking.clear() == 4 * FILE
    assert looking.stats().blocks == 0
    assert open_store().records() == []
