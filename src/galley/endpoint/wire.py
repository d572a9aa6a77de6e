"""Reading JSON bodies: every value checked once, every fault named by its path and code."""

import json
import re
from typing import Any

import msgspec

from galley.errors import InvalidRequest, UnsupportedParameter

__all__ = ["Fields", "header_list", "parse_object"]

NAMES_SHOWN = 64

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bad_words": ([],),
    "cfg_scale": (1, 1.0),
    "continue_final_message": (False,),
    "documents": ([],),
    "dry_multiplier": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": ("",),
    "logits_processors": ([],),
    "mirostat": (0,),
    "mm_processor_kwargs": ({},),
    "options": ({},),
    "repeat_penalty": (1, 1.0),
    "suffix": ("",),
    "tfs_z": (1, 1.0),
    "think": (False,),
    "tool_calls": ([],),
    "tool_choice": ("none",),
    "tools": ([],),
    "typical_p": (1, 1.0),
    "use_beam_search": (False,),
    "xtc_probability": (0, 0.0),
}
"""Values of parameters that are not implemented which ask for no more than what happens anyway."""


def invalid(message: str, param: str | None, code: str) -> InvalidRequest:
    """An InvalidRequest in one line."""
    return InvalidRequest(message, param=param, code=code)


def parse_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises InvalidRequest ``invalid_json``, or names what is at fault.

    Lone surrogates (``"\\ud800"``) and numbers of any length are legal JSON: they are found with the slow
    reader, so that the error can say where. So are NUL, which is no text, and a key given twice, of which one
    would be dropped unseen.
    """
    try:
        found = msgspec.json.decode(body)
    except RecursionError:
        raise invalid("The body is nested too deeply.", None, "invalid_json") from None
    except UnicodeDecodeError:
        raise invalid("The body is not valid UTF-8.", None, "invalid_json") from None
    except (msgspec.DecodeError, ValueError) as error:
        _blame(body)
        raise invalid(f"The body is not valid JSON: {error}", None, "invalid_json") from None
    if not isinstance(found, dict):
        raise invalid(f"The body must be a JSON object, not {kind(found)}.", None, "invalid_type")
    _refuse_twins(body, found)
    if b"\\u0000" in body:
        _blame(body)
    return found


def _refuse_twins(body: bytes, found: dict[str, Any]) -> None:
    """Raise for an object with the same key twice. One pass of the C reader, and none where every quote with
    a colon behind it is one of the keys that were read: then each stands there once."""
    if len(KEYS.findall(body)) == count_keys(found):
        return

    def pairs(items: list[tuple[str, Any]]) -> None:
        if len({key for key, _ in items}) < len(items):
            keys = [key for key, _ in items]
            twin = next(key for number, key in enumerate(keys) if key in keys[:number])[:64]
            raise invalid(f"The key {twin!r} is given twice.", twin, "duplicate_key")

    try:
        json.loads(body, object_pairs_hook=pairs, parse_int=len, parse_float=len)
    except RecursionError:
        raise invalid("The body is nested too deeply.", None, "invalid_json") from None


KEYS = re.compile(rb'"[ \t\r\n]*:')


def count_keys(found: Any) -> int:
    """Keys of all objects within a value."""
    if isinstance(found, dict):
        return len(found) + sum(count_keys(each) for each in found.values() if type(each) in (dict, list))
    if isinstance(found, list):
        return sum(count_keys(each) for each in found if type(each) in (dict, list))
    return 0


class _Long:
    """A whole number of more digits than are read."""

    def __init__(self, digits: str) -> None:
        self.negative = digits.startswith("-")


def _blame(body: bytes) -> None:
    """Raise with the path of the first value that is legal JSON and yet of no use, if that is the trouble."""
    try:
        found = json.loads(body, parse_int=lambda digits: _Long(digits) if len(digits) > 19 else 0)
    except (ValueError, RecursionError):
        return
    stack: list[tuple[str, Any]] = [("", found)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, str):
            _blame_text(value, path or "The body", path)
        elif isinstance(value, _Long):
            side = "below_min" if value.negative else "above_max"
            raise invalid(f"{path!r} is a number of too many digits.", path, f"integer_{side}_value")
        elif isinstance(value, dict):
            stack.extend((f"{path}.{key}" if path else str(key), item) for key, item in value.items())
            for key in value:
                _blame_text(key, "A field name", path or None)
        elif isinstance(value, list):
            stack.extend((f"{path}[{i}]", item) for i, item in enumerate(value))


def _blame_text(text: str, what: str, path: str | None) -> None:
    if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise invalid(f"{what} holds a lone surrogate, which is not text.", path, "invalid_value")
    if "\x00" in text:
        raise invalid(f"{what} holds a NUL character.", path, "invalid_value")


def kind(value: object) -> str:
    """The JSON name of a value's type, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    for types, name in (
        (str, "a string"),
        ((int, float), "a number"),
        (list, "an array"),
        (dict, "an object"),
    ):
        if isinstance(value, types):
            return name
    return type(value).__name__


