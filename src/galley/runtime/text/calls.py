"""Readers of calls whose arguments are JSON, and the choice of a reader for a format."""

import json

from galley.runtime.text.formats import ChatFormat
from galley.runtime.text.jsonscan import NUMBER, SPACE, BadJSON, Scanner
from galley.runtime.text.pythonic import PythonicCalls
from galley.runtime.text.reader import MAX_NAME, NAME, CallReader, Malformed, Said, Schemas
from galley.runtime.text.tagged import TaggedCall

__all__ = ["Tail", "reader_of"]


class Tail:
    """What closes a call, read without regard to white space. ``text`` is what was read so far."""

    def __init__(self, expected: str) -> None:
        self._expected = "".join(expected.split())
        self._place = 0
        self.text = ""

    @property
    def done(self) -> bool:
        return self._place == len(self._expected)

    def feed(self, char: str) -> bool:
        """Whether the character belongs to it."""
        self.text += char
        if char in SPACE:
            return True
        if char != self._expected[self._place]:
            return False
        self._place += 1
        return True


class ObjectCall:
    """``{"name": "f", "arguments": {…}}``, keys in any order."""

    def __init__(self, keys: tuple[str, str], *, known: frozenset[str] | None = None) -> None:
        """``known``: the call has no marker, so its keys must be a call's and it must name one of these."""
        self.out: Said = []
        self._keys = keys
        self._known = known
        self._scan = Scanner()
        self._name: str | None = None
        self._key = ""
        self._text: list[str] = []
        self._reading: str | None = None
        self._held: list[str] | None = None
        self._seen: set[str] = set()

    @property
    def complete(self) -> bool:
        return self._scan.done

    @property
    def done(self) -> bool:
        return self._scan.done

    def feed(self, char: str) -> None:
        scan = self._scan
        before, depth = scan.expects, scan.depth
        if before == "outer" and char != "{" and char not in SPACE:
            raise Malformed(f"{char!r} where a call should begin")
        try:
            scan.feed(char)
        except BadJSON as error:
            raise Malformed(str(error)) from None
        if self._reading is None:
            if depth != 1 or char in SPACE:
                return
            if before in ("key", "first key") and char == '"':
                self._reading, self._text = "key", [char]
            elif before == "value":
                self._begin_value(char)
            elif scan.done:
                self._end()
            return
        number = depth == 1 and before in NUMBER
        if number and scan.expects not in NUMBER:  # what ends a number is not part of it
            self._finish_text()
            if scan.done:
                self._end()
            return
        self._add(char)
        if scan.depth == 1 and scan.expects in ("colon", "after"):
            self._finish_text()

    def _begin_value(self, char: str) -> None:
        self._reading = "value"
        self._text = []
        if self._key == self._keys[1] and char == "{":
            self._reading = "args"
            if self._name is None:
                self._held = []
        self._add(char)

    def _add(self, char: str) -> None:
        if self._reading == "args":
            if self._held is None:
                self.out.append(("args", char))
            else:
                self._held.append(char)
        else:
            self._text.append(char)

    def _finish_text(self) -> None:
        reading, self._reading = self._reading, None
        text = "".join(self._text)
        if reading == "key":
            self._key = json.loads(text)
            allowed = (*self._keys, "type", "id", "function")
            if self._known is not None and self._key not in allowed:
                raise Malformed(f"the key {self._key!r} is none of a call")
            if self._key in self._keys:
                if self._key in self._seen:
                    raise Malformed(f"the key {self._key!r} twice")
                self._seen.add(self._key)
        elif reading == "value" and self._key == self._keys[0]:
            name = json.loads(text)
            if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > MAX_NAME:
                raise Malformed(f"{text[:80]} is no name")
            if self._known is not None and name not in self._known:
                raise Malformed(f"{name!r} is none of the tools")
            self._start(name)
        elif reading == "value" and self._key == self._keys[1]:
            self._odd_arguments(text)

    def _start(self, name: str) -> None:
        self._name = name
        self.out.append(("start", name))
        if self._held is not None:
            self.out.append(("args", "".join(self._held)))
            self._held = None

    def _odd_arguments(self, text: str) -> None:
        """Arguments that came as a string that spells them, or as null: some models do."""
        value = json.loads(text)
        if value is None:
            spelled = "{}"
        elif isinstance(value, str):
            try:
                inner = json.loads(value)
            except (ValueError, RecursionError):
                inner = None
            if not isinstance(inner, dict):
                raise Malformed("the arguments are a string that spells no object")
            spelled = value
        else:
            raise Malformed("the arguments are no object")
        if self._name is None:
            self._held = [spelled]
        else:
            self.out.append(("args", spelled))

    def _end(self) -> None:
        if self._name is None:
            raise Malformed("a call without a name")
        if self._keys[1] not in self._seen:
            self.out.append(("args", "{}"))
        self.out.append(("end", ""))


