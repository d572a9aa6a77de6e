"""Reading: what a job wants of its prompt's rows beside the one it draws from.

A job that reads is planned, batched, chunked and preempted like any other; only more rows of its forward
come back. What was read survives preemption and is never read twice, so a prefix found in the cache may cover
the positions read already and no more: the cache holds keys and values, not what the rows say.
"""

from typing import TYPE_CHECKING, Any, Protocol

from galley.types import Pooling, TokenLogprob

if TYPE_CHECKING:
    from galley.runtime.plan import Drawn

__all__ = ["POOLINGS", "Pooled", "Reading", "Scored", "reading_of"]

POOLINGS: tuple[Pooling, ...] = ("mean", "last", "cls")


class Reading(Protocol):
    """The rows one job reads. The scheduler asks ``span`` in planning and calls ``take`` in commit."""

    kind: str
    """Its name in a journal."""
    length: int
    """Tokens of the prompt."""
    states: bool
    """It reads hidden states; else it reads logits."""

    def reach(self) -> int:
        """Most positions that may come from the cache without losing anything still to be read."""
        ...

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Of the positions ``start .. end - 1``, the first to be read and the one after the last."""
        ...

    def take(self, drawn: "Drawn", at: int, start: int, end: int) -> None:
        """The rows of ``span(start, end)`` have come: row ``at`` of ``drawn`` and those after it. Committed
        steps only."""
        ...


class Pooled:
    """One vector of a prompt: its final hidden states (after the last norm) pooled over positions.

    Decoders attend to what is before a position only, so ``mean`` (the default of those files that name
    nothing) and ``last`` are the poolings that make sense of them; ``cls`` is the first position's.

    The sum of a mean is kept in float64 and taken position by position, so neither chunks nor preemption can
    change a bit of it.
    """

    states = True

    def __init__(self, kind: Pooling, length: int) -> None:
        self.kind: str = kind
        self.length = length
        self.done = 0
        """Positions read, for ``mean``; 1 once the one row of the others is there."""
        self._sum: Any = None

    def reach(self) -> int:
        if self.kind == "mean" or (self.kind == "cls" and not self.done):
            return self.done
        return self.length

    def span(self, start: int, end: int) -> tuple[int, int]:
        if self.kind == "mean":
            return min(max(start, self.done), end), end
        row = 0 if self.kind == "cls" else self.length - 1
        return (row, row + 1) if start <= row < end and not self.done else (start, start)

    def take(self, drawn: "Drawn", at: int, start: int, end: int) -> None:
        first, last = self.span(start, end)
        self.done = max(self.done, last) if self.kind == "mean" else self.done + last - first
        if drawn.states is None:  # the replay of a journal knows no numbers
            return
        for row in drawn.states[at : at + last - first]:
            if self._sum is None:
                self._sum = row.astype("float64")
            else:
                self._sum += row

    def vector(self) -> bytes:
        """The pooled states, float32 in the machine's byte order: ``hidden`` values, not normalised."""
        if self._sum is None:
            return b""
        pooled = self._sum / self.length if self.kind == "mean" else self._sum
        found: bytes = pooled.astype("float32").tobytes()
        return found


class Scored:
    """The log-probability of every token of a prompt but the first, under the raw model distribution.

    Row ``p`` of the logits scores the token at ``p + 1``; what the prompt's last row says is drawn from.
    """

    kind = "logprobs"
    states = False

    def __init__(self, length: int) -> None:
        self.length = length
        self.done = 0
        self.scores: list[TokenLogprob] = []
        """Of the tokens at 1, 2, …"""

    def reach(self) -> int:
        return self.done if self.done < self.length - 1 else 1 << 62

    def span(self, start: int, end: int) -> tuple[int, int]:
        last = min(end, self.length - 1)
        first = max(start, self.done)
        return (first, last) if first < last else (start, start)

    def take(self, drawn: "Drawn", at: int, start: int, end: int) -> None:
        first, last = self.span(start, end)
        for row in range(at, at + last - first):
            self.scores.append(
                TokenLogprob(drawn.ids[row], drawn.logprobs[row], drawn.ranks[row], drawn.tops[row])
            )
        self.done = max(self.done, last)


def reading_of(kind: str, length: int) -> Pooled | Scored:
    """A reading by its name. Raises ValueError for another."""
    if kind == Scored.kind:
        return Scored(length)
    for pooling in POOLINGS:
        if kind == pooling:
            return Pooled(pooling, length)
    raise ValueError(f"no reading is called {kind!r}")
