"""Find the first of several strings in a stream of characters, holding back as little as possible.

Source: A. Aho, M. Corasick, "Efficient string matching: an aid to bibliographic search", CACM 18(6), 1975.
"""

from collections.abc import Sequence

__all__ = ["Matcher"]


class Matcher:
    """Aho-Corasick automaton over text.

    A state is a small integer: the longest suffix read so far that starts some pattern. The automaton itself
    never changes after construction, so one serves many streams. Building costs O(total pattern length), a
    step O(1) amortised.
    """

    __slots__ = ("_best", "_fail", "_goto", "held", "patterns")

    held: list[int]
    """Per state: length of the longest suffix that is a *proper* prefix of some pattern (TXT-4). Text before
    it can no longer belong to a match."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """Raises ValueError for an empty pattern, which would match everywhere."""
        if not all(patterns):
            raise ValueError("an empty pattern matches everywhere")
        self.patterns = tuple(patterns)
        self._goto: list[dict[str, int]] = [{}]
        self._fail = [0]
        # Lowest pattern index that ends here: ties go by list order (TXT-4). -1 for none.
        self._best = [-1]
        self.held = [0]
        for index, pattern in enumerate(self.patterns):
            self._insert(index, pattern)
        self._link()

    def _insert(self, index: int, pattern: str) -> None:
        state = 0
        for depth, char in enumerate(pattern, 1):
            follow = self._goto[state].get(char)
            if follow is None:
                follow = len(self._goto)
                self._goto[state][char] = follow
                self._goto.append({})
                self._fail.append(0)
                self._best.append(-1)
                self.held.append(depth)
            state = follow
        if self._best[state] < 0:
            self._best[state] = index

    def _link(self) -> None:
        """Breadth first, so that a state's shorter suffixes are finished before it."""
        queue = [0]
        for state in queue:
            fail = self._fail[state]
            if state and not self._goto[state]:
                self.held[state] = self.held[fail]
            if self._best[fail] >= 0 and (self._best[state] < 0 or self._best[fail] < self._best[state]):
                self._best[state] = self._best[fail]
            for char, child in self._goto[state].items():
                self._fail[child] = self.step(fail, char) if state else 0
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        """The state after one more character; 0 is the start."""
        while state and char not in self._goto[state]:
            state = self._fail[state]
        return self._goto[state].get(char, 0)

    def match(self, state: int) -> int:
        """Index of the pattern that ends in this state (the first in list order), or -1."""
        return self._best[state]
