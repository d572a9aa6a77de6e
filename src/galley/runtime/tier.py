"""The disk tier beside a running engine: what is written, when, and how it comes back.

Writing. The engine thread copies published blocks out of the arena, a few between steps, and a writer thread
puts them on disk. While there is work only *wanted* blocks are copied, one a step: prefixes that a second
request has hit, and those whose request asked for it (breakpoints, ``prompt_cache_key``, park). Everything
else follows when the engine is idle or closes. So a prefix that is never seen again costs a busy engine
nothing.

Reading. A job whose prompt goes on from memory to disk waits outside the scheduler while a reader thread
reads and verifies; the engine thread installs the blocks between steps as published, unused blocks, and the
job then finds them as any other hit. Nothing is published before it is verified (KV-3), no step waits for the
disk, and a load that is late or damaged is simply a miss. It is only begun when it is predicted to be faster
than computing.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import msgspec

from galley.errors import ConfigError
from galley.kv import chain
from galley.kv.blockfile import BlockFile
from galley.kv.chain import MEMORY_ONLY, Namespace
from galley.kv.disk import DiskStore
from galley.kv.tree import Node, Tree
from galley.runtime.backend.base import Backend
from galley.runtime.loads import Loads
from galley.runtime.pace import Pace
from galley.types import CacheHint

__all__ = ["DiskOptions", "DiskTier", "identity"]

log = logging.getLogger(__name__)

BUSY_BLOCKS = 1
"""Copied out of the arena a step while there is work."""
IDLE_BLOCKS = 4
"""Copied between two looks at the inbox when there is none."""
QUEUE_BLOCKS = 8
"""Errands waiting for the writer; the engine copies no more meanwhile."""
RETRY_S = 60.0
"""Blocks for which there was no room are offered again after so long."""
FOLLOW_S = 1.0
"""The writer looks so often whether another process set or dropped a pin."""
MOST_HOLDS = 4096
"""Breakpoints of prefixes that are not computed yet."""


class DiskOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where the disk tier lies and how many bytes it may take, all models together."""

    path: Path
    limit: int


def identity(backend: Backend, model_key: str) -> dict[str, str]:
    """Everything that must be equal for raw KV to be usable: weights, numerics, layout, RoPE."""
    spec = backend.spec
    rope = (spec.rope_base, spec.rope_dim, spec.rope_interleaved, spec.rope_scale, spec.rope_factors)
    return {
        "format": "1",
        "weights": model_key,
        "backend": backend.fingerprint,
        "kv_dtype": backend.kv_dtype,
        "block": f"{backend.block_size} tokens, {backend.block_bytes} bytes",
        "shape": f"{spec.layers} layers, {spec.kv_heads} kv heads of {spec.head_dim}",
        "rope": repr(rope),
    }


