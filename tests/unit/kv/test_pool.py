import pytest

from galley.kv.pool import Pool


def test_kv1_every_block_is_in_one_place():
    pool = Pool(4)
    a, b = pool.take(), pool.take()
    pool.key(a)
    pool.drop(a)
    pool.drop(b)
    assert (pool.free, pool.idle, pool.in_use) == (3, 1, 0)
    assert pool.check() == []


def test_kv7_unkeyed_blocks_are_reused_first_and_last_freed_first():
    pool = Pool(4)
    a, b = pool.take(), pool.take()
    pool.drop(a)
    pool.drop(b)
    assert pool.take() == b
    assert pool.take() == a


def test_kv7_idle_blocks_leave_oldest_first_and_from_the_middle():
    pool = Pool(3)
    blocks = [pool.take() for _ in range(3)]
    for block in blocks:
        pool.key(block)
        pool.drop(block)
    pool.hold(blocks[1])
    assert pool.idle_blocks() == [blocks[0], blocks[2]]
    pool.drop(blocks[1])
    pool.refresh(blocks[0])
    assert pool.idle_blocks() == [blocks[2], blocks[1], blocks[0]]
    assert pool.check() == []


@pytest.mark.parametrize("misuse", ["drop", "hold", "discard", "key"])
def test_misuse_of_a_free_block_raises(misuse):
    with pytest.raises(RuntimeError):
        getattr(Pool(2), misuse)(0)


def test_discard_of_a_block_in_use_raises():
    pool = Pool(1)
    block = pool.take()
    pool.key(block)
    with pytest.raises(RuntimeError):
        pool.discard(block)


def test_check_sees_a_lost_block():
    pool = Pool(3)
    pool._free.pop()
    assert any("KV-1" in fault for fault in pool.check())


def test_check_sees_a_double_free():
    pool = Pool(3)
    pool._free.append(0)
    assert any("twice" in fault for fault in pool.check())


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        Pool(0)
