"""Prefixes on their way from disk to memory: read and verified aside, installed between steps."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from galley.kv import chain
from galley.kv.blockfile import BlockFile
from galley.kv.chain import Namespace
from galley.kv.disk import DiskStore
from galley.kv.table import Table
from galley.kv.tree import Tree
from galley.runtime.backend.base import Backend
from galley.runtime.pace import Pace

__all__ = ["Loads"]

log = logging.getLogger(__name__)

READERS = 2
"""Threads that read and hash."""
GROUP = 8
"""Blocks handed over by the reader at once."""
GROUPS_AHEAD = 8
"""Groups read and not yet installed; the reader waits beyond."""
PATIENCE_S = 1.0
"""A load may take four times what was predicted, and at least so long; then its jobs compute instead."""


class Load:
    """One prefix.

    Attributes:
        first: blocks of the prompt found in memory. names: those after them, to be read.
        groups: verified payloads not yet installed, each with the place of its first block.
    """

    def __init__(self, space: Namespace, tokens: list[int], first: int, names: list[bytes]) -> None:
        self.space = space
        self.tokens = tokens
        self.first = first
        self.names = names
        self.jobs: list[str] = []
        self.groups: deque[tuple[int, list[memoryview]]] = deque()
        self.deadline = 0.0
        self.done = False
        self.abandoned = False


class Loads:
    """All loads of an engine, read one after another by a thread of its own.

    The verbs are for the engine thread. Nothing here raises for a damaged or missing block: its load ends
    there, and the rest is computed.

    Args:
        wake: called from the reader thread when ``pending`` has become true.
    """

    def __init__(
        self,
        store: DiskStore,
        backend: Backend,
        pace: Pace,
        *,
        wake: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.hit_tokens = 0
        """Prompt tokens brought back so far."""
        self._store = store
        self._backend = backend
        self._size = backend.block_size
        self._pace = pace
        self._wake = wake
        self._clock = clock
        self._loads: dict[bytes, Load] = {}
        self._given_up: list[Load] = []
        self._reads: queue.SimpleQueue[Load | None] = queue.SimpleQueue()
        self._ahead = threading.Semaphore(GROUPS_AHEAD)
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="galley-kv-verify")
        self._thread = threading.Thread(target=self._read, name="galley-kv-reader", daemon=True)
        self._thread.start()

    def __bool__(self) -> bool:
        """Whether a job waits."""
        return bool(self._loads)

    @property
    def pending(self) -> bool:
        """Whether ``ready`` has something to do."""
        return any(load.groups or load.done for load in [*self._loads.values(), *self._given_up])

    def begin(self, space: Namespace, tokens: list[int], first: int, names: list[bytes], job_id: str) -> None:
        """A job waits for these blocks; jobs that end at the same block share one load."""
        load = self._loads.get(names[-1])
        if load is None:
            load = self._loads[names[-1]] = Load(space, tokens, first, names)
            predicted = self._pace.load_s(len(names) * self._backend.block_bytes)
            load.deadline = self._clock() + max(PATIENCE_S, 4 * predicted)
            self._reads.put(load)
        load.jobs.append(job_id)

    def ready(self, tree: Tree) -> list[str]:
        """Install what has been verified; the jobs whose load is over, one way or the other."""
        over: list[str] = []
        for name, load in list(self._loads.items()):
            done = load.done  # read before the groups: what comes later is seen the next time
            while load.groups and not load.abandoned:
                start, payloads = load.groups.popleft()
                self._ahead.release()
                load.abandoned = not self._install(tree, load, start, payloads)
            if done or load.abandoned or self._clock() > load.deadline:
                load.abandoned = True
                del self._loads[name]
                self._given_up.append(load)
                over += load.jobs
        # What the reader still brings for a load that nobody waits for is thrown away as it comes.
        for load in list(self._given_up):
            done = load.done
            while load.groups:
                load.groups.popleft()
                self._ahead.release()
            if done:
                self._given_up.remove(load)
        return over

    def abandon(self, job_id: str) -> None:
        """A waiting job was cancelled."""
        for load in self._loads.values():
            if job_id in load.jobs:
                load.jobs.remove(job_id)
                load.abandoned = load.abandoned or not load.jobs

    def close(self, timeout_s: float) -> None:
        """Stop the thread; what still waits is dropped."""
        for load in self._loads.values():
            load.abandoned = True
        self._loads.clear()
        self._reads.put(None)
        for _ in range(GROUPS_AHEAD):
            self._ahead.release()
        self._thread.join(timeout_s)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _install(self, tree: Tree, load: Load, start: int, payloads: Sequence[memoryview]) -> bool:
        """Publish verified blocks after those before them; False when these are gone or there is no room."""
        size, tokens = self._size, load.tokens
        path = tree.match(load.space, tokens[: (start + len(payloads)) * size + 1])
        if len(path) < start:
            return False
        payloads = payloads[len(path) - start :]
        table = Table(load.space)
        tree.claim(table, path)
        good = tree.extend(table, len(payloads))
        if good:
            for block, payload in zip(table.blocks[len(path) :], payloads, strict=True):
                self._backend.write_block(block, payload)
            self.hit_tokens += len(payloads) * size
        tree.release(table, tokens, len(table.blocks) * size)
        return good

    # ---- reader thread

    def _read(self) -> None:
        while (load := self._reads.get()) is not None:
            try:
                self._bring(load)
            except Exception:
                log.exception("reading KV from disk failed; the prompt is computed instead")
            load.done = True
            self._wake()

    def _bring(self, load: Load) -> None:
        """Read and verify, group by group, up to the first block that is not good."""
        size, block_bytes = self._size, self._backend.block_bytes
        proof, parent = chain.Proof(load.space), chain.root(load.space)
        for place in range(load.first):
            tokens = load.tokens[place * size : (place + 1) * size]
            proof.push(tokens)
            parent = chain.extend(parent, tokens)
        self._store.prefetch(load.names)
        for start in range(0, len(load.names), GROUP):
            began = time.monotonic()
            wanted: list[BlockFile] = []
            for place, name in enumerate(load.names[start : start + GROUP], load.first + start):
                wanted.append(
                    BlockFile(
                        identity=self._store.identity,
                        digest=name,
                        parent=parent,
                        proof=proof.push(load.tokens[place * size : (place + 1) * size]),
                        depth=place,
                        tokens=size,
                    )
                )
                parent = name
            if load.abandoned:
                return
            # Reading and hashing release the GIL, so two threads do twice as much.
            found = self._pool.map(partial(self._store.load, size=block_bytes), wanted)
            group: list[memoryview] = []
            for payload in found:
                if payload is None:
                    break
                group.append(payload)
            if group:
                self._pace.read(len(group) * block_bytes, time.monotonic() - began)
                self._ahead.acquire()
                load.groups.append((load.first + start, group))
                self._wake()
            if len(group) < len(wanted):
                return
