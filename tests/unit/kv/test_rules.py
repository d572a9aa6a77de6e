"""The KV rules that have no test of their own elsewhere, one by one, by their ids."""

import sys
import time

import pytest

from galley.kv import chain
from galley.kv.pool import Pool
from galley.kv.table import Table
from galley.kv.tree import Tree
from galley.runtime.park import park, resume
from galley.types import CacheHint
from tests.fake import Bench, FakeBackend, alone

B = 4
NS = chain.namespace("m", tenant="t")


def keep(tree, tokens, space=NS):
    table = Table(space)
    tree.claim(table, tree.match(space, tokens))
    assert tree.extend(table, -(-len(tokens) // B) - len(table))
    tree.release(table, tokens, len(tokens))


def test_kv1_conservation_is_checked_and_told():
    tree = Tree(Pool(8), B)
    keep(tree, list(range(8)))
    pool = tree.pool
    assert pool.free + pool.idle + pool.in_use == pool.size == 8
    assert tree.check([]) == []
    lost = pool.take()  # a block that leaves the free list and is in no table
    assert any("KV-2" in fault for fault in tree.check([]))
    pool.ref[lost] = 0
    assert any("KV-1" in fault for fault in tree.check([]))


def test_kv2_references_are_the_tables_occurrences():
    tree = Tree(Pool(8), B)
    keep(tree, list(range(8)))
    tables = [Table(NS) for _ in range(3)]
    path = tree.match(NS, [*range(8), 9])
    for table in tables:
        tree.claim(table, path)
    assert [tree.pool.ref[node.block] for node in path] == [3, 3]
    assert tree.check(tables) == []
    tree.release(tables.pop(), list(range(8)), 8)
    assert [tree.pool.ref[node.block] for node in path] == [2, 2]
    assert tree.check(tables) == []
    assert any("KV-2" in fault for fault in tree.check(tables[:1]))


def test_kv5_one_bit_of_hash_still_gives_right_answers(monkeypatch):
    """Hits are found by tokens: names may collide at will."""
    prompts = [[n % 5, *range(40 + n)] for n in range(12)]
    wanted = [alone(prompt) for prompt in prompts]
    monkeypatch.setattr(chain, "extend", lambda parent, tokens: bytes(15) + bytes([sum(tokens) % 2]))
    bench = Bench()
    for turn in range(2):
        for n, prompt in enumerate(prompts):
            bench.add(f"{turn}-{n}", prompt)
        bench.run()
        for n in range(len(prompts)):
            assert bench.ids(f"{turn}-{n}") == wanted[n]
    assert bench.last("1-3").meter.cached_tokens > 0


def test_kv5_two_tenants_with_equal_prompts_share_no_block():
    bench = Bench(FakeBackend(num_blocks=64))
    prompt = list(range(64))
    jobs = [bench.add(name, prompt, options={"tenant": name}) for name in ("a", "b")]
    bench.step()
    assert not set(jobs[0].table.blocks) & set(jobs[1].table.blocks)
    bench.run()
    bench.add("again", prompt, options={"tenant": "b"})
    bench.add("third", prompt, options={"tenant": "c"})
    bench.run()
    assert bench.last("b").meter.cached_tokens == bench.last("third").meter.cached_tokens == 0
    assert bench.last("again").meter.cached_tokens == 48
    assert bench.ids("a") == bench.ids("b") == bench.ids("third") == alone(prompt)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"tenant": "ab"}, {"tenant": "a", "salt": "b"}),
        ({"tenant": "t"}, {"tenant": "t", "epoch": 1}),
        ({"tenant": "t"}, {"tenant": "t", "memory_only": True}),
        ({"tenant": "t", "salt": "x"}, {"tenant": "t", "salt": "y"}),
        ({"tenant": "salt"}, {"tenant": "", "salt": "salt"}),
    ],
)
def test_kv5_extras_are_tagged(one, other):
    assert chain.root(chain.namespace("m", **one)) != chain.root(chain.namespace("m", **other))


def test_kv8_a_block_is_written_only_while_it_is_private_and_unpublished():
    """n choices of one prompt: its full blocks are shared, and each writes a tail of its own."""
    bench = Bench(FakeBackend(num_blocks=64))
    prompt = list(range(40))  # two blocks of 16 and half a one
    jobs = [bench.add(f"lane{lane}", prompt, lane=lane, temperature=1.0) for lane in range(4)]
    seen = False
    while bench.scheduler.busy:
        bench.step()
        running = [job for job in jobs if job.table.blocks]
        if len(running) == 4 and all(job.computed > 40 for job in running):
            seen = True
            heads = {tuple(job.table.blocks[:2]) for job in running}
            tails = [job.table.blocks[2] for job in running]
            assert len(heads) == 1 and len(set(tails)) == 4
            assert bench.scheduler.pool.in_use == 2 + 4
    assert seen
    for lane in range(4):
        assert bench.ids(f"lane{lane}") == alone(prompt, lane=lane, temperature=1.0)


