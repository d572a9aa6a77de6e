"""A bound on reasoning: after so many tokens of it the closing marker is forced."""

from array import array
from collections.abc import Callable

from galley.runtime.guide import Grammar, Guide

__all__ = ["BudgetGuide", "Budgeted"]

FULL = 0xFFFFFFFF


class Budgeted:
    """A grammar, or none, under a bound on the reasoning before it. Makes a BudgetGuide for each output.

    Args:
        grammar: what else the output is kept to.
        markers: the text that opens reasoning, and the one that closes it. close: ids of the latter.
        budget: most reasoning tokens; 0 closes reasoning where it begins.
        opened: the prompt ends within the reasoning.
        text_of: the bytes of a token, markers included.
        vocab: ids of the model.
    """

    def __init__(
        self,
        grammar: Grammar | None,
        *,
        markers: tuple[str, str],
        close: list[int],
        budget: int,
        opened: bool,
        text_of: Callable[[int], bytes],
        vocab: int,
    ) -> None:
        self.relaxed = {} if grammar is None else grammar.relaxed
        self._grammar = grammar
        self._markers = (markers[0].encode(), markers[1].encode())
        self._close = list(close)
        self._budget = budget
        self._opened = opened
        self._text_of = text_of
        self._words = -(-vocab // 32)

    def guide(self) -> "BudgetGuide":
        """A guide at the beginning of an output."""
        inner = None if self._grammar is None else self._grammar.guide()
        return BudgetGuide(
            inner,
            markers=self._markers,
            close=self._close,
            budget=self._budget,
            opened=self._opened,
            text_of=self._text_of,
            words=self._words,
        )


class BudgetGuide:
    """Satisfies ``Guide``. O(1) a token; a rollback reads the output again.

    Markers are found in the text, not by id: where a vocabulary has no token for them, they come in pieces.
    """

    def __init__(
        self,
        inner: Guide | None,
        *,
        markers: tuple[bytes, bytes],
        close: list[int],
        budget: int,
        opened: bool,
        text_of: Callable[[int], bytes],
        words: int,
    ) -> None:
        self._inner = inner
        self._begin, self._end = markers
        self._close = close
        self._budget = budget
        self._opened = opened
        self._text_of = text_of
        self._words = words
        self._tokens: list[int] = []
        self._reset()

    def _reset(self) -> None:
        self._inside = self._opened
        self._over = False
        self._spent = 0
        self._tail = b""
        self._pending = list(self._close) if self._opened and self._budget == 0 else []

    @property
    def ended(self) -> bool:
        return self._inner is not None and self._inner.ended

    def begin(self, most: int) -> list[int]:
        forced = [] if self._inner is None else self._inner.begin(most)
        for token in forced:
            self._note(token)
        return forced + self._closing(most - len(forced))

    def accept(self, token: int, most: int) -> list[int]:
        if self._pending and token == self._pending[0]:
            self._pending.pop(0)
        forced = [] if self._inner is None else self._inner.accept(token, 0 if self._pending else most)
        self._note(token)
        for each in forced:
            self._note(each)
        return forced + self._closing(most - len(forced))

    def fill(self, masks: "array[int]", row: int) -> None:
        first = row * self._words
        if self._pending:
            masks[first : first + self._words] = array("I", [0]) * self._words
            masks[first + self._pending[0] // 32] = 1 << (self._pending[0] % 32)
        elif self._inner is not None:
            self._inner.fill(masks, row)
        else:
            masks[first : first + self._words] = array("I", [FULL]) * self._words

    def rollback(self, count: int) -> None:
        if not count:
            return
        if self._inner is not None:
            self._inner.rollback(count)
        kept = self._tokens[:-count]
        self._tokens = []
        self._reset()
        for token in kept:
            if self._pending and token == self._pending[0]:
                self._pending.pop(0)
            self._note(token)

    def _closing(self, most: int) -> list[int]:
        """As much of the closing marker as may be forced now."""
        taken: list[int] = []
        while self._pending and len(taken) < most:
            token = self._pending.pop(0)
            if self._inner is not None:
                self._inner.accept(token, 0)
            self._note(token)
            taken.append(token)
        return taken

    def _note(self, token: int) -> None:
        """Where the output stands after one more token."""
        self._tokens.append(token)
        if self._over:
            return
        self._tail = (self._tail + self._text_of(token))[-64:]
        if not self._inside:
            place = self._tail.find(self._begin)
            if place < 0:
                # Reasoning comes first or not at all.
                self._over = bool(self._tail.strip()) and not self._begin.startswith(self._tail.strip())
                return
            self._inside, self._tail = True, self._tail[place + len(self._begin) :]
        elif self._end not in self._tail:
            self._spent += 1
        if self._end in self._tail:
            self._inside, self._over = False, True
            self._pending = []
        elif self._spent >= self._budget and not self._pending:
            self._pending = list(self._close)
