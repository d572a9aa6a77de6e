"""Python literals, read without Python: the arguments of a pythonic tool call."""

import re
from typing import Any

__all__ = ["arguments_of"]

MAX_DEPTH = 64
WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
NAME = re.compile(r"[^\W\d]\w*")
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0"}
ESCAPES |= {"\\": "\\", "'": "'", '"': '"', "/": "/", "\n": ""}
CODES = {"x": 2, "u": 4, "U": 8}


def arguments_of(text: str) -> dict[str, Any]:
    """``a=1, b="x"`` as a dict. Raises ValueError for anything but keywords with literal values. O(len)."""
    reader = Reader(text)
    found: dict[str, Any] = {}
    reader.space()
    while not reader.over():
        name = reader.name()
        reader.take("=")
        if name in found:
            raise ValueError(f"{name!r} is given twice")
        found[name] = reader.value(0)
        reader.space()
        if reader.over():
            break
        reader.take(",")
        reader.space()
    return found


class Reader:
    """A recursive descent over one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0

    def over(self) -> bool:
        """Nothing is left."""
        return self.place >= len(self.text)

    @property
    def char(self) -> str:
        return self.text[self.place] if self.place < len(self.text) else ""

    def wrong(self) -> ValueError:
        return ValueError(f"no literal at {self.text[self.place : self.place + 20]!r}")

    def space(self) -> None:
        while self.char and self.char in " \t\r\n":
            self.place += 1

    def take(self, char: str) -> None:
        self.space()
        if self.char != char:
            raise self.wrong()
        self.place += 1

    def name(self) -> str:
        match = NAME.match(self.text, self.place)
        if match is None:
            raise self.wrong()
        self.place = match.end()
        return match[0]

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        self.space()
        char = self.char
        if char and char in "\"'":
            return self.string()
        if char == "[":
            return self.items("]", depth)
        if char == "(":
            return self.items(")", depth)
        if char == "{":
            return self.table(depth)
        number = NUMBER.match(self.text, self.place)
        if number is not None:
            self.place = number.end()
            whole = re.fullmatch(r"[+-]?\d+", number[0])
            spelled = float(number[0])
            if whole is None and abs(spelled) == float("inf"):
                raise ValueError(f"{number[0]} is too large")
            return int(number[0]) if whole is not None else spelled
        word = self.name()
        if word not in WORDS:
            raise ValueError(f"{word!r} is no literal")
        return WORDS[word]

    def items(self, close: str, depth: int) -> list[Any]:
        self.place += 1
        found: list[Any] = []
        self.space()
        while self.char != close:
            found.append(self.value(depth + 1))
            self.space()
            if self.char != close:
                self.take(",")
                self.space()
        self.place += 1
        return found

    def table(self, depth: int) -> dict[str, Any]:
        self.place += 1
        found: dict[str, Any] = {}
        self.space()
        while self.char != "}":
            key = self.value(depth + 1)
            if not isinstance(key, str):
                raise ValueError("a key that is no string")
            self.take(":")
            found[key] = self.value(depth + 1)
            self.space()
            if self.char != "}":
                self.take(",")
                self.space()
        self.place += 1
        return found

    def string(self) -> str:
        quote = self.char
        self.place += 1
        out: list[str] = []
        while self.char != quote:
            char = self.char
            if not char:
                raise ValueError("a string without an end")
            self.place += 1
            out.append(self.escape() if char == "\\" else char)
        self.place += 1
        # Surrogate pairs come escaped one by one; a lone one is no text and goes no further.
        return "".join(out).encode("utf-16", "surrogatepass").decode("utf-16")

    def escape(self) -> str:
        char = self.char
        self.place += 1
        if char in CODES:
            digits = self.text[self.place : self.place + CODES[char]]
            if (
                not re.fullmatch(r"[0-9a-fA-F]+", digits)
                or len(digits) < CODES[char]
                or int(digits, 16) > 0x10FFFF
            ):
                raise ValueError(f"\\{char}{digits} in a string")
            self.place += CODES[char]
            return chr(int(digits, 16))
        # Python keeps a backslash before a letter it does not know.
        return ESCAPES.get(char, "\\" + char)
