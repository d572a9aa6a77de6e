"""The Merkle tree of RFC 6962 §2.1: hashes, roots, and paths that prove inclusion and consistency.

Pure functions over a ``Nodes`` reader, which gives the hash of any complete subtree; where the hashes lie
(memory, tiles on disk) is the reader's business.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

__all__ = ["EMPTY", "Nodes", "consistency_path", "inclusion_path", "leaf_hash", "node_hash", "root", "span"]

EMPTY = hashlib.sha256(b"").digest()
"""Root of the tree without entries."""


class Nodes(Protocol):
    """Complete subtrees by height and place."""

    def node(self, height: int, index: int) -> bytes:
        """Hash over the entries ``index << height`` to ``(index + 1) << height``, all of which exist."""
        ...


def leaf_hash(entry: bytes) -> bytes:
    """SHA-256(0x00 ‖ entry), 32 bytes."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 ‖ left ‖ right), 32 bytes."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root(hashes: Sequence[bytes]) -> bytes:
    """MTH over subtrees of one height, given by their hashes. O(n).

    Pairs are joined level by level and an odd last one is lifted as it is, which is the tree of RFC 6962: its
    left subtree is the largest complete one.
    """
    level = list(hashes)
    if not level:
        return EMPTY
    while len(level) > 1:
        joined = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        if len(level) % 2:
            joined.append(level[-1])
        level = joined
    return level[0]


def span(nodes: Nodes, low: int, high: int) -> bytes:
    """MTH(D[low:high]) for a range that occurs in the tree (``low`` is a multiple of its largest part).

    O(log n) nodes.
    """
    parts = []
    while low < high:
        height = (high - low).bit_length() - 1
        parts.append(nodes.node(height, low >> height))
        low += 1 << height
    if not parts:
        return EMPTY
    found = parts.pop()
    while parts:
        found = node_hash(parts.pop(), found)
    return found


def split(size: int) -> int:
    """The largest power of two below ``size`` (which is at least 2)."""
    return 1 << (size - 1).bit_length() - 1


def inclusion_path(nodes: Nodes, index: int, size: int) -> list[bytes]:
    """PATH(index, D[size]), from the leaf's sibling up (RFC 6962 §2.1.1); at most ceil(log2 size) hashes.

    Raises ValueError unless 0 <= index < size.
    """
    if not 0 <= index < size:
        raise ValueError(f"there is no entry {index} in a tree of {size}")
    found, low, high = [], 0, size
    while high - low > 1:
        middle = low + split(high - low)
        if index < middle:
            found.append(span(nodes, middle, high))
            high = middle
        else:
            found.append(span(nodes, low, middle))
            low = middle
    return found[::-1]


def consistency_path(nodes: Nodes, first: int, second: int) -> list[bytes]:
    """PROOF(first, D[second]) (RFC 6962 §2.1.2). Empty when the sizes are equal or ``first`` is 0.

    Raises ValueError unless 0 <= first <= second.
    """
    if not 0 <= first <= second:
        raise ValueError(f"a tree of {first} is no beginning of one of {second}")
    if first in (0, second):
        return []
    found, low, high, whole = [], 0, second, True
    while high != first:
        middle = low + split(high - low)
        if first <= middle:
            found.append(span(nodes, middle, high))
            high = middle
        else:
            found.append(span(nodes, low, middle))
            low, whole = middle, False
    if not whole:
        found.append(span(nodes, low, high))
    return found[::-1]