def header_list(names: list[str]) -> str:
    """Names from a stranger as one safe header value; what does not fit is counted, not dropped unseen."""
    shown = [re.sub(r"[^A-Za-z0-9_.\[\]-]", "?", name[:64]) for name in names[:NAMES_SHOWN]]
    if len(names) > NAMES_SHOWN:
        shown.append(f"+{len(names) - NAMES_SHOWN}-more")
    return ", ".join(shown)


class Fields:
    """Typed reading of one JSON object. ``null`` counts as absent. Remembers what was read."""

    def __init__(self, body: dict[str, Any], path: str = "") -> None:
        self.body = body
        self.path = path
        self._read: set[str] = set()

    def at(self, name: str) -> str:
        """The full path of a field."""
        return f"{self.path}.{name}" if self.path else name

    def raw(self, name: str) -> Any:
        """The value as it came; None when absent."""
        self._read.add(name)
        return self.body.get(name)

    def rest(self) -> list[str]:
        """Paths of the fields that nobody read, nulls left out."""
        return [self.at(n) for n in self.rest_names()]

    def rest_names(self) -> list[str]:
        """Their bare names."""
        return [n for n, v in self.body.items() if n not in self._read and v is not None]

    def need(self, name: str) -> Any:
        """A value that must be there. Raises ``missing_required_parameter``."""
        value = self.raw(name)
        if value is None:
            path = self.at(name)
            raise invalid(f"Missing required parameter: {path!r}.", path, "missing_required_parameter")
        return value

    def refuse(self, names: tuple[str, ...], why: str = "is not supported here") -> None:
        """Fields that would change the answer and are not implemented are a 400, unless they say what happens
        anyway (``NEUTRAL``)."""
        self._read.update(names)
        if self.body.keys().isdisjoint(names):
            return
        for name in names:
            value = self.body.get(name)
            if value is not None and not any(
                type(value) is type(same) and value == same for same in NEUTRAL.get(name, ())
            ):
                raise UnsupportedParameter(f"{self.at(name)!r} {why}.", param=self.at(name))

    def wrong(self, name: str, wanted: str, value: object) -> InvalidRequest:
        path = self.at(name)
        return invalid(
            f"Invalid type for {path!r}: expected {wanted}, got {kind(value)}.", path, "invalid_type"
        )

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "a boolean", value)
        return value

    def integer(self, name: str, low: int | None = None, high: int | None = None) -> int | None:
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "an integer", value)
        self._range(name, value, low, high, "integer")
        return value

    def number(self, name: str, low: float | None = None, high: float | None = None) -> float | None:
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, "a number", value)
        self._range(name, value, low, high, "decimal")
        return float(value)

    def _range(self, name: str, value: float, low: float | None, high: float | None, sort: str) -> None:
        path = self.at(name)
        if low is not None and value < low:
            message = f"Invalid {path!r}: {value} is below the minimum of {low}."
            raise invalid(message, path, f"{sort}_below_min_value")
        if high is not None and value > high:
            message = f"Invalid {path!r}: {value} is above the maximum of {high}."
            raise invalid(message, path, f"{sort}_above_max_value")

    def text(self, name: str, longest: int | None = None) -> str | None:
        value = self.raw(name)
        return None if value is None else self.checked(value, name, longest)

    def checked(self, value: object, name: str, longest: int | None = None) -> str:
        """A string without NUL. ``name`` may carry an index (``stop[3]``)."""
        if not isinstance(value, str):
            raise self.wrong(name, "a string", value)
        path = self.at(name)
        if "\x00" in value:
            raise invalid(f"{path!r} holds a NUL character.", path, "invalid_value")
        if longest is not None and len(value) > longest:
            message = f"{path!r} has {len(value)} characters; at most {longest} are allowed."
            raise invalid(message, path, "string_above_max_length")
        return value

    def choice(self, name: str, allowed: tuple[str, ...]) -> str | None:
        value = self.text(name)
        if value is not None and value not in allowed:
            message = f"Invalid value for {self.at(name)!r}: {value[:100]!r}. Allowed: {', '.join(allowed)}."
            raise invalid(message, self.at(name), "invalid_value")
        return value

    def array(self, name: str, longest: int | None = None) -> list[Any] | None:
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.wrong(name, "an array", value)
        if longest is not None and len(value) > longest:
            message = f"{self.at(name)!r} has {len(value)} items; at most {longest} are allowed."
            raise invalid(message, self.at(name), "array_above_max_length")
        return value

    def integers(self, name: str, longest: int | None = None) -> list[int] | None:
        value = self.array(name, longest)
        for i, item in enumerate(value or ()):
            if isinstance(item, bool) or not isinstance(item, int):
                raise self.wrong(f"{name}[{i}]", "an integer", item)
        return value

    def object(self, name: str) -> "Fields | None":
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object", value)
        return Fields(value, self.at(name))
