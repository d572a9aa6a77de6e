"""Any order of the pool's verbs keeps KV-1, against a model made of two lists."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from galley.kv.pool import Pool
from tests.property.machines import machine_settings

SIZE = 6


class PoolMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = Pool(SIZE)
        self.ref = dict.fromkeys(range(SIZE), 0)
        self.keyed: set[int] = set()
        self.free = list(range(SIZE - 1, -1, -1))
        self.idle: list[int] = []

    def held(self):
        return [b for b in range(SIZE) if self.ref[b]]

    @precondition(lambda self: self.free)
    @rule()
    def take(self):
        block = self.pool.take()
        assert block == self.free.pop()
        self.ref[block] = 1

    @precondition(lambda self: self.held() or self.idle)
    @rule(data=st.data())
    def hold(self, data):
        block = data.draw(st.sampled_from(self.held() + self.idle))
        self.pool.hold(block)
        if block in self.idle:
            self.idle.remove(block)
        self.ref[block] += 1

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def drop(self, data):
        block = data.draw(st.sampled_from(self.held()))
        self.pool.drop(block)
        self.ref[block] -= 1
        if not self.ref[block]:
            (self.idle if block in self.keyed else self.free).append(block)

    @precondition(lambda self: set(self.held()) - self.keyed)
    @rule(data=st.data())
    def key(self, data):
        block = data.draw(st.sampled_from(sorted(set(self.held()) - self.keyed)))
        self.pool.key(block)
        self.keyed.add(block)

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def refresh(self, data):
        block = data.draw(st.sampled_from(self.idle))
        self.pool.refresh(block)
        self.idle.remove(block)
        self.idle.append(block)

    @precondition(lambda self: self.idle)
    @rule()
    def evict(self):
        block = self.pool.oldest()
        assert block == self.idle.pop(0)
        self.pool.discard(block)
        self.keyed.discard(block)
        self.free.append(block)

    @invariant()
    def agrees(self):
        assert self.pool.check() == []
        assert self.pool.idle_blocks() == self.idle
        assert self.pool.available == len(self.free) + len(self.idle)
        assert self.pool.in_use == len(self.held())


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = machine_settings(40)
