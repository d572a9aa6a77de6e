"""Reading what the output must look like: ``response_format``, and vLLM's fields of the same purpose."""

from typing import Any

from galley.endpoint.wire import Fields, invalid
from galley.errors import UnsupportedParameter
from galley.types import StructuredOutputs

__all__ = ["read_structure"]

KINDS = ("json", "regex", "choice", "grammar")


def read_structure(fields: Fields) -> tuple[StructuredOutputs | None, str]:
    """The form that is wanted, and the path of the field that says so; None and an empty path for any text.

    ``response_format`` of OpenAI; ``structured_outputs`` and the older ``guided_*`` of vLLM. More than one is
    an error: which should count?
    """
    found = [read_format(fields), read_outputs(fields), *read_guided(fields)]
    asked = [(wanted, path) for wanted, path in found if wanted is not None]
    if len(asked) > 1:
        raise invalid(
            f"{asked[0][1]!r} and {asked[1][1]!r} exclude each other.", asked[1][1], "invalid_value"
        )
    return asked[0] if asked else (None, "")


def read_format(fields: Fields) -> tuple[StructuredOutputs | None, str]:
    """``response_format``."""
    shape = fields.object("response_format")
    if shape is None:
        return None, ""
    shape.need("type")
    kind = shape.choice("type", ("text", "json_object", "json_schema"))
    if kind == "json_object":
        return StructuredOutputs(json_object=True), "response_format"
    if kind != "json_schema":
        return None, ""
    shape.need("json_schema")
    inner = shape.object("json_schema")
    assert inner is not None
    inner.checked(inner.need("name"), "name", 64)
    inner.text("description")
    schema = inner.object("schema")
    wanted = StructuredOutputs(json={} if schema is None else schema.body, strict=inner.boolean("strict"))
    return wanted, inner.at("schema")


def read_outputs(fields: Fields) -> tuple[StructuredOutputs | None, str]:
    """``structured_outputs``."""
    inner = fields.object("structured_outputs")
    if inner is None:
        return None, ""
    inner.refuse(("structural_tag", "backend", "disable_any_whitespace", "disable_additional_properties"))
    given = [name for name in KINDS if inner.raw(name) is not None]
    given += ["json_object"] if inner.boolean("json_object") else []
    if len(given) != 1:
        message = f"{inner.path!r} must hold exactly one of {', '.join((*KINDS, 'json_object'))}."
        raise invalid(message, inner.path, "invalid_value")
    unread = inner.rest()
    if [name for name in unread if not name.endswith(".whitespace_pattern")]:
        raise UnsupportedParameter(f"{unread[0]!r} is not known.", param=unread[0])
    pattern = inner.text("whitespace_pattern")
    if given == ["json_object"]:
        return StructuredOutputs(json_object=True, whitespace_pattern=pattern), inner.path
    return read_kind(inner, given[0], given[0], pattern), inner.at(given[0])


def read_guided(fields: Fields) -> list[tuple[StructuredOutputs | None, str]]:
    """``guided_json``, ``guided_regex``, ``guided_choice``, ``guided_grammar``."""
    found: list[tuple[StructuredOutputs | None, str]] = []
    pattern = fields.text("guided_whitespace_pattern")
    for kind in KINDS:
        name = f"guided_{kind}"
        if fields.raw(name) is not None:
            found.append((read_kind(fields, name, kind, pattern), fields.at(name)))
    return found


def read_kind(fields: Fields, name: str, kind: str, pattern: str | None) -> StructuredOutputs:
    """One field of one kind."""
    value: Any = fields.raw(name)
    if kind == "json":
        if not isinstance(value, dict | str | bool):
            raise fields.wrong(name, "a schema, as an object or as text", value)
        return StructuredOutputs(json=value, whitespace_pattern=pattern)
    if kind == "choice":
        texts = [
            fields.checked(item, f"{name}[{i}]") for i, item in enumerate(fields.array(name, 4096) or ())
        ]
        if not texts or not all(texts):
            raise invalid(f"{fields.at(name)!r} needs texts to choose from.", fields.at(name), "empty_array")
        return StructuredOutputs(choice=texts)
    text = fields.checked(value, name)
    return StructuredOutputs(regex=text) if kind == "regex" else StructuredOutputs(grammar=text)
