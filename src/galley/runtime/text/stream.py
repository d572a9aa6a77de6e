"""Token ids in, text out: no half code points, no stop string leaked, the same for every split into steps."""

import codecs
from typing import NamedTuple, Protocol

from galley.runtime.text.matcher import Matcher
from galley.types import FinishReason

__all__ = ["Piece", "TextStream", "Vocabulary"]


class Vocabulary(Protocol):
    """What a TextStream asks of a tokenizer."""

    def token_bytes(self, token: int, /) -> bytes:
        """Raw bytes of a token; empty for special ones."""
        ...

    def token_str(self, token: int, /) -> str: ...

    def is_special(self, token: int, /) -> bool: ...

    def decode(self, ids: list[int], skip_special: bool = True, *, start: bool = False) -> str:
        """``start``: the ids open a text, so drop the space SentencePiece models put there."""
        ...


class Piece(NamedTuple):
    """What one push made certain."""

    text: str
    stop: str | None
    """The stop string that completed, or None."""
    kept: int
    """How many of the pushed ids count: all, or those up to the one that completed the stop (TXT-4)."""


class TextStream:
    """The text of one choice as its ids arrive. O(1) amortised per byte.

    The concatenation of everything returned equals ``tokenizer.decode`` of the kept ids, cut at the stop
    string (TXT-1). Bytes are joined before they are decoded, so U+FFFD appears only where the whole output is
    invalid UTF-8. Only the output's own bytes are decoded: whatever the prompt ended with, nothing of it
    appears (TXT-2); continuation bytes of a character the prompt began are invalid on their own and show as
    U+FFFD.

    Not thread-safe.
    """

    __slots__ = (
        "_after_start",
        "_count",
        "_decoder",
        "_held",
        "_include_stop",
        "_matcher",
        "_min_tokens",
        "_shown",
        "_skip_special",
        "_state",
        "_tokenizer",
        "stop",
    )

    stop: str | None
    """The stop string that ended the text, once one has."""

    def __init__(
        self,
        tokenizer: Vocabulary,
        *,
        prompt_ids: list[int],
        skip_special: bool,
        stops: list[str],
        include_stop: bool,
        min_tokens: int,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """Args:
        prompt_ids: what came before. Where they hold no text (none, or a begin token alone) the output opens
            the text, and a SentencePiece model's leading space is dropped.
        skip_special: leave special tokens out of the text; otherwise they are spelt as in the vocabulary.
        stops: strings that end the text; the earliest to complete wins, ties by list order.
        include_stop: the stop string stays in the text.
        shown: special tokens that are spelt all the same, because they mark calls or reasoning.
        min_tokens: a stop string completed by an earlier id than this (counted from 1) is plain text.

        Raises ValueError for an empty stop string.
        """
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._shown = shown
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._matcher = Matcher(stops) if stops else None
        self._state = 0
        self._held = ""
        self._count = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # Looked at from the end: all but freak prompts are settled by their last token.
        self._after_start = any(tokenizer.token_bytes(token) for token in reversed(prompt_ids))
        self.stop = None

    def push(self, ids: list[int]) -> Piece:
        """Take the ids of one step. After a stop string nothing counts: an empty piece, ``kept`` 0."""
        if self.stop is not None:
            return Piece("", self.stop, 0)
        out: list[str] = []
        for index, token in enumerate(ids):
            self._count += 1
            text, stop = self._read(self._decoder.decode(self._bytes(token)))
            out.append(text)
            if stop is not None:
                self.stop = stop
                return Piece("".join(out), stop, index + 1)
        return Piece("".join(out), None, len(ids))

    def flush(self, reason: FinishReason) -> str:
        """The end: text still held back, and U+FFFD for an unfinished character (TXT-5).

        A beginning of a stop string that never completed is text like any other, whether the length ran out
        or an end token came. After a completed stop string nothing is left; filtered content is not shown.
        """
        held, self._held, self._state = self._held, "", 0
        tail = self._decoder.decode(b"", final=True)
        if self.stop is not None or reason == "content_filter":
            return ""
        return held + tail

    def _bytes(self, token: int) -> bytes:
        raw = self._tokenizer.token_bytes(token)
        if not raw:
            # A special token's spelling; other tokens without bytes do not exist, but would be spelt empty.
            hidden = self._skip_special and token not in self._shown
            if hidden or not self._tokenizer.is_special(token):
                return b""
            return self._tokenizer.token_str(token).encode()
        if not self._after_start:
            self._after_start = True
            if raw.startswith(b" ") and self._drops_space(token):
                return raw[1:]
        return raw

    def _drops_space(self, token: int) -> bool:
        """Whether this vocabulary opens a text with a space of its own."""
        return self._tokenizer.decode([token], start=True) != self._tokenizer.decode([token])

    def _read(self, text: str) -> tuple[str, str | None]:
        """What of the held and the new text is certain now, and the stop string that completed in it."""
        matcher = self._matcher
        if matcher is None or not text:
            return text, None
        state = self._state
        for index, char in enumerate(text):
            state = matcher.step(state, char)
            found = matcher.match(state)
            if found >= 0 and self._count >= self._min_tokens:
                stop = matcher.patterns[found]
                shown = self._held + text[: index + 1]
                self._held, self._state = "", 0
                return (shown if self._include_stop else shown[: len(shown) - len(stop)]), stop
        self._state = state
        whole = self._held + text
        sure = len(whole) - matcher.held[state]
        self._held = whole[sure:]
        return whole[:sure], None
