"""A job's ordered list of KV blocks."""

from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from galley.kv.chain import Namespace
    from galley.kv.tree import Node

__all__ = ["Table"]


class Table:
    """Block ``i`` holds positions ``i*B .. (i+1)*B - 1`` of one job.

    Append-only while the job runs (KV-6): ``kv.tree.Tree`` appends to it, and empties it on release. Only a
    rollback shortens it, never below what is published (KV-11).

    Attributes:
        blocks: block numbers, int32, so that a step's row takes them in one copy.
        keyed: the first ``keyed`` blocks are the tree's own nodes, matched or published by this job.
        tail: node of block ``keyed - 1``; None while ``keyed == 0``.
        diverged: another job had published block ``keyed`` with the same tokens first. This table keeps its
            duplicate (KV-6) and publishes no more until release, so that whoever holds a node holds all of
            the node's ancestors.
    """

    __slots__ = ("blocks", "diverged", "keyed", "namespace", "tail")

    def __init__(self, namespace: "Namespace") -> None:
        self.namespace = namespace
        self.blocks = array("i")
        self.keyed = 0
        self.tail: Node | None = None
        self.diverged = False

    def __len__(self) -> int:
        return len(self.blocks)