def test_kv10_a_new_epoch_matches_nothing_older():
    bench = Bench()
    prompt = list(range(64))
    bench.add("old", prompt)
    bench.run()
    bench.scheduler.new_epoch()
    assert len(bench.scheduler.tree) == 0
    bench.add("new", prompt)
    bench.run()
    assert bench.last("new").meter.cached_tokens == 0
    bench.add("newer", prompt)
    bench.run()
    assert bench.last("newer").meter.cached_tokens == 48


def test_kv10_an_epoch_that_ends_under_running_jobs_leaves_them_alone():
    bench = Bench()
    prompt = list(range(64))
    bench.add("running", prompt, max_tokens=40)
    bench.step()
    bench.scheduler.new_epoch()
    bench.add("new", prompt)
    bench.run()
    assert bench.last("new").meter.cached_tokens == 0
    assert bench.ids("running") == alone(prompt, max_tokens=40)
    assert bench.ids("new") == alone(prompt)


def test_slp2_the_tree_is_emptied_and_refused_while_something_runs():
    bench = Bench()
    bench.add("one", range(64))
    bench.step()
    assert not bench.scheduler.tree.clear()
    bench.run()
    assert bench.scheduler.tree.clear()
    assert bench.scheduler.pool.free == bench.scheduler.pool.size


def calls(verb) -> int:
    """Python and C calls that a verb makes: a measure of work that no busy machine disturbs."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        verb()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("cached", [64, 4096])
def test_kv12_costs_do_not_grow_with_the_cache(cached):
    """match is O(len / B), claim, extend and evict are per block, whatever else is cached."""
    tree = Tree(Pool(cached + 64), B)
    for n in range(cached // 4):
        keep(tree, [n, *range(15)])
    prompt = [1, *range(15), 99]
    table = Table(NS)
    assert calls(lambda: tree.match(NS, prompt)) < 40
    assert calls(lambda: tree.claim(table, tree.match(NS, prompt))) < 80
    assert calls(lambda: tree.extend(table, 1)) < 20
    assert calls(lambda: tree.release(table, prompt, 16)) < 60
    assert calls(lambda: tree.evict(4)) < 80


def test_kv12_no_tensor_reaches_the_tree():
    """The pure modules are checked by the import test; the data in a tree is plain too."""
    tree = Tree(Pool(4), B)
    keep(tree, list(range(8)))
    (node,) = tree.match(NS, list(range(8)))
    assert {type(token) for token in node.tokens} == {int}
    assert type(node.block) is int


@pytest.mark.parametrize("salt", [None, "s"])
def test_kv13_cached_tokens_are_reported_with_the_first_token_and_at_the_end(salt):
    bench = Bench()
    for name in ("one", "two"):
        bench.add(name, range(64), options={"salt": salt})
        bench.run()
    outs = bench.outs["two"]
    assert next(out.cached_tokens for out in outs if out.token_ids) == 48
    assert outs[-1].meter.cached_tokens == 48
    assert bench.outs["one"][-1].meter.cache_write_tokens == 64


def test_sch6_a_parked_job_holds_nothing_and_goes_on_where_it_was():
    bench = Bench()
    job = bench.add("job", range(50), max_tokens=30, repetition_penalty=1.0)
    bench.add("mate", range(30), max_tokens=30)
    for _ in range(7):
        bench.step()
    before = list(job.tokens)
    parked = park(bench.scheduler, "job", bench.now)
    assert parked.tokens == before
    assert not job.table.blocks and "job" not in bench.scheduler.jobs
    assert bench.scheduler.check() == []
    bench.run()
    assert bench.last("job").error.code == "parked"
    said = bench.ids("job")
    resume(bench.scheduler, parked, "later", bench.now)
    bench.run()
    assert said + bench.ids("later") == alone(range(50), max_tokens=30)
    assert bench.last("later").meter.recomputed_tokens < 16


def test_a_memory_only_job_shares_with_its_like():
    bench = Bench()
    hint = CacheHint(memory_only=True)
    bench.add("one", range(64), options={"cache": hint})
    bench.run()
    bench.add("two", range(64), options={"cache": hint})
    bench.add("other", range(64))
    bench.run()
    assert bench.last("two").meter.cached_tokens == 48
    assert bench.last("other").meter.cached_tokens == 0


def test_kv12_ten_thousand_blocks_come_and_go_in_no_time():
    tree = Tree(Pool(10_000), B)
    began = time.process_time()
    for n in range(2_500):
        keep(tree, [n, *range(15)])
    tree.evict(10_000)
    assert time.process_time() - began < 5.0
    assert tree.pool.free == 10_000
