"""Calls with a tag for each argument, its value raw (Qwen3-Coder; DeepSeek's DSML)."""

import json
from typing import Any

from galley.runtime.text.reader import MAX_NAME, NAME, Malformed, Said, Schemas

__all__ = ["TaggedCall"]


class TaggedCall:
    """A tag for the function, one for each parameter; values raw, their types from the tool's schema."""

    def __init__(self, tags: tuple[str, str, str, str], schemas: Schemas) -> None:
        self.out: Said = []
        self.done = False
        self.odd: list[str] = []
        """Parameters whose value was not of the type its schema has; passed on as strings."""
        self._function, self._parameter, self._value_end, self._function_end = tags
        self._schemas = schemas
        self._name = ""
        self._params: set[str] = set()
        self._key = ""
        self._typed: bool | None = None
        self._phase = "function" if self._function else "name"
        self._text = ""
        self._value: list[str] = []

    @property
    def complete(self) -> bool:
        return self.done

    def feed(self, char: str) -> None:
        getattr(self, f"_in_{self._phase}")(char)

    def _in_function(self, char: str) -> None:
        """White space, then the function's tag."""
        self._text = (self._text + char).lstrip()
        if self._text == self._function:
            self._phase, self._text = "name", ""
        elif not self._function.startswith(self._text):
            raise Malformed(f"{self._text[:40]!r} opens no function")

    def _in_name(self, char: str) -> None:
        if char != ">":
            self._text += char
            if len(self._text) > MAX_NAME:
                raise Malformed("no end of the name")
            return
        self._name = self._text.strip().strip('"')
        if not NAME.fullmatch(self._name):
            raise Malformed(f"{self._name[:80]!r} is no name")
        self.out.append(("start", self._name))
        self._phase, self._text = "between", ""

    def _in_between(self, char: str) -> None:
        """White space, then a parameter or the end of the function."""
        self._text = (self._text + char).lstrip()
        if self._text == self._parameter:
            self._phase, self._text = "key", ""
        elif self._text == self._function_end:
            self.out += [("args", "}" if self._params else "{}"), ("end", "")]
            self.done = True
        elif not (self._parameter.startswith(self._text) or self._function_end.startswith(self._text)):
            raise Malformed(f"{self._text[:40]!r} between parameters")

    def _in_key(self, char: str) -> None:
        if char != ">":
            self._text += char
            if len(self._text) > MAX_NAME:
                raise Malformed("no end of a parameter's name")
            return
        # DSML writes name="a" string="true"; the others nothing but the name.
        self._key, _, rest = self._text.partition('"')
        self._typed = None if not rest else 'string="true"' not in rest
        if not self._key.strip() or self._key in self._params:
            raise Malformed(f"the parameter {self._key[:80]!r} is nameless or there twice")
        self._phase, self._text, self._value = "value", "", []

    def _in_value(self, char: str) -> None:
        """Up to the end tag. One that no parameter and no function's end follows is part of the value."""
        self._value.append(char)
        self._text = (self._text + char)[-len(self._value_end) :]
        if self._text == self._value_end:
            self._phase, self._text = "end", ""

    def _in_end(self, char: str) -> None:
        self._text += char
        tail = self._text.lstrip()
        if tail in (self._parameter, self._function_end):
            self._argument("".join(self._value)[: -len(self._value_end)])
            self._phase, text, self._text = "between", tail, ""
            for each in text:
                self.feed(each)
        elif len(self._text) > MAX_NAME or not (
            self._parameter.startswith(tail) or self._function_end.startswith(tail)
        ):
            self._phase, text, self._text = "value", self._text, ""
            for each in text:
                self.feed(each)

    def _argument(self, raw: str) -> None:
        raw = raw.removeprefix("\n").removesuffix("\n")
        lead = ", " if self._params else "{"
        self._params.add(self._key)
        spelled = json.dumps(self._key, ensure_ascii=False) + ": " + self._spelled(raw)
        self.out.append(("args", lead + spelled))

    def _spelled(self, raw: str) -> str:
        """The value as JSON: a string where the schema says so, else what it spells."""
        typed = self._typed if self._typed is not None else not self._is_string()
        if typed:
            try:
                return json.dumps(json.loads(raw, parse_constant=no_constant), ensure_ascii=False)
            except (ValueError, RecursionError):
                if self._schema() is not None:
                    self.odd.append(self._key)
        return json.dumps(raw, ensure_ascii=False)

    def _schema(self) -> Any:
        tool = self._schemas.get(self._name)
        properties = tool.get("properties") if isinstance(tool, dict) else None
        return properties.get(self._key) if isinstance(properties, dict) else None

    def _is_string(self) -> bool:
        schema = self._schema()
        if not isinstance(schema, dict):
            return False
        if schema.get("type") == "string":
            return True
        options = schema.get("enum")
        return "type" not in schema and isinstance(options, list) and all(isinstance(o, str) for o in options)


def no_constant(word: str) -> Any:
    """NaN and Infinity, which Python reads and JSON does not know."""
    raise ValueError(f"{word} is no JSON")
