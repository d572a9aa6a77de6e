"""Any order of the tree's verbs keeps KV-1, 2, 4, 6, 7, 8, and every hit is exact (KV-5, KV-9).

What a block holds is tracked beside the tree, as a backend would have written it: tokens and all that came
before them. A hit must hold exactly the prefix asked for.
"""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from galley.kv.pool import Pool
from galley.kv.table import Table
from galley.kv.tree import Tree
from tests.property.machines import machine_settings

B, BLOCKS = 2, 10
SPACES = [(("model", "m"),), (("model", "m"), ("salt", "s"))]
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)  # two letters: prefixes collide all the time


class TreeMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.tree = Tree(Pool(BLOCKS), B)
        self.jobs: list[tuple[Table, list[int], int]] = []
        self.content: dict[int, tuple] = {}

    def write(self, table, tokens, start, end):
        for place in range(start // B, -(-end // B)):
            self.content[table.blocks[place]] = (table.namespace, tuple(tokens[: min(end, (place + 1) * B)]))

    @rule(tokens=TOKENS, space=st.sampled_from(SPACES))
    def admit(self, tokens, space):
        table = Table(space)
        path = self.tree.match(space, tokens)
        hit = len(path) * B
        assert hit < len(tokens), "KV-4"
        for place, node in enumerate(path):
            assert self.content[node.block] == (space, tuple(tokens[: (place + 1) * B])), "KV-5"
        self.tree.claim(table, path)
        if self.tree.extend(table, -(-len(tokens) // B) - len(path)):
            self.jobs.append((table, tokens, hit))
        else:
            self.tree.release(table, tokens, hit)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def compute(self, data):
        i = data.draw(st.integers(0, len(self.jobs) - 1))
        table, tokens, computed = self.jobs[i]
        if computed < len(tokens):
            end = data.draw(st.integers(computed + 1, len(tokens)))
            self.write(table, tokens, computed, end)
            self.tree.publish(table, tokens, end)
            self.jobs[i] = (table, tokens, end)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), token=st.integers(0, 1))
    def draw_token(self, data, token):
        i = data.draw(st.integers(0, len(self.jobs) - 1))
        table, tokens, computed = self.jobs[i]
        if len(tokens) < len(table) * B or self.tree.extend(table, 1):
            self.jobs[i] = (table, [*tokens, token], computed)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), failed=st.booleans())
    def release(self, data, failed):
        table, tokens, computed = self.jobs.pop(data.draw(st.integers(0, len(self.jobs) - 1)))
        self.tree.release(table, tokens, 0 if failed else computed)
        assert len(table) == 0

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def truncate(self, data):
        table, tokens, computed = self.jobs[data.draw(st.integers(0, len(self.jobs) - 1))]
        if computed < len(tokens):
            return
        self.tree.truncate(table, computed)
        assert len(table) == -(-computed // B)

    @precondition(lambda self: self.tree.pool.idle)
    @rule()
    def evict(self):
        self.tree.evict(1)

    @rule()
    def clear(self):
        used = any(self.tree.pool.ref[b] and self.tree.pool.keyed[b] for b in range(BLOCKS))
        assert self.tree.clear() is not used

    @invariant()
    def sound(self):
        assert self.tree.check(table for table, _, _ in self.jobs) == []

    @invariant()
    def every_idle_block_can_be_evicted(self):
        idle = self.tree.pool.idle_blocks()
        for block in idle:
            node = self.tree._nodes[block]
            assert all(child.block in idle for child in node.children.values())


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = machine_settings(60)
