"""Where in a JSON schema something is: the place of a keyword that cannot be enforced (draft 2020-12)."""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

__all__ = ["Place", "blame", "unenforced"]

ONE = ("additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not")
MORE = ("propertyNames", "then", "unevaluatedItems", "unevaluatedProperties")
BY_NAME = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems")


class Place:
    """One keyword of one subschema. ``path`` leads to it from the root; ``why`` it is named."""

    def __init__(self, path: list[str], schema: dict[str, Any], keyword: str, why: str) -> None:
        self.path = path
        self.why = why
        self._schema = schema
        self._keyword = keyword

    def take_out(self) -> str:
        """Remove the keyword from its schema; what became of it, in words."""
        value = self._schema.pop(self._keyword)
        if self._keyword == "oneOf" and "anyOf" not in self._schema:
            self._schema["anyOf"] = value
            return "read as anyOf: more than one may match"
        return "not enforced"


def subschemas(schema: Any, path: list[str]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Every subschema with its path, outer ones first. O(size); refs are not followed."""
    waiting = [(path, schema)]
    for here, found in waiting:
        if not isinstance(found, dict):
            continue
        yield here, found
        for keyword, value in found.items():
            at = [*here, keyword]
            if keyword in BY_NAME and isinstance(value, dict):
                waiting += [([*at, name], inner) for name, inner in value.items()]
            elif isinstance(value, list) and (keyword in SEVERAL or keyword == "items"):
                waiting += [([*at, str(number)], inner) for number, inner in enumerate(value)]
            elif keyword in ONE or keyword in MORE:
                waiting.append((at, value))


def blame(schema: Any, message: str) -> list[Place]:
    """The places a compiler's message is about, as far as it can be told; the same for every place alike."""
    named: set[str] = set()
    listed = re.match(r"Unimplemented keys: \[(.*?)\]", message)
    if listed is not None:
        named.update(re.findall(r'"([^"]*)"', listed[1]))
    formats = re.findall(r"Unknown format: (.*)", message)
    found = []
    for path, each in subschemas(schema, []):
        for keyword, value in each.items():
            hit = keyword in named
            if keyword == "format":
                hit = hit or value in formats
            elif keyword == "$ref" and not named:
                hit = isinstance(value, str) and value in message
            elif keyword == "pattern" and not named:
                hit = isinstance(value, str) and "regex" in message and value in message
            elif keyword == "patternProperties" and not named:
                hit = (
                    isinstance(value, dict) and "regex" in message and any(name in message for name in value)
                )
            elif not named and not formats:
                hit = (
                    re.search(rf"(?<![\w$]){re.escape(keyword)}(?!\w)", message) is not None
                    and keyword != "type"
                )
            if hit:
                found.append(Place([*path, keyword], each, keyword, message))
    return found


DIALECTS = re.compile(r"\\[pPWD]")
UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")


def unenforced(schema: Any) -> list[Place]:
    """Places that the engine accepts though not every validator would agree with what it makes of them."""
    found: list[Place] = []
    for path, each in subschemas(schema, []):
        for keyword, why in doubts(each):
            found.append(Place([*path, keyword], each, keyword, why))
    return found


def doubts(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keywords of one subschema that are better refused, and why."""
    dialect = "a pattern with \\p, \\P, \\W or \\D, which regex dialects read differently"
    pattern, keyed = schema.get("pattern"), schema.get("patternProperties")
    if isinstance(pattern, str) and DIALECTS.search(pattern):
        yield "pattern", dialect
    if isinstance(keyed, dict) and any(DIALECTS.search(name) for name in keyed):
        yield "patternProperties", dialect
    least, required = schema.get("minProperties"), schema.get("required")
    sure = len(required) if isinstance(required, list) else 0
    if isinstance(least, int) and least - sure > 1:
        # The same name may be written twice, and counts once.
        yield "minProperties", "minProperties that keys without a name in the schema would have to make up"
    step = schema.get("multipleOf")
    if isinstance(step, float):
        denominator = Fraction(str(step)).denominator
        if denominator & (denominator - 1):
            yield "multipleOf", "multipleOf a fraction without an exact binary form, which validators round"
    for keyword in ("const", "enum", "properties", "required"):
        # Only a \\u escape could write them, and those are not allowed: see guided.EXACT.
        spelled = schema.get(keyword)
        names = list(spelled) if keyword == "properties" and isinstance(spelled, dict) else [spelled]
        if any(UNWRITABLE.search(text) for name in names for text in strings(name)):
            yield keyword, "a control character in a text, which only an escape could write"


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    waiting = [value]
    for each in waiting:
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, list):
            waiting += each
