"""The text of one choice, told apart: reasoning, answer, tool calls. One state machine for all formats.

Text goes in as it comes, pieces in order come out, and the same text gives the same pieces however it was cut
(TXT-6). Nothing is ever lost: what turns out not to be a call comes out as text, with a warning.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from galley.runtime.text.calls import Tail, reader_of
from galley.runtime.text.formats import ChatFormat
from galley.runtime.text.jsonscan import SPACE
from galley.runtime.text.matcher import Matcher
from galley.runtime.text.reader import CallReader, Malformed
from galley.runtime.text.tagged import TaggedCall
from galley.types import FinishReason, ToolCallDelta

__all__ = ["Output", "Piece", "joined"]


class Piece(msgspec.Struct, frozen=True):
    """One thing that became certain. Exactly one field is set."""

    text: str = ""
    reasoning: str = ""
    call: ToolCallDelta | None = None
    warning: str = ""


class Output:
    """Tells one choice's text apart. O(1) amortised a character. Not thread-safe.

    Args:
        record: how the model writes calls and reasoning.
        tools: the parameters' schema of each tool of the request, by name; None when there are none to call,
            and then nothing is read as a call.
        reasoning: the prompt ends within the model's reasoning.
        new_id: makes the id of a call.

    Attributes:
        reasoning: whether what comes now is reasoning. calls: calls begun so far. good: calls that stand.
    """

    def __init__(
        self,
        record: ChatFormat,
        tools: Mapping[str, Any] | None,
        *,
        reasoning: bool,
        new_id: Callable[[], str],
    ) -> None:
        self.reasoning = reasoning and record.think is not None
        self.calls = 0
        self.good = 0
        self._record = record
        self._tools = tools
        self._new_id = new_id
        openers = record.openers if tools is not None else []
        think = record.think
        closers = [record.section[1]] if tools is not None and record.section[1] else []
        self._outside = Matcher([*openers, *closers, *([think[0]] if think else [])])
        self._inside = Matcher([think[1], *openers]) if think else None
        self._closers = closers
        self._state = 0
        self._held = ""
        self._space: list[str] = []
        self._fresh = True
        """Nothing was said yet, calls aside: only here reasoning may begin, or a call without a marker."""
        self._strip = self.reasoning
        self._marker_last = self.reasoning
        self._lead: Tail | None = None
        self._reader: CallReader | None = None
        self._marked = False
        self._tail: Tail | None = None
        self._raw: list[str] = []
        self._before: list[str] = []
        self._was_reasoning = False
        self._open_call = False
        self._inside_list = False
        self._out: list[Piece] = []

    def feed(self, text: str) -> list[Piece]:
        """What has become certain with this text."""
        for char in text:
            self._step(char)
        return self._take()

    def flush(self, finish: FinishReason) -> list[Piece]:
        """The end of the text: everything held back. A call cut off by ``length`` stays as far as it came."""
        if self._raw:
            self._end_inside(finish)
        held, self._held, self._state = self._held, "", 0
        self._say(held)
        if self._space and not self._marker_last:
            self._put("".join(self._space))
        self._space = []
        return self._take()

    def _take(self) -> list[Piece]:
        out, self._out = self._out, []
        return joined(out)

    def _step(self, char: str) -> None:
        if self._raw:
            self._step_inside(char)
        else:
            self._step_outside(char)

    # -- reasoning and text

    def _step_outside(self, char: str) -> None:
        matcher = self._inside if self.reasoning and self._inside is not None else self._outside
        if self._bare(char):
            self._begin(char, marked=False)
            return
        self._state = matcher.step(self._state, char)
        found = matcher.match(self._state)
        self._held += char
        if found < 0:
            sure = len(self._held) - matcher.held[self._state]
            said, self._held = self._held[:sure], self._held[sure:]
            self._say(said)
            return
        marker = matcher.patterns[found]
        said, self._held, self._state = self._held[: -len(marker)], "", 0
        self._say(said)
        self._meet(marker)

    def _bare(self, char: str) -> bool:
        """Whether a call without a marker may begin with this character, here."""
        record = self._record
        if self._tools is None or self.reasoning or not record.bare or not self._fresh or self._held:
            return False
        return char == record.bare

    def _say(self, text: str) -> None:
        """Text or reasoning; white space waits, for beside a marker it is markup."""
        if self._strip:
            text = text.lstrip()
        core = text.rstrip()
        if core and not (self._fresh and self._calls_only(core)):
            self._put("".join(self._space) + core)
            self._space = []
            self._strip = self._marker_last = False
            if not self.reasoning:
                self._fresh = False
            text = text[len(core) :]
        if text:
            self._space.append(text)

    def _calls_only(self, core: str) -> bool:
        """Whether this is what stands between calls without markers, as ``;`` does."""
        mark = self._record.between.strip()
        return bool(self._record.bare and self.calls and mark and core == mark)

    def _put(self, text: str) -> None:
        if text:
            self._out.append(Piece(reasoning=text) if self.reasoning else Piece(text=text))

    def _meet(self, marker: str) -> None:
        """A whole marker came."""
        think = self._record.think
        if self.reasoning and think is not None and marker == think[1]:
            self._space = []
            self.reasoning = False
            self._strip = self._marker_last = True
        elif think is not None and marker == think[0]:
            if self._fresh and not self.calls:
                self._space = []
                self.reasoning = self._strip = self._marker_last = True
            else:
                self._say(marker)
        elif marker in self._closers:
            if self.good:
                self._space = []
                self._marker_last = True
            else:
                self._say(marker)
        else:
            self._begin(marker, marked=True)

    # -- calls

    def _begin(self, opener: str, *, marked: bool) -> None:
        """A marker of a call, or the first character of one without. Open reasoning ends here."""
        record = self._record
        self._was_reasoning = self.reasoning
        self._before, self._space = self._space, []
        self.reasoning = False
        self._raw = [opener if marked else ""]
        self._marked = marked
        self._reader = self._tail = self._lead = None
        self._open_call = self._inside_list = False
        if marked and opener == record.section[0] and record.call[0]:
            self._lead = Tail(record.call[0])
        if not marked:
            self._step_inside(opener)

    def _step_inside(self, char: str) -> None:
        self._raw.append(char)
        if self._lead is not None:
            if not self._lead.feed(char):
                self._break("no call follows the marker", again=char)
            elif self._lead.done:
                self._lead = None
            return
        if self._tail is not None:
            self._step_tail(char)
            return
        if self._reader is None:
            if char in SPACE:
                return
            assert self._tools is not None
            self._reader = reader_of(self._record, self._tools, marked=self._marked, first=char)
        try:
            self._reader.feed(char)
        except Malformed as error:
            self._hear()
            self._break(str(error), again=char)
            return
        self._hear()
        if self._reader.done:
            closing = self._record.args_after + self._record.call[1]
            self._tail = Tail(closing) if closing and self._marked else None
            if self._tail is None:
                self._finish_call()

    def _step_tail(self, char: str) -> None:
        """After a whole call: its closing marker. Where another thing comes the call stands all the same."""
        assert self._tail is not None
        if not self._tail.feed(char):
            left = self._tail.text
            self._finish_call()
            for each in left:
                self._step(each)
        elif self._tail.done:
            self._finish_call()

    def _hear(self) -> None:
        """Pass on what the reader understood."""
        assert self._reader is not None
        for kind, text in self._reader.out:
            index = self.calls - 1
            if kind == "start":
                self._space = []
                known = self._tools is not None and text in self._tools
                call = ToolCallDelta(index=self.calls, id=self._new_id(), name=text)
                self._out.append(Piece(call=call))
                if not known:
                    self._out.append(
                        Piece(warning=f"call {self.calls}: {text[:80]!r} is none of the request's tools")
                    )
                self.calls += 1
                self._open_call = True
            elif kind == "args":
                self._out.append(Piece(call=ToolCallDelta(index=index, arguments=text)))
            else:
                self.good += 1
                self._open_call = False
                self._inside_list = True
                self._before = []
                self._raw = [""]  # what comes after belongs to no call yet
                if isinstance(self._reader, TaggedCall):
                    for key in self._reader.odd:
                        self._out.append(
                            Piece(warning=f"call {index}: {key[:80]!r} is not of its type; sent as a string")
                        )
        self._reader.out = []

    def _finish_call(self) -> None:
        self._reader = self._tail = None
        self._raw = []
        self._space = []
        self._marker_last = True
        self._strip = False
        self._fresh = bool(self._record.bare)

    def _break(self, why: str, *, again: str = "") -> None:
        """What came since the marker, or since the last whole call, is no call: it is text."""
        raw = "".join(self._raw)
        if again:
            raw = raw[: -len(again)]
        started = self._open_call
        if started:
            self._out.append(Piece(call=ToolCallDelta(index=self.calls - 1, retracted=True)))
        else:
            self.reasoning = self._was_reasoning
        if self._marked or started or self._inside_list:
            self._out.append(Piece(warning=f"a tool call is malformed and returned as text: {why}"))
        self._reader = self._tail = self._lead = None
        self._raw, self._open_call = [], False
        self._strip = False
        self._space = self._before
        self._before = []
        self._fresh = False
        if raw:
            self._say(raw)
        for each in again:
            self._step(each)

    def _end_inside(self, finish: FinishReason) -> None:
        """The text ends within a call or behind one."""
        reader = self._reader
        if self._tail is not None or (reader is not None and reader.complete):
            self._finish_call()
        elif finish == "length" and self._open_call:
            self._out.append(Piece(warning=f"call {self.calls - 1} is cut off: the length ran out"))
            self._raw = []
        elif self._raw == [""] and self.good:
            self._finish_call()
        else:
            self._break("it has no end")


def joined(pieces: list[Piece]) -> list[Piece]:
    """The same with neighbours of a kind made one. O(total length)."""
    out: list[Piece] = []
    texts: list[str] = []
    for piece in [*pieces, None]:
        last = out[-1] if out else None
        if piece is not None and last is not None and follows(last, piece):
            texts.append(piece.text or piece.reasoning or (piece.call.arguments if piece.call else ""))
            continue
        if last is not None and len(texts) > 1:
            out[-1] = with_text(last, "".join(texts))
        if piece is not None:
            out.append(piece)
            texts = [piece.text or piece.reasoning or (piece.call.arguments if piece.call else "")]
    return out


def follows(before: Piece, after: Piece) -> bool:
    """Whether ``after`` only goes on with what ``before`` is."""
    if before.call is None or after.call is None:
        return bool((before.text and after.text) or (before.reasoning and after.reasoning))
    one, two = before.call, after.call
    return one.index == two.index and not (one.retracted or two.retracted) and two.name is None


def with_text(piece: Piece, text: str) -> Piece:
    """The piece with another text, reasoning or arguments."""
    if piece.call is not None:
        return Piece(call=msgspec.structs.replace(piece.call, arguments=text))
    return Piece(reasoning=text) if piece.reasoning else Piece(text=text)