class DiskTier:
    """Owned by an Engine; its verbs are for the engine thread.

    Args:
        model_key: only namespaces of these weights and numerics, at their first epoch, touch the disk.
        wake: called from the other threads when ``pending`` may have become true.
    """

    def __init__(
        self,
        store: DiskStore,
        backend: Backend,
        *,
        model_key: str,
        pace: Pace,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.pace = pace
        self.loads = Loads(store, backend, pace, wake=wake, clock=clock)
        self._backend = backend
        self._size = backend.block_size
        self._model_key = model_key
        self._wake = wake
        self._clock = clock
        self._tree: Tree | None = None
        self._fresh: deque[Node] = deque()
        self._wanted: dict[Node, None] = {}
        # By name, of blocks not published yet: how many jobs want them on disk soon, and what to hold.
        self._soon: dict[bytes, int] = {}
        self._holds: dict[bytes, tuple[float, int]] = {}
        self._asked: dict[str, list[bytes]] = {}
        self._writing: set[bytes] = set()
        self._refused: set[bytes] = set()
        self._refused_until = 0.0
        self._starved = False
        self._last: tuple[Node, chain.Proof, bytes, int] | None = None
        self._errands: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._write, name="galley-kv-writer", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        options: DiskOptions,
        backend: Backend,
        weights: str,
        model_key: str,
        *,
        pace: Pace | None,
        wake: Callable[[], None],
    ) -> "DiskTier":
        """A tier over a folder. Raises ConfigError without a digest of the weights or when the folder cannot
        be used."""
        if not weights:
            raise ConfigError("KV on disk needs the digest of the weights.", param="kv.disk_bytes")
        try:
            store = DiskStore(options.path, options.limit, identity=identity(backend, weights))
        except OSError as error:
            raise ConfigError(f"KV cannot be kept on disk: {error}", param="kv.disk_path") from error
        # A guess in favour of computing, until it is measured: 10^12 operations a second.
        guess = Pace(token_s=2.0 * backend.spec.linear_params / 1e12)
        return cls(store, backend, model_key=model_key, pace=pace or guess, wake=wake)

    @property
    def pending(self) -> bool:
        """Whether an idle engine has something to do here now."""
        if self.loads.pending:
            return True
        return bool(self._wanted or self._fresh) and self._errands.qsize() < QUEUE_BLOCKS

    def arrive(
        self, tree: Tree, job_id: str, space: Namespace, tokens: list[int], hint: CacheHint | None
    ) -> bool:
        """A job is about to be queued. True when it should wait until ``loads.ready`` names it.

        O(len / B) for what is cached; a prompt that is known nowhere costs two hashes.
        """
        if not self._ours(space):
            return False
        self._follow(tree)
        path = tree.match(space, tokens)
        self._want(path)  # a second request: worth keeping
        if hint is not None:
            self._note(tree, job_id, space, tokens, hint)
        names = self._beyond(space, tokens, path)
        if names or path:
            self.store.touch(names[-1] if names else path[-1].digest)
        if not names or not self.pace.worth(len(names) * self._backend.block_bytes, len(names) * self._size):
            return False
        self.loads.begin(space, tokens, len(path), names, job_id)
        return True

    def leave(self, job_id: str) -> None:
        """A job is over: what it asked for and never published is forgotten."""
        for name in self._asked.pop(job_id, ()):
            self._soon[name] -= 1
            if not self._soon[name]:
                del self._soon[name]

    def want(self, tree: Tree, space: Namespace, tokens: list[int]) -> None:
        """Copy the cached blocks of a prefix for the writer, all of them and at once (park)."""
        if not self._ours(space):
            return
        self._follow(tree)
        self._want(tree.match(space, [*tokens, 0]))
        while self._wanted:
            self._copy(tree, next(iter(self._wanted)))

    def collect(self, tree: Tree) -> None:
        """Take note of what was published since the last call; before ``leave`` is told who ended."""
        self._follow(tree)
        if not tree.fresh:
            return
        for node in tree.fresh:
            if not self._ours(node.namespace):
                continue
            if node.digest in self._soon:
                self._wanted[node] = None
            else:
                self._fresh.append(node)
        tree.fresh.clear()
        if len(self._fresh) > 2 * tree.pool.size:
            self._fresh = deque(node for node in self._fresh if tree.holds(node))

    def pump(self, tree: Tree, *, idle: bool) -> None:
        """Copy some published blocks for the writer. Bounded work; never waits."""
        if self._refused and self._clock() > self._refused_until:
            self._refused.clear()
            self._refused_until = self._clock() + RETRY_S
        left = IDLE_BLOCKS if idle else BUSY_BLOCKS
        while left and self._errands.qsize() < QUEUE_BLOCKS:
            if self._wanted:
                left -= self._copy(tree, next(iter(self._wanted)))
            elif idle and self._fresh:
                self._wanted[self._fresh.popleft()] = None
            else:
                break
        self._starved = idle and bool(self._wanted or self._fresh)

    def close(self, tree: Tree, timeout_s: float = 5.0) -> int:
        """Write what is left, for at most ``timeout_s``, and stop the threads; how many were not written."""
        until = time.monotonic() + timeout_s
        self.collect(tree)
        while (self._wanted or self._fresh) and time.monotonic() < until:
            self.pump(tree, idle=True)
            if self._errands.qsize() >= QUEUE_BLOCKS:
                time.sleep(0.001)
        self._errands.put(None)
        self.loads.close(0.1)
        self._thread.join(max(0.1, until - time.monotonic()))
        left = sum(1 for node in [*self._wanted, *self._fresh] if tree.holds(node) and not self._there(node))
        left += len(self._writing)
        if left:
            log.warning("%d KV blocks were not written to disk within %.0f s", left, timeout_s)
        return left

    def _ours(self, space: Namespace) -> bool:
        """Whether the store's identity tells all there is to tell of a namespace's KV (KV-10)."""
        return (
            space[0] == ("model", self._model_key)
            and MEMORY_ONLY not in space
            and not any(tag == "epoch" for tag, _ in space)
        )

    def _follow(self, tree: Tree) -> None:
        """The scheduler starts with a new tree after a fault: blocks of the old one mean nothing."""
        if tree is not self._tree:
            self._tree = tree
            tree.fresh = []
            self._fresh.clear()
            self._wanted.clear()

    def _want(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if not self._there(node):
                self._wanted[node] = None

    def _there(self, node: Node) -> bool:
        """Whether a block is on disk, or about to be; a root always is."""
        return node.block < 0 or self.store.has(node.digest) or node.digest in self._writing

    def _beyond(self, space: Namespace, tokens: list[int], path: list[Node]) -> list[bytes]:
        """Names of the blocks after ``path`` that are on disk, one token left to compute (KV-4)."""
        name = path[-1].digest if path else chain.root(space)
        names: list[bytes] = []
        size = self._size
        for start in range(len(path) * size, len(tokens) - size, size):
            name = chain.extend(name, tokens[start : start + size])
            if not self.store.has(name):
                break
            names.append(name)
        return names

    def _note(self, tree: Tree, job_id: str, space: Namespace, tokens: list[int], hint: CacheHint) -> None:
        """Remember what a job asks for, by the names its blocks will have."""
        size = self._size
        end = len(tokens) if hint.soon else max([end for end, _ in hint.ends], default=0)
        names = list(chain.digests(space, tokens[:end], size))
        asked = self._asked.setdefault(job_id, [])
        for name in names:
            if not self.store.has(name):
                self._soon[name] = self._soon.get(name, 0) + 1
                asked.append(name)
        for end, ttl_s in hint.ends:
            place = end // size
            if not place:
                continue
            leaf = names[place - 1]
            if self.store.has(leaf):
                self._errands.put(partial(self._hold, leaf, ttl_s, place * size))
            else:
                self._holds[leaf] = (ttl_s, place * size)
        while len(self._holds) > MOST_HOLDS:
            del self._holds[next(iter(self._holds))]
        self._want(tree.match(space, [*tokens, 0])[: len(names)])

    def _copy(self, tree: Tree, node: Node) -> int:
        """Hand a block to the writer, or the first of its ancestors that is missing; how many (0 or 1)."""
        top = node
        while not self._there(top) and top.parent is not None and not self._there(top.parent):
            top = top.parent
        if self._there(top) or top.digest in self._refused or not tree.holds(top):
            del self._wanted[node]
            return 0
        if top is node:
            del self._wanted[node]
        self._writing.add(top.digest)
        self._errands.put(partial(self._put, top, self._backend.read_block(top.block)))
        return 1

    # ---- writer thread

    def _write(self) -> None:
        while True:
            errand: Callable[[], object] | None
            try:
                errand = self._errands.get(timeout=FOLLOW_S)
            except queue.Empty:
                errand = self.store.follow
            if errand is None:
                return
            try:
                errand()
            except Exception:
                log.exception("writing KV to disk failed")
            if self._starved:
                self._wake()

    def _put(self, node: Node, payload: bytes) -> None:
        """Proof, checksum, file; and the hold that was asked for."""
        try:
            proof, depth = self._proof(node)
            block = BlockFile(
                identity=self.store.identity,
                digest=node.digest,
                parent=node.parent.digest if node.parent is not None else b"",
                proof=proof,
                depth=depth,
                tokens=self._size,
            )
            saved = self.store.save(block, payload)
            if not saved:
                self._refused.add(node.digest)
        finally:
            self._writing.discard(node.digest)
        hold = self._holds.pop(node.digest, None)
        if saved and hold is not None:
            self._hold(node.digest, *hold)

    def _hold(self, leaf: bytes, ttl_s: float, tokens: int) -> None:
        self.store.hold(leaf, ttl_s, tokens=tokens, model=self._model_key)

    def _proof(self, node: Node) -> tuple[bytes, int]:
        """Proof and depth of a node; O(1) when its parent was the last one asked for."""
        line: list[Node] = []
        at: Node | None = node
        while at is not None and at.block >= 0 and (self._last is None or at is not self._last[0]):
            line.append(at)
            at = at.parent
        if self._last is not None and at is self._last[0]:
            _, proof, shown, depth = self._last
        else:
            proof, shown, depth = chain.Proof(node.namespace), b"", -1
        for each in reversed(line):
            shown = proof.push(each.tokens)
        depth += len(line)
        self._last = (node, proof, shown, depth)
        return shown, depth
