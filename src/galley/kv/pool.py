"""The pool: which KV blocks are free, cached or in use, and in which order they are given up."""

__all__ = ["Pool"]


class Pool:
    """N block numbers in three places (KV-1): ``free + idle + in_use == size`` after every call.

    * free: no reference, no key. A stack, so the block reused next is the one touched last.
    * idle: no reference, but *keyed*: the prefix tree can still find it. An intrusive doubly linked list,
      oldest first, so that leaving the middle is O(1).
    * in use: ``ref[b] > 0`` occurrences in live tables (KV-2).

    Every verb is O(1) (KV-12). The pool knows nothing of tokens; ``kv.tree.Tree`` decides what is keyed.
    """

    __slots__ = ("_free", "_next", "_prev", "idle", "keyed", "ref", "size")

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a pool needs at least one block, not {size}")
        self.size = size
        self.ref = [0] * size
        self.keyed = bytearray(size)
        self.idle = 0
        self._free = list(range(size - 1, -1, -1))
        # Entry ``size`` is the sentinel of the circular list: next of it is the oldest idle block.
        self._next = list(range(size + 1))
        self._prev = list(range(size + 1))

    @property
    def free(self) -> int:
        """Blocks without reference and key."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Blocks that can be allocated now, if need be by evicting what is idle."""
        return len(self._free) + self.idle

    @property
    def in_use(self) -> int:
        """Blocks held by live tables."""
        return self.size - len(self._free) - self.idle

    def take(self) -> int:
        """A free block, now with one reference. Raises IndexError when none is free (evict first)."""
        block = self._free.pop()
        self.ref[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more reference to a block that is keyed or in use."""
        if self.ref[block] == 0:
            if not self.keyed[block]:
                raise RuntimeError(f"block {block} is free: take it, do not hold it")
            self._unlink(block)
            self.idle -= 1
        self.ref[block] += 1

    def drop(self, block: int) -> None:
        """One reference fewer. The last one makes the block idle (newest) when keyed, else free."""
        left = self.ref[block] - 1
        if left < 0:
            raise RuntimeError(f"block {block} dropped more often than held")
        self.ref[block] = left
        if left == 0:
            if self.keyed[block]:
                self._link(block)
                self.idle += 1
            else:
                self._free.append(block)

    def key(self, block: int) -> None:
        """Mark a block in use as findable; it becomes idle instead of free when its last holder leaves."""
        if self.ref[block] == 0 or self.keyed[block]:
            raise RuntimeError(
                f"block {block} cannot be keyed: ref {self.ref[block]}, keyed {self.keyed[block]}"
            )
        self.keyed[block] = 1

    def refresh(self, block: int) -> None:
        """Make an idle block the newest one."""
        self._unlink(block)
        self._link(block)

    def oldest(self) -> int | None:
        """The idle block to give up first, or None."""
        block = self._next[self.size]
        return None if block == self.size else block

    def discard(self, block: int) -> None:
        """Turn an idle block into a free one."""
        if self.ref[block] or not self.keyed[block]:
            raise RuntimeError(f"block {block} is not idle")
        self._unlink(block)
        self.idle -= 1
        self.keyed[block] = 0
        self._free.append(block)

    def idle_blocks(self) -> list[int]:
        """Idle blocks, oldest first. O(idle); for checks."""
        blocks: list[int] = []
        block = self._next[self.size]
        while block != self.size and len(blocks) <= self.size:
            blocks.append(block)
            block = self._next[block]
        return blocks

    def check(self) -> list[str]:
        """Violations of KV-1, in words; empty when all is well. O(N), mutates nothing."""
        faults = []
        idle = self.idle_blocks()
        free = self._free
        if len(idle) != self.idle:
            faults.append(f"KV-1: {len(idle)} blocks on the idle list, {self.idle} counted")
        if len(set(free)) != len(free) or len(set(idle)) != len(idle) or set(free) & set(idle):
            faults.append("KV-1: a block is listed twice")
        used = sum(1 for r in self.ref if r > 0)
        if len(free) + len(idle) + used != self.size:
            faults.append(f"KV-1: {len(free)} free + {len(idle)} idle + {used} in use != {self.size}")
        faults += [f"KV-1: free block {b} has ref or key" for b in free if self.ref[b] or self.keyed[b]]
        faults += [
            f"KV-1: idle block {b} has ref or no key" for b in idle if self.ref[b] or not self.keyed[b]
        ]
        return faults

    def _link(self, block: int) -> None:
        end = self.size
        last = self._prev[end]
        self._next[last] = block
        self._prev[block] = last
        self._next[block] = end
        self._prev[end] = block

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before
