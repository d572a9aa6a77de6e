"""JSON as it arrives, character by character: is it the beginning of a JSON value so far? (RFC 8259)"""

__all__ = ["BadJSON", "Scanner"]

MAX_DEPTH = 128
SPACE = " \t\n\r"
DIGITS = "0123456789"
# Number states: the characters that may follow and where they lead; a state marked final may end the number.
NUMBER: dict[str, dict[str, str]] = {
    "minus": {"0": "zero"} | dict.fromkeys("123456789", "int"),
    "zero": {".": "dot", "e": "exp", "E": "exp"},
    "int": dict.fromkeys(DIGITS, "int") | {".": "dot", "e": "exp", "E": "exp"},
    "dot": dict.fromkeys(DIGITS, "frac"),
    "frac": dict.fromkeys(DIGITS, "frac") | {"e": "exp", "E": "exp"},
    "exp": dict.fromkeys(DIGITS, "digits") | {"+": "sign", "-": "sign"},
    "sign": dict.fromkeys(DIGITS, "digits"),
    "digits": dict.fromkeys(DIGITS, "digits"),
}
FINAL = frozenset(("zero", "int", "frac", "digits"))


class BadJSON(ValueError):
    """The characters so far begin no JSON value."""


class Scanner:
    """An incremental, strict check of one JSON object or array. O(1) a character, O(depth) memory.

    Attributes:
        depth: containers open now.
        done: the outermost container has closed; nothing more may be fed.
        expects: what may come next at the current depth: ``value``, ``first`` (a value or ``]``), ``key``,
            ``first key`` (a key or ``}``), ``colon``, ``after`` (a comma or a close); inside a scalar the
            name of its state.
    """

    __slots__ = ("_is_key", "_left", "_stack", "depth", "done", "expects")

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._is_key = False
        self._left = ""
        self.depth = 0
        self.done = False
        self.expects = "outer"

    @property
    def in_string(self) -> bool:
        """Within a string, its quotes excluded at the end."""
        return self.expects in ("string", "escape") or self.expects.startswith("hex")

    def feed(self, char: str) -> None:
        """One more character. Raises BadJSON if no JSON value begins like this."""
        state = self.expects
        if state == "string":
            self._string(char)
        elif state in NUMBER:
            follow = NUMBER[state].get(char)
            if follow is not None:
                self.expects = follow
            elif state in FINAL:
                self.expects = "after"
                self.feed(char)
            else:
                raise BadJSON(f"{char!r} in a number")
        elif state == "literal":
            if char != self._left[0]:
                raise BadJSON(f"{char!r} in a word")
            self._left = self._left[1:]
            if not self._left:
                self.expects = "after"
        elif state == "escape":
            if char == "u":
                self.expects = "hex4"
            elif char in '"\\/bfnrt':
                self.expects = "string"
            else:
                raise BadJSON(f"\\{char} in a string")
        elif state.startswith("hex"):
            if char not in "0123456789abcdefABCDEF":
                raise BadJSON(f"{char!r} in a \\u escape")
            left = int(state[3:]) - 1
            self.expects = f"hex{left}" if left else "string"
        elif char not in SPACE:
            self._structure(state, char)

    def _string(self, char: str) -> None:
        if char == '"':
            self.expects = "colon" if self._is_key else "after"
        elif char == "\\":
            self.expects = "escape"
        elif char < " ":
            raise BadJSON(f"{char!r} in a string")

    def _structure(self, state: str, char: str) -> None:
        if state == "colon":
            if char != ":":
                raise BadJSON(f"{char!r} after a key")
            self.expects = "value"
        elif state == "after" and char == ",":
            self.expects = "key" if self._stack[-1] == "}" else "value"
        elif char in "}]":
            if state not in ("after", "first", "first key") or self._stack[-1] != char:
                raise BadJSON(f"{char!r} out of place")
            self._stack.pop()
            self.depth -= 1
            self.expects = "after"
            self.done = not self._stack
        elif state in ("key", "first key"):
            if char != '"':
                raise BadJSON(f"{char!r} where a key should begin")
            self._is_key, self.expects = True, "string"
        elif state in ("value", "first", "outer"):
            self._value(char)
        else:
            raise BadJSON(f"{char!r} out of place")

    def _value(self, char: str) -> None:
        if char in "{[":
            if self.depth == MAX_DEPTH:
                raise BadJSON(f"nested deeper than {MAX_DEPTH}")
            self._stack.append("}" if char == "{" else "]")
            self.depth += 1
            self.expects = "first key" if char == "{" else "first"
        elif not self._stack:
            raise BadJSON(f"{char!r} opens no object or array")
        elif char == '"':
            self._is_key, self.expects = False, "string"
        elif char == "-":
            self.expects = "minus"
        elif char in DIGITS:
            self.expects = "zero" if char == "0" else "int"
        elif char in "tfn":
            self._left = {"t": "rue", "f": "alse", "n": "ull"}[char]
            self.expects = "literal"
        else:
            raise BadJSON(f"{char!r} begins no value")
