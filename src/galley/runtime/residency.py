"""Residency: which adapters are in the backend's slots, and which running jobs hold them there."""

from collections import OrderedDict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from galley.model.adapter import Adapter

__all__ = ["Residency"]


class Residency:
    """At most ``slots`` adapters are resident; the least recently used one that no running job holds gives
    way (LRA-1). Decides only: the loop carries out ``moves`` before the next step.

    Adapters are known by their digest, so one under two names takes one slot.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.held: dict[str, int] = {}
        """Running jobs by digest."""
        self._slot: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(slots - 1, -1, -1))
        self._moves: dict[int, Adapter | None] = {}
        self.gone: deque[str] = deque()
        """Digests to forget before the next step; any thread may append."""

    def __len__(self) -> int:
        """Adapters that are resident."""
        return len(self._slot)

    def slot(self, adapter: "Adapter") -> int:
        """Where a held adapter is."""
        return self._slot[adapter.digest]

    def hold(self, adapter: "Adapter") -> bool:
        """Count one more running job; False when the adapter cannot be resident now (LRA-5). O(slots)."""
        key = adapter.digest
        if key not in self._slot:
            if not self._free and not self._evict():
                return False
            self._slot[key] = slot = self._free.pop()
            self._moves[slot] = adapter
        self._slot.move_to_end(key)
        self.held[key] = self.held.get(key, 0) + 1
        return True

    def drop(self, adapter: "Adapter") -> None:
        """One running job less."""
        key = adapter.digest
        self.held[key] -= 1
        if not self.held[key]:
            del self.held[key]

    def forget(self, digest: str) -> None:
        """Give its slot back, unless a job holds it: then it goes when it is the least recently used."""
        if digest not in self.held and digest in self._slot:
            self._release(digest)

    def moves(self) -> list[tuple[int, "Adapter | None"]]:
        """What is to be put into which slot before the next step, None to empty it; each once."""
        while self.gone:
            self.forget(self.gone.popleft())
        found, self._moves = list(self._moves.items()), {}
        return found

    def lost(self, moves: "list[tuple[int, Adapter | None]]") -> None:
        """These moves failed, and the jobs of their step have ended: what other jobs hold is tried again, the
        rest is not resident."""
        for slot, adapter in moves:
            if adapter is None or self._slot.get(adapter.digest) != slot:
                self._moves.setdefault(slot, None)
            elif adapter.digest in self.held:
                self._moves[slot] = adapter
            else:
                self._release(adapter.digest)

    def _evict(self) -> bool:
        idle = next((key for key in self._slot if key not in self.held), None)
        if idle is None:
            return False
        self._release(idle)
        return True

    def _release(self, digest: str) -> None:
        slot = self._slot.pop(digest)
        self._free.append(slot)
        self._moves[slot] = None