class ListedCalls:
    """``[{…}, {…}]`` of object calls."""

    def __init__(self, keys: tuple[str, str]) -> None:
        self.out: Said = []
        self._keys = keys
        self._call: ObjectCall | None = None
        self._expects = "["
        self.done = False
        self._calls = 0

    @property
    def complete(self) -> bool:
        return self._calls > 0 and self._call is None

    def feed(self, char: str) -> None:
        if self._call is not None:
            self._call.feed(char)
            self.out += self._call.out
            self._call.out = []
            if self._call.done:
                self._call, self._expects = None, ",]"
                self._calls += 1
        elif char in SPACE:
            return
        elif char not in self._expects:
            raise Malformed(f"{char!r} in a list of calls")
        elif char == "]":
            self.done = True
        elif char == "{":
            self._call = ObjectCall(self._keys)
            self._call.feed(char)
        else:
            self._expects = "{"


class NamedCall:
    """A name between two markers, then its arguments as JSON."""

    def __init__(self, record: ChatFormat) -> None:
        self.out: Said = []
        self._before = record.name_before
        self._after = record.name_after
        self._id_mark = record.id_mark
        self._head = ""
        self._scan: Scanner | None = None

    @property
    def complete(self) -> bool:
        return self._scan is not None and self._scan.done

    @property
    def done(self) -> bool:
        return self.complete

    def feed(self, char: str) -> None:
        if self._scan is None:
            self._head += char
            if self._head.endswith(self._after):
                self._start(self._head.removesuffix(self._after))
            elif len(self._head) > MAX_NAME + len(self._before) + len(self._after):
                raise Malformed("no end of the name")
            elif not (
                self._head.lstrip().startswith(self._before) or self._before.startswith(self._head.lstrip())
            ):
                raise Malformed(f"{self._head[:40]!r} begins no call")
            elif char in "{<" and self._hopeless():
                raise Malformed(f"{char!r} in a name")
            return
        if self._scan.expects == "outer":
            if char in SPACE:
                return
            if char != "{":
                raise Malformed(f"{char!r} where arguments should begin")
        try:
            self._scan.feed(char)
        except BadJSON as error:
            raise Malformed(str(error)) from None
        self.out.append(("args", char))
        if self._scan.done:
            self.out.append(("end", ""))

    def _hopeless(self) -> bool:
        """Whether the character just read belongs neither to a name nor to a marker about to come."""
        marks = (self._before, self._after, self._id_mark)
        head = self._head.lstrip()
        return not any(mark and (head[-n:] == mark[:n]) for mark in marks for n in range(1, len(mark) + 1))

    def _start(self, head: str) -> None:
        name = head.strip().removeprefix(self._before).strip()
        if self._id_mark:
            name = name.partition(self._id_mark)[0].strip()
        if not NAME.fullmatch(name):
            raise Malformed(f"{name[:80]!r} is no name")
        self.out.append(("start", name))
        self._scan = Scanner()


def reader_of(record: ChatFormat, schemas: Schemas, *, marked: bool, first: str) -> CallReader:
    """A reader for a call of this format.

    Args:
        marked: it began with a marker; without one it must name a tool of the request.
        first: its first character that is no white space.
    """
    known = None if marked else frozenset(schemas)
    if record.style == "listed":
        return ListedCalls(record.keys)
    if record.style == "named":
        return NamedCall(record)
    if record.style == "tagged":
        return TaggedCall(record.tags, schemas)
    if record.style == "pythonic":
        return PythonicCalls(known)
    if record.bare and first != "{":
        return PythonicCalls(None, single=True)
    return ObjectCall(record.keys, known=known)
