"""The grammar of tool calls, from the same record that reads them: what is enforced is what is understood.

Written in the Lark dialect of llguidance, with the parameters' schemas inline.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from galley.runtime.text.formats import ChatFormat

__all__ = ["calls_grammar", "free_grammar"]

IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


def calls_grammar(
    record: ChatFormat,
    tools: Mapping[str, Any],
    *,
    several: bool,
    literal: Callable[[str], str],
    style: Mapping[str, Any],
    opened: bool = False,
) -> str:
    """The rule ``calls`` and those it needs: one call of one of the tools, or ``several``: at least one.

    Args:
        tools: the JSON schema of each tool's parameters, by name.
        literal: spells a marker in the dialect, control tokens by their id.
        style: how JSON is written (``x-guidance``).
        opened: the first marker is written already.

    Raises ValueError for a name or a parameter that the format cannot write.
    """
    writer = Writer(record, literal, style)
    rules = [f"call: {' | '.join(f'call_{n}' for n in range(len(tools)))}"]
    for number, (name, schema) in enumerate(tools.items()):
        rules += writer.call(number, name, schema if isinstance(schema, dict) else {})
    between = writer.text(record.between)
    head = "call"
    if opened and not record.section[0]:
        # The first call's own marker is there; those of later calls are still to be written.
        head = "first"
        begun = Writer(msgspec.structs.replace(record, call=("", record.call[1])), literal, style)
        rules.append(f"first: {' | '.join(f'first_{n}' for n in range(len(tools)))}")
        for number, (name, schema) in enumerate(tools.items()):
            rules += begun.call(number, name, schema if isinstance(schema, dict) else {}, prefix="first")
    calls = f"{head} ({between} call)*" if several else head
    parts = [writer.text(record.section[0])] if record.section[0] and not opened else []
    if record.style in ("listed", "pythonic"):
        opening = record.pad + "[" if record.section[0] else "["
        parts += [writer.text(opening), calls, writer.text("]")]
    else:
        inner = writer.text("\n") if record.style == "tagged" and record.section[0] else ""
        parts += [inner, calls, inner]
    if record.section[1]:
        parts.append(writer.text(record.section[1]))
    start = " ".join(part for part in parts if part)
    return "\n".join([f"calls: {start}", *rules]) + "\n"


def free_grammar(
    record: ChatFormat,
    tools: Mapping[str, Any] | None,
    *,
    several: bool,
    literal: Callable[[str], str],
    style: Mapping[str, Any],
) -> str:
    """The rule ``free`` and those it needs: any text, and then calls of the tools if the text opens one.

    The grammar takes hold where an opening marker is complete, so nothing but a call can follow it. Without
    ``tools`` no marker can be written. Arguments otherwise as for ``calls_grammar``, which raises the same.
    """
    spelled = [marker for marker in record.openers if not literal(marker).startswith("<[")]
    barred = [f"(?s:.*){escaped(marker)}(?s:.*)" for marker in spelled]
    if record.bare:
        barred.append(f"[ \\n\\r\\t]*{escaped(record.bare)}(?s:.*)")
    text = "FREE: " + " & ".join(["/(?s:.+)/", *(f"~/{each}/" for each in barred)])
    if tools is None:
        return f"free: FREE?\n{text}\n"
    first = record.section[0] or ("" if record.bare else record.call[0])
    if not first or first not in spelled:
        calls = calls_grammar(record, tools, several=several, literal=literal, style=style)
        lead = "" if record.bare and not first else "FREE? "
        return f"free: FREE? | {lead}calls\n{text}\n{calls}"
    # The marker is text: what ends with it is the lead, and the calls go on from there.
    calls = calls_grammar(record, tools, several=several, literal=literal, style=style, opened=True)
    return f"free: FREE? | lead calls\nlead[lazy]: /(?s:.*){escaped(first)}/\n{text}\n{calls}"


class Writer:
    """Rules for single calls in one format."""

    def __init__(self, record: ChatFormat, literal: Callable[[str], str], style: Mapping[str, Any]) -> None:
        self._record = record
        self._literal = literal
        self._style = dict(style)

    def text(self, text: str) -> str:
        """A literal text, empty for none."""
        return self._literal(text) if text else ""

    def json(self, schema: Any) -> str:
        """A JSON value of a schema."""
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        return "%json " + json.dumps({**schema, "x-guidance": self._style}, ensure_ascii=False)

    def call(self, number: int, name: str, schema: dict[str, Any], *, prefix: str = "call") -> list[str]:
        """The rules of one tool's call, the first of them ``<prefix>_<number>``."""
        write = getattr(self, f"_{self._record.style}")
        return write(f"{prefix}_{number}", name, schema)  # type: ignore[no-any-return]

    def _line(self, rule: str, *parts: str) -> str:
        return f"{rule}: " + " ".join(part for part in parts if part)

    def _object(self, rule: str, name: str, schema: dict[str, Any]) -> list[str]:
        record = self._record
        body = self._spelled(name, schema)
        opened = record.call[0] if not record.bare else ""
        return [
            self._line(
                rule,
                self.text(opened),
                self.text(record.pad),
                f"{rule}_body",
                self.text(record.pad),
                self.text(record.call[1]),
            ),
            f"{rule}_body: {body}",
        ]

    def _spelled(self, name: str, schema: dict[str, Any]) -> str:
        """``{"name": "f", "arguments": {…}}``; the frame is text, so the schema keeps its own references."""
        keys = self._record.keys
        lead = f'{{"{keys[0]}": {json.dumps(name, ensure_ascii=False)}, "{keys[1]}": '
        return f"{self.text(lead)} {self.json(as_object(schema))} {self.text('}')}"

    def _listed(self, rule: str, name: str, schema: dict[str, Any]) -> list[str]:
        return [f"{rule}: {self._spelled(name, schema)}"]

    def _named(self, rule: str, name: str, schema: dict[str, Any]) -> list[str]:
        record = self._record
        head = self.text(record.call[0] + record.name_before + name + record.name_after)
        return [
            self._line(rule, head, f"{rule}_args", self.text(record.args_after), self.text(record.call[1])),
            f"{rule}_args: {self.json(as_object(schema))}",
        ]

    def _harmony(self, rule: str, name: str, schema: dict[str, Any]) -> list[str]:
        head = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        return [
            self._line(rule, self.text(head), f"{rule}_args"),
            f"{rule}_args: {self.json(as_object(schema))}",
        ]

    def _pythonic(self, rule: str, name: str, schema: dict[str, Any]) -> list[str]:
        if not all(IDENTIFIER.fullmatch(part) for part in name.split(".")):
            raise ValueError(f"{name!r} cannot be the name of a function in the format {self._record.name}")
        rules: list[str] = []
        required: list[str] = []
        optional: list[str] = []
        for place, (key, inner, needed) in enumerate(parameters(schema)):
            if not IDENTIFIER.fullmatch(key):
                raise ValueError(f"{key!r} cannot be a parameter in the format {self._record.name}")
            rules.append(f"{rule}_{place}: {self.text(key + '=')} {self.json(inner)}")
            (required if needed else optional).append(f"{rule}_{place}")
        comma = self.text(", ")
        inside = f" {comma} ".join(required)
        if required:
            inside += "".join(f" ({comma} {each})?" for each in optional)
        elif optional:
            # One of them first, then any of the later ones.
            ways = [
                each + "".join(f" ({comma} {later})?" for later in optional[place + 1 :])
                for place, each in enumerate(optional)
            ]
            inside = f"({' | '.join(ways)})?"
        return [self._line(rule, self.text(name + "("), inside, self.text(")")), *rules]

    def _tagged(self, rule: str, name: str, schema: dict[str, Any]) -> list[str]:
        record = self._record
        function, parameter, value_end, function_end = record.tags
        dsml = record.call[0].endswith('"')
        close = '">\n' if dsml else ">\n"
        rules, inside = [], []
        for place, (key, inner, needed) in enumerate(parameters(schema)):
            if re.search(r'[<>"\n]', key):
                raise ValueError(f"{key!r} cannot be a parameter in the format {record.name}")
            each = f"{rule}_{place}"
            raw = isinstance(inner, dict) and (inner.get("type") == "string" or texts_only(inner))
            if dsml:
                head, tail = f'{parameter}{key}" string="{"true" if raw else "false"}">', f"{value_end}\n"
            else:
                head, tail = f"{parameter}{key}>\n", f"\n{value_end}\n"
            if raw and isinstance(inner.get("enum"), list):
                options = " | ".join(self.text(str(option)) for option in inner["enum"])
                rules.append(f"{each}: {self.text(head)} ({options}) {self.text(tail)}")
            elif raw:
                constrained = {"pattern", "minLength", "maxLength", "format", "const"} & set(inner)
                if constrained:
                    raise ValueError(
                        f"{key!r}: {min(constrained)} cannot be enforced in the format {record.name}"
                    )
                stop = value_end if dsml else "\n" + value_end
                rules.append(f"{each}: {self.text(head)} {each}_raw {self.text(tail.removeprefix(stop))}")
                rules.append(f"{each}_raw[lazy]: /(?s:.*){escaped(stop)}/")
            else:
                rules.append(f"{each}: {self.text(head)} {self.json(inner)} {self.text(tail)}")
            inside.append(each if needed else f"{each}?")
        opened = " ".join(filter(None, (self.text(record.call[0]), self.text(record.pad))))
        closed = " ".join(filter(None, (self.text(record.pad), self.text(record.call[1]))))
        head = self.text(f"{function}{name}{close}")
        return [self._line(rule, opened, head, *inside, self.text(function_end), closed), *rules]


