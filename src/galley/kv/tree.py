"""The prefix tree: which full blocks can be shared, and what is given up when memory runs out.

A tree of full blocks instead of a radix tree: children are found by the exact tuple of their B tokens, so a
hit needs no hash to be trusted (KV-5) and no node is ever split.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from galley.kv import chain
from galley.kv.chain import Namespace
from galley.kv.pool import Pool
from galley.kv.table import Table

__all__ = ["Namespace", "Node", "Tree"]


class Node:
    """One published block. A root has ``block == -1`` and no parent.

    ``digest`` chains blake2b-128 over namespace and tokens: the block's name outside this process (disk tier,
    router affinity). Lookups here never use it.
    """

    __slots__ = ("block", "children", "digest", "namespace", "parent", "tokens")

    def __init__(
        self, tokens: tuple[int, ...], block: int, parent: "Node | None", digest: bytes, namespace: Namespace
    ) -> None:
        self.tokens = tokens
        self.block = block
        self.parent = parent
        self.digest = digest
        self.namespace = namespace
        self.children: dict[tuple[int, ...], Node] = {}


class Tree:
    """Match, claim, extend, publish, release over one Pool.

    Two structural rules keep eviction O(1) a block, with no heap:

    * whoever holds a node's block holds the blocks of all its ancestors (see ``Table.diverged``), so an idle
      node has only idle descendants and every idle block can be evicted;
    * in the pool's idle list a node stands before its parent, so the oldest one is always a leaf (KV-7).
    """

    def __init__(self, pool: Pool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.evictions = 0
        self.fresh: list[Node] | None = None
        """When a list: every node published, in order, for whoever copies them elsewhere (disk tier)."""
        self._roots: dict[Namespace, Node] = {}
        self._nodes: list[Node | None] = [None] * pool.size

    def __len__(self) -> int:
        """Published blocks."""
        return sum(1 for node in self._nodes if node is not None)

    def match(self, namespace: Namespace, tokens: Sequence[int]) -> list[Node]:
        """Longest published prefix of ``tokens``, at most ``len(tokens) - 1`` tokens (KV-4).

        Mutates nothing; the path stays valid until the next ``extend``. O(len / B).
        """
        path: list[Node] = []
        node = self._roots.get(namespace)
        size = self.block_size
        start = 0
        last = len(tokens) - 1 - size
        while node is not None and start <= last:
            node = node.children.get(tuple(tokens[start : start + size]))
            if node is not None:
                path.append(node)
                start += size
        return path

    def holds(self, node: Node) -> bool:
        """Whether a node is still published, so that its block holds its tokens. O(1)."""
        return self._nodes[node.block] is node

    def claim(self, table: Table, path: Sequence[Node]) -> None:
        """Give a matched path to an empty table. Its blocks cannot be evicted from here on."""
        if table.blocks:
            raise RuntimeError("claim needs an empty table")
        for node in path:
            self.pool.hold(node.block)
            table.blocks.append(node.block)
        if path:
            table.keyed = len(path)
            table.tail = path[-1]

    def extend(self, table: Table, count: int) -> bool:
        """Append ``count`` unkeyed blocks, evicting as needed; all or nothing. O(count)."""
        pool = self.pool
        if count > pool.available:
            return False
        if count > pool.free:
            self.evict(count - pool.free)
        for _ in range(count):
            table.blocks.append(pool.take())
        return True

    def publish(self, table: Table, tokens: Sequence[int], computed: int) -> int:
        """Key the full blocks of the first ``computed`` positions, all committed (KV-3). Returns how many.

        Stops at the first block that someone else published already: that one stays a private duplicate.
        """
        size = self.block_size
        done = 0
        while not table.diverged and (table.keyed + 1) * size <= computed:
            start = table.keyed * size
            piece = tuple(tokens[start : start + size])
            parent = table.tail or self._root(table.namespace)
            if piece in parent.children:
                table.diverged = True
                break
            table.tail = self._grow(parent, piece, table.blocks[table.keyed])
            table.keyed += 1
            done += 1
        return done

    def release(self, table: Table, tokens: Sequence[int], computed: int) -> None:
        """Drop all references and empty the table; ``computed`` committed positions are worth keeping.

        With ``computed = 0`` nothing new is published (after a failed forward, CAN-3). Duplicates merge here
        (KV-6): what a diverged table computed beyond them hangs under the published twin. Tail blocks become
        older than head blocks (KV-7). O(len(table)).
        """
        self.publish(table, tokens, computed)
        tail = self._merge(table, tokens, computed) if table.diverged else None
        for block in reversed(table.blocks):
            self.pool.drop(block)
        # A merge may have put idle children under ancestors idle for long: renew those, child first.
        while tail is not None and tail.block >= 0 and self.pool.ref[tail.block] == 0:
            self.pool.refresh(tail.block)
            tail = tail.parent
        del table.blocks[:]
        table.keyed = 0
        table.tail = None
        table.diverged = False

    def truncate(self, table: Table, length: int) -> None:
        """Free the unpublished blocks past ``length`` positions (KV-11). ValueError below what is keyed."""
        keep = -(-length // self.block_size)
        if keep < table.keyed:
            raise ValueError(f"cannot truncate to {keep} blocks: {table.keyed} are published")
        while len(table.blocks) > keep:
            self.pool.drop(table.blocks.pop())

    def evict(self, count: int) -> None:
        """Free the ``count`` least recently used idle blocks, a leaf before its parent (KV-7). O(count)."""
        for _ in range(count):
            block = self.pool.oldest()
            if block is None:
                raise RuntimeError("nothing is idle")
            node = self._nodes[block]
            if node is None or node.children or node.parent is None:
                raise RuntimeError(f"KV-7: the oldest idle block {block} is not a leaf of the tree")
            parent = node.parent
            del parent.children[node.tokens]
            if parent.block < 0 and not parent.children:
                del self._roots[parent.namespace]
            self._nodes[block] = None
            self.pool.discard(block)
            self.evictions += 1

    def clear(self) -> bool:
        """Forget every published block (KV-10); refused (False) while one of them is in use."""
        if any(node is not None and self.pool.ref[node.block] for node in self._nodes):
            return False
        self.evict(self.pool.idle)
        return True

    def check(self, tables: Iterable[Table]) -> list[str]:
        """Violations of KV-1, KV-2, KV-6 and KV-7 given all live tables, in words. O(N + tables)."""
        faults = self.pool.check()
        counts: Counter[int] = Counter()
        for table in tables:
            counts.update(table.blocks)
            faults += self._check_table(table)
        for block, ref in enumerate(self.pool.ref):
            if ref != counts[block]:
                faults.append(f"KV-2: block {block} has ref {ref}, tables hold it {counts[block]} times")
            node = self._nodes[block]
            if (node is not None) != bool(self.pool.keyed[block]):
                faults.append(f"KV-3: block {block} keyed {self.pool.keyed[block]} but node is {node}")
            if node is not None:
                faults += self._check_node(node)
        rank = {block: place for place, block in enumerate(self.pool.idle_blocks())}
        for block, place in rank.items():
            node = self._nodes[block]
            if node is not None and node.parent is not None and rank.get(node.parent.block, place) < place:
                faults.append(f"KV-7: idle block {block} is newer than its idle parent {node.parent.block}")
        return faults

    def _check_node(self, node: Node) -> list[str]:
        parent = node.parent
        if parent is None or parent.children.get(node.tokens) is not node:
            return [f"KV-7: block {node.block} is an orphan"]
        if parent.block < 0:
            return (
                [] if self._roots.get(parent.namespace) is parent else [f"KV-7: root of {node.block} is lost"]
            )
        faults = []
        if self._nodes[parent.block] is not parent:
            faults.append(f"KV-7: the parent of block {node.block} was evicted")
        if self.pool.ref[parent.block] == 0 and self.pool.ref[node.block] > 0:
            faults.append(f"KV-7: block {node.block} is in use, its parent {parent.block} is not")
        return faults

    def _check_table(self, table: Table) -> list[str]:
        node, faults = table.tail, []
        for place in range(table.keyed - 1, -1, -1):
            if node is None or node.block != table.blocks[place]:
                return [f"KV-6: table entry {place} is not the node it claims"]
            node = node.parent
        if table.keyed and (node is None or node.block >= 0):
            faults.append("KV-6: the table's first block is not at the root")
        faults += [
            f"KV-8: unpublished block {block} is shared or keyed"
            for block in table.blocks[table.keyed :]
            if self.pool.ref[block] != 1 or self.pool.keyed[block]
        ]
        return faults

    def _merge(self, table: Table, tokens: Sequence[int], computed: int) -> Node:
        size = self.block_size
        node = table.tail or self._root(table.namespace)
        for place in range(table.keyed, min(computed // size, len(table.blocks))):
            piece = tuple(tokens[place * size : (place + 1) * size])
            node = node.children.get(piece) or self._grow(node, piece, table.blocks[place])
        if node.block < 0 and not node.children:
            del self._roots[node.namespace]
        return node

    def _grow(self, parent: Node, tokens: tuple[int, ...], block: int) -> Node:
        node = Node(tokens, block, parent, chain.extend(parent.digest, tokens), parent.namespace)
        parent.children[tokens] = node
        self._nodes[block] = node
        self.pool.key(block)
        if self.fresh is not None:
            self.fresh.append(node)
        return node

    def _root(self, namespace: Namespace) -> Node:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node((), -1, None, chain.root(namespace), namespace)
        return root
