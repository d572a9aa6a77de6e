"""The Harmony format of gpt-oss: messages with a channel and a recipient (https://github.com/openai/harmony).

``<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f
<|constrain|>json<|message|>{…}<|call|>``; the answer is on the channel ``final``.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from galley.runtime.text.formats import HARMONY
from galley.runtime.text.jsonscan import SPACE, BadJSON, Scanner
from galley.runtime.text.matcher import Matcher
from galley.runtime.text.output import Piece, joined
from galley.types import FinishReason, ToolCallDelta

__all__ = ["HarmonyOutput"]

MAX_HEADER = 1024
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
RECIPIENT = re.compile(r"\bto=([\w.:/-]+)")


class HarmonyOutput:
    """As ``Output``, for this format."""

    def __init__(self, tools: Mapping[str, Any] | None, *, new_id: Callable[[], str]) -> None:
        self.reasoning = False
        self.calls = 0
        self.good = 0
        self._tools = tools
        self._new_id = new_id
        self._matcher = Matcher(HARMONY)
        self._state = 0
        self._held = ""
        self._header: list[str] | None = []
        self._scan: Scanner | None = None
        self._raw: list[str] = []
        self._out: list[Piece] = []

    def feed(self, text: str) -> list[Piece]:
        """What has become certain with this text."""
        for char in text:
            self._state = self._matcher.step(self._state, char)
            found = self._matcher.match(self._state)
            self._held += char
            if found >= 0:
                marker = self._matcher.patterns[found]
                said, self._held, self._state = self._held[: -len(marker)], "", 0
                self._say(said)
                self._meet(marker)
            else:
                sure = len(self._held) - self._matcher.held[self._state]
                said, self._held = self._held[:sure], self._held[sure:]
                self._say(said)
        return self._take()

    def flush(self, finish: FinishReason) -> list[Piece]:
        """The end of the text: everything held back."""
        held, self._held, self._state = self._held, "", 0
        self._say(held)
        if self._header:
            self._header_is_text()
        elif self._scan is not None and finish == "length" and not self._scan.done:
            self._out.append(Piece(warning=f"call {self.calls - 1} is cut off: the length ran out"))
        else:
            self._end_message()
        return self._take()

    def _take(self) -> list[Piece]:
        out, self._out = self._out, []
        return joined(out)

    def _say(self, text: str) -> None:
        if not text:
            return
        if self._header is not None:
            self._header.append(text)
            if sum(map(len, self._header)) > MAX_HEADER:
                self._header_is_text()
        elif self._scan is not None:
            for place, char in enumerate(text):
                if not self._argument(char, self._scan):
                    self._put(text[place + 1 :])
                    break
        else:
            self._put(text)

    def _put(self, text: str) -> None:
        self._out.append(Piece(reasoning=text) if self.reasoning else Piece(text=text))

    def _meet(self, marker: str) -> None:
        if marker == "<|message|>" and self._header is not None:
            self._begin_message("".join(self._header))
        elif self._header is not None:
            self._header.append(marker)
        elif marker in ("<|end|>", "<|call|>", "<|return|>", "<|start|>"):
            self._end_message()
            self._header = []
            self.reasoning = False
        else:
            self._say(marker)  # a channel or a constraint within a message's text

    def _begin_message(self, header: str) -> None:
        self._header = None
        channel, recipient = CHANNEL.search(header), RECIPIENT.search(header)
        self.reasoning = channel is not None and channel[1] == "analysis" and recipient is None
        if recipient is None or self._tools is None:
            return
        name = recipient[1].removeprefix("functions.")
        self._scan = Scanner()
        self._raw = [header, "<|message|>"]
        self._out.append(Piece(call=ToolCallDelta(index=self.calls, id=self._new_id(), name=name)))
        if name not in self._tools:
            self._out.append(
                Piece(warning=f"call {self.calls}: {name[:80]!r} is none of the request's tools")
            )
        self.calls += 1

    def _argument(self, char: str, scan: Scanner) -> bool:
        """One character of a call's message; False when it is none after all."""
        self._raw.append(char)
        if char in SPACE and (scan.done or scan.expects == "outer"):
            return True
        try:
            if scan.done or (scan.expects == "outer" and char != "{"):
                raise BadJSON(f"{char!r} beside the arguments")
            scan.feed(char)
        except BadJSON as error:
            self._break(str(error))
            return False
        self._out.append(Piece(call=ToolCallDelta(index=self.calls - 1, arguments=char)))
        self.good += scan.done
        return True

    def _break(self, why: str) -> None:
        """The message is no call: it is text, header and all, and so is the rest of it."""
        whole = self._scan is not None and self._scan.done
        if not whole:
            self._out.append(Piece(call=ToolCallDelta(index=self.calls - 1, retracted=True)))
        self._out.append(Piece(warning=f"a tool call is malformed and returned as text: {why}"))
        self._put(self._raw[-1] if whole else "".join(self._raw))
        self._scan, self._raw = None, []

    def _end_message(self) -> None:
        if self._scan is not None and not self._scan.done:
            self._break("it has no end")
        self._scan, self._raw = None, []

    def _header_is_text(self) -> None:
        """A header that no message follows. The format's own opening of a message is not shown."""
        header = "".join(self._header or ())
        self._header = None
        if header.replace("<|start|>", "").strip() not in ("", "assistant"):
            self._out.append(Piece(warning="a message header without a message is returned as text"))
            self._put(header)