def texts_only(schema: dict[str, Any]) -> bool:
    """Whether a schema without a type can only be texts, which the reader takes raw."""
    options = schema.get("enum")
    return "type" not in schema and isinstance(options, list) and all(isinstance(o, str) for o in options)


def escaped(text: str) -> str:
    """A literal text within ``/…/``."""
    return re.sub(r"[^\w]", lambda found: rf"\x{{{ord(found[0]):x}}}", text, flags=re.ASCII)


def as_object(schema: dict[str, Any]) -> dict[str, Any]:
    """Arguments are an object even where the schema does not say so; what it does not list is not allowed."""
    plain = schema.get("type", "object") == "object" and not {"$ref", "allOf", "anyOf", "oneOf"} & set(schema)
    free = {"additionalProperties", "patternProperties"} & set(schema) or "properties" not in schema
    if plain and not free:
        return {"type": "object", **schema, "additionalProperties": False}
    return {"type": "object", **schema}


def parameters(schema: dict[str, Any]) -> list[tuple[str, Any, bool]]:
    """Each parameter: name, schema (with the definitions it may refer to), whether it is required."""
    properties, required = schema.get("properties"), schema.get("required")
    needed = set(required) if isinstance(required, list) else set()
    defined = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    found = []
    for key, inner in (properties if isinstance(properties, dict) else {}).items():
        found.append(
            (key, {**defined, **inner} if isinstance(inner, dict) and defined else inner, key in needed)
        )
    return found
