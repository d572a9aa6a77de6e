"""Any order of the disk store's verbs, crashes and damage between them: what it gives is what was put in.

The model is a dictionary from prefixes to payloads and the store's own listing of names; a crash truncates a
file at any byte, flips any bit, leaves a half-written scratch file, or removes a file, and opens the store
again.
"""

import os
import tempfile
from hashlib import blake2b
from pathlib import Path

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from galley.errors import CacheFull
from galley.kv import chain
from galley.kv.blockfile import BlockFile
from galley.kv.disk import DiskStore

B, PAYLOAD, FILE, LIMIT = 2, 100, 4096, 8
SPACES = [chain.namespace("m", tenant="a"), chain.namespace("m", tenant="b", salt="s")]
TOKENS = st.lists(st.integers(0, 1), min_size=2, max_size=10).map(lambda t: tuple(t[: len(t) // B * B]))
SPACE = st.sampled_from(SPACES)


def payload(space, tokens):
    return blake2b(repr((space, tokens)).encode(), digest_size=50).digest() * 2


class DiskMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.folder = tempfile.TemporaryDirectory()
        self.now = 0.0
        self.pinned: dict[str, tuple] = {}
        self.held: dict[tuple, float] = {}
        self.lost: set[tuple] = set()
        self.damage = 0
        self.restart()

    def restart(self):
        """As after kill -9: nothing is closed, nothing flushed."""
        self.store = DiskStore(
            Path(self.folder.name),
            LIMIT * FILE,
            identity={"weights": "w"},
            clock=lambda: self.base + self.now,
        )

    base = 4e9  # later than any file's own time, so that the clock decides

    def blocks(self, space, tokens):
        proof, parent = chain.Proof(space), chain.root(space)
        for place in range(len(tokens) // B):
            piece = tokens[place * B : (place + 1) * B]
            name = chain.extend(parent, piece)
            shown = proof.push(piece)
            yield BlockFile(
                identity=self.store.identity, digest=name, parent=parent, proof=shown, depth=place, tokens=B
            )
            parent = name

    def leaf(self, space, tokens):
        return list(self.blocks(space, tokens))[-1].digest

    def files(self):
        return sorted(Path(self.folder.name).glob("*/*.kv"))

    @rule(space=SPACE, tokens=TOKENS)
    def save(self, space, tokens):
        self.now += 1
        for place, block in enumerate(self.blocks(space, tokens)):
            if not self.store.save(block, payload(space, tokens[: (place + 1) * B])):
                break

    @rule(space=SPACE, tokens=TOKENS)
    def load(self, space, tokens):
        for place, block in enumerate(self.blocks(space, tokens)):
            have = self.store.load(block, PAYLOAD)
            if have is None:
                break
            assert bytes(have) == payload(space, tokens[: (place + 1) * B]), "a corrupt read"

    @rule(space=SPACE, tokens=TOKENS)
    def touch(self, space, tokens):
        self.now += 1
        self.store.touch(self.leaf(space, tokens))

    @rule(space=SPACE, tokens=TOKENS, name=st.sampled_from(["p", "q"]))
    def pin(self, space, tokens, name):
        before = self.store.stats()
        try:
            record = self.store.pin(
                name, self.leaf(space, tokens), tokens=len(tokens), model="m", tenant="", salted=False
            )
        except CacheFull:
            after = self.store.stats()
            assert after.kept_bytes <= before.kept_bytes  # holds that have run out go at any call
            assert msgspec.structs.replace(after, kept_bytes=before.kept_bytes) == before
            return
        assert record.blocks == len(tokens) // B
        self.pinned[name] = (space, tokens)

    @rule(name=st.sampled_from(["p", "q"]))
    def drop(self, name):
        dropped = self.store.drop(name)
        assert (dropped is not None) == (name in self.pinned)
        self.pinned.pop(name, None)

    @rule(space=SPACE, tokens=TOKENS, seconds=st.integers(1, 30))
    def hold(self, space, tokens, seconds):
        if self.store.hold(self.leaf(space, tokens), float(seconds)):
            until = self.held.get((space, tokens), 0.0)
            # A renewal that adds less than a tenth may be left out.
            self.held[space, tokens] = max(until, self.now + 0.9 * seconds)

    @rule(seconds=st.integers(1, 40))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def crash(self):
        self.restart()

    @rule(data=st.data())
    def crash_torn(self, data):
        if files := self.files():
            file = data.draw(st.sampled_from(files))
            os.truncate(file, data.draw(st.integers(0, max(0, file.stat().st_size - 1))))
            self.damage += 1
        self.restart()

    @rule(data=st.data())
    def crash_flipped(self, data):
        if files := self.files():
            file = data.draw(st.sampled_from(files))
            bits = bytearray(file.read_bytes())
            if bits:
                at = data.draw(st.integers(0, 8 * len(bits) - 1))
                bits[at // 8] ^= 1 << at % 8
                file.write_bytes(bits)
                self.damage += 1
        self.restart()

    @rule(data=st.data())
    def flipped_while_running(self, data):
        if files := self.files():
            file = data.draw(st.sampled_from(files))
            bits = bytearray(file.read_bytes() or b"x")
            bits[data.draw(st.integers(0, len(bits) - 1))] ^= 1
            file.write_bytes(bits)
            self.damage += 1

    @rule(data=st.data())
    def crash_removed(self, data):
        if files := self.files():
            data.draw(st.sampled_from(files)).unlink()
            self.damage += 1
        self.restart()

    @rule(data=st.binary(max_size=200))
    def crash_half_written(self, data):
        folder = Path(self.folder.name) / self.store.folder
        (folder / ".tmp-2147483646-abcd-7").write_bytes(data)
        self.restart()
        assert list(folder.glob(".tmp*")) == []

    @rule()
    def clear(self):
        self.store.clear()
        assert self.files() == []
        self.pinned.clear()
        self.held.clear()

    @invariant()
    def sound(self):
        assert self.store.check() == []
        assert self.store.stats().bytes <= LIMIT * FILE

    @invariant()
    def kept_is_there(self):
        """Until something was damaged, pins and running holds are whole, whatever was written since."""
        if not self.damage:
            kept = [*self.pinned.values(), *(key for key, until in self.held.items() if until > self.now)]
            for space, tokens in kept:
                assert all(self.store.has(block.digest) for block in self.blocks(space, tokens))

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(
    max_examples=int(os.environ.get("GALLEY_SOAK", "1")) * 50,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
