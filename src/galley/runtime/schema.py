"""Where in a JSON schema something is: the place of a keyword that cannot be enforced (draft 2020-12)."""

import re
from collections.abc import Iterator
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
"""Character classes of which regex dialects have different ideas: ASCII or all of Unicode, or none at all."""


def unenforced(schema: Any) -> list[Place]:
    """Places that the engine accepts though not every validator would agree with what it makes of them.

    Patterns with classes on which dialects differ; and a least number of properties that only keys not listed
    can make up, since those may come twice and count once.
    """
    found: list[Place] = []
    for path, each in subschemas(schema, []):
        patterns = [each.get("pattern")] if isinstance(each.get("pattern"), str) else []
        if any(DIALECTS.search(text) for text in patterns if text):
            why = "a pattern with \\p, \\P, \\W or \\D, which regex dialects read differently"
            found.append(Place([*path, "pattern"], each, "pattern", why))
        keyed = each.get("patternProperties")
        if isinstance(keyed, dict) and any(DIALECTS.search(name) for name in keyed):
            why = "a pattern with \\p, \\P, \\W or \\D, which regex dialects read differently"
            found.append(Place([*path, "patternProperties"], each, "patternProperties", why))
        least, required = each.get("minProperties"), each.get("required")
        sure = len(required) if isinstance(required, list) else 0
        if isinstance(least, int) and least - sure > 1:
            why = "minProperties that keys without a name in the schema would have to make up"
            found.append(Place([*path, "minProperties"], each, "minProperties", why))
    return found
