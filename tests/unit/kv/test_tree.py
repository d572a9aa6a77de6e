import pytest

from galley.kv.pool import Pool
from galley.kv.table import Table
from galley.kv.tree import Tree

B = 4
NS = (("model", "m"),)


def tree(blocks=16):
    return Tree(Pool(blocks), B)


def table(tree, tokens, namespace=NS):
    """A table as a job of ``tokens`` has it after its forward: matched, extended, nothing published yet."""
    t = Table(namespace)
    tree.claim(t, tree.match(namespace, tokens))
    assert tree.extend(t, -(-len(tokens) // B) - len(t))
    return t


def keep(tree, tokens, namespace=NS):
    t = table(tree, tokens, namespace)
    tree.release(t, tokens, len(tokens))


def hit(tree, tokens, namespace=NS):
    return len(tree.match(namespace, tokens)) * B


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 0), (B, 0), (2 * B - 1, B), (2 * B, B), (2 * B + 1, 2 * B)]
)
def test_kv4_a_match_leaves_at_least_one_token(length, expected):
    t = tree()
    keep(t, list(range(4 * B)))
    assert hit(t, list(range(length))) == expected


def test_kv3_nothing_is_found_before_publish():
    t = tree()
    table(t, list(range(8)))
    assert hit(t, list(range(9))) == 0


def test_kv3_only_full_committed_blocks_are_published():
    t = tree()
    tokens = list(range(12))
    job = table(t, tokens)
    assert t.publish(job, tokens, 7) == 1
    assert hit(t, tokens) == 4
    assert t.publish(job, tokens, 7) == 0


def test_kv5_namespaces_never_share():
    t = tree()
    keep(t, list(range(8)), (("model", "m"), ("salt", "a")))
    assert hit(t, list(range(9)), (("model", "m"), ("salt", "b"))) == 0
    assert hit(t, list(range(9))) == 0
    assert hit(t, list(range(9)), (("model", "m"), ("salt", "a"))) == 8


def test_kv5_digests_name_namespace_and_whole_prefix():
    t = tree(32)
    keep(t, list(range(12)))
    keep(t, [9, *range(1, 12)])
    keep(t, list(range(12)), (("model", "m"), ("salt", "a")))
    paths = [t.match(NS, [*range(12), 0]), t.match(NS, [9, *range(1, 12), 0])]
    paths.append(t.match((("model", "m"), ("salt", "a")), [*range(12), 0]))
    names = [node.digest for path in paths for node in path]
    assert len(names) == len(set(names)) == 9
    assert all(len(name) == 16 for name in names)
    other = tree()
    keep(other, list(range(12)))
    assert other.match(NS, [*range(12), 0])[-1].digest == paths[0][-1].digest


def test_kv5_tags_do_not_run_into_values():
    t = tree()
    a, b = t._root((("ab", "c"),)), t._root((("a", "bc"),))
    assert a.digest != b.digest


def test_kv7_evicts_leaf_before_parent():
    t = tree(3)
    keep(t, list(range(12)))
    t.evict(1)
    assert hit(t, list(range(13))) == 8
    t.evict(1)
    assert hit(t, list(range(13))) == 4
    assert t.check([]) == []


def test_kv7_evicts_least_recently_used_branch():
    t = tree(8)
    keep(t, [0] * 4 + [1] * 4)
    keep(t, [0] * 4 + [2] * 4)
    keep(t, [0] * 4 + [1] * 4)  # used again: the other branch is older now
    t.evict(1)
    assert hit(t, [0] * 4 + [1] * 4 + [9]) == 8
    assert hit(t, [0] * 4 + [2] * 4 + [9]) == 4


def test_kv7_an_allocation_cannot_evict_its_own_hit():
    t = tree(4)
    keep(t, list(range(8)))
    job = Table(NS)
    t.claim(job, t.match(NS, list(range(16))))
    assert t.extend(job, 2)
    assert not t.extend(job, 1)
    assert t.check([job]) == []


def test_extend_is_all_or_nothing():
    t = tree(4)
    job = Table(NS)
    assert not t.extend(job, 5)
    assert len(job) == 0
    assert t.pool.free == 4


def test_kv6_duplicates_are_kept_and_merge_on_release():
    t = tree(16)
    first, second = list(range(8)) + [50] * 8, list(range(8)) + [60] * 8
    a, b = table(t, first), table(t, second)  # both computed: neither saw the other's blocks
    t.publish(a, first, 16)
    before = list(b.blocks)
    assert t.publish(b, second, 16) == 0
    assert b.diverged
    assert list(b.blocks) == before
    assert t.check([a, b]) == []
    t.release(b, second, 16)
    assert hit(t, [*second, 0]) == 16
    assert t.check([a]) == []
    t.release(a, first, 16)
    assert t.check([]) == []
    assert t.pool.idle == 6


def test_kv6_merge_below_a_twin_that_went_idle_keeps_leaf_order():
    t = tree(16)
    first, second = list(range(8)), list(range(8)) + [60] * 8
    a, b = table(t, first), table(t, second)
    t.publish(a, first, 8)
    t.publish(b, second, 16)
    t.release(a, first, 8)
    t.release(b, second, 16)
    assert t.check([]) == []
    t.evict(2)
    assert hit(t, [*second, 0]) == 8


def test_kv6_merge_after_the_twin_was_evicted():
    t = tree(8)
    first, second = list(range(8)), list(range(8)) + [60] * 8
    a, b = table(t, first), table(t, second)
    t.publish(a, first, 8)
    t.publish(b, second, 16)
    t.release(a, first, 8)
    t.evict(2)
    t.release(b, second, 16)
    assert hit(t, [*second, 0]) == 16
    assert t.check([]) == []


def test_can3_a_release_that_keeps_nothing_publishes_nothing():
    t = tree()
    tokens = list(range(8))
    job = table(t, tokens)
    t.release(job, tokens, 0)
    assert len(t) == 0
    assert t.pool.free == 16


def test_kv11_truncate_frees_unpublished_tail_only():
    t = tree()
    tokens = list(range(16))
    job = table(t, tokens)
    t.publish(job, tokens, 8)
    t.truncate(job, 9)
    assert len(job) == 3
    with pytest.raises(ValueError, match="published"):
        t.truncate(job, 4)
    assert t.check([job]) == []


def test_kv10_clear_is_refused_while_in_use():
    t = tree()
    tokens = list(range(8))
    job = table(t, tokens)
    t.publish(job, tokens, 8)
    assert not t.clear()
    t.release(job, tokens, 8)
    assert t.clear()
    assert hit(t, [*tokens, 0]) == 0
    assert t.pool.free == 16


def test_roots_of_forgotten_namespaces_do_not_pile_up():
    t = tree(4)
    for salt in range(50):
        space = (("salt", str(salt)),)
        job = Table(space)
        assert t.extend(job, 2)
        t.release(job, list(range(8)), 8)
    assert len(t._roots) == 2
    assert t.check([]) == []


def test_check_sees_a_wrong_reference_count():
    t = tree()
    job = table(t, list(range(8)))
    assert any("KV-2" in fault for fault in t.check([]))
    t.pool.ref[job.blocks[0]] += 1
    assert any("KV-2" in fault for fault in t.check([job]))


def test_check_sees_an_orphan():
    t = tree()
    keep(t, list(range(12)))
    path = t.match(NS, list(range(13)))
    path[0].children.clear()
    assert any("orphan" in fault for fault in t.check([]))
