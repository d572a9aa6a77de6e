"""Calls written as Python (Llama 3.2 and 4)."""

import json

from galley.runtime.text.jsonscan import SPACE
from galley.runtime.text.literals import arguments_of
from galley.runtime.text.reader import MAX_NAME, Malformed, Said

__all__ = ["PythonicCalls"]


class PythonicCalls:
    """``[f(a=1), g(b="x")]``, or without brackets one ``f.call(a=1)``, as Llama's own tools are called."""

    def __init__(self, known: frozenset[str] | None, *, single: bool = False) -> None:
        self.out: Said = []
        self.done = False
        self._known = known
        self._single = single
        self._phase = "item" if single else "["
        self._text = ""
        self._arguments: list[str] = []
        self._name = ""
        self._closers: list[str] = []
        self._quote = ""
        self._escaped = False

    @property
    def complete(self) -> bool:
        return self.done

    def feed(self, char: str) -> None:
        if self._phase == "arguments":
            self._in_arguments(char)
        elif self._phase == "item" and char == "(":
            self._open()
        elif self._phase == "item" and (char.isalnum() or char in "_.-"):
            self._text += char
            if len(self._text) > MAX_NAME:
                raise Malformed("no end of the name")
        elif char in SPACE and not self._text:
            return
        elif (self._phase == "[" and char == "[") or (self._phase == "after" and char == ","):
            self._phase = "item"
        elif self._phase == "after" and char == "]":
            self.done = True
        else:
            raise Malformed(f"{char!r} in a list of calls")

    def _open(self) -> None:
        name = self._text.removesuffix(".call") if self._single else self._text
        if not name or not (name[0].isalpha() or name[0] == "_"):
            raise Malformed(f"{name[:80]!r} is no name")
        if self._known is not None and name not in self._known:
            raise Malformed(f"{name!r} is none of the tools")
        self._name, self._text = name, ""
        self._closers = [")"]
        self._phase = "arguments"

    def _in_arguments(self, char: str) -> None:
        """Only finds the closing parenthesis; the arguments are parsed once, as a whole."""
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == self._quote:
                self._quote = ""
        elif char in "\"'":
            self._quote = char
        elif char in "([{":
            self._closers.append({"(": ")", "[": "]", "{": "}"}[char])
            if len(self._closers) > 64:
                raise Malformed("nested deeper than 64")
        elif char in ")]}":
            if char != self._closers.pop():
                raise Malformed(f"{char!r} out of place")
            if not self._closers:
                self._close()
                return
        self._arguments.append(char)

    def _close(self) -> None:
        try:
            arguments = arguments_of("".join(self._arguments))
        except ValueError as error:
            raise Malformed(str(error)) from None
        spelled = json.dumps(arguments, ensure_ascii=False)
        self.out += [("start", self._name), ("args", spelled), ("end", "")]
        self._arguments = []
        self._phase = "after"
        self.done = self._single
