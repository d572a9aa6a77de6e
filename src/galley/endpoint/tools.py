"""Reading tools, the choice among them, and calls of earlier turns."""

import json
import re
from typing import Any

from galley.endpoint.wire import Fields, invalid
from galley.errors import UnsupportedParameter

__all__ = ["Tools", "read_calls"]

MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Tools:
    """``tools``, ``tool_choice`` and ``parallel_tool_calls`` of one request, checked.

    Attributes:
        tools: as templates want them, or None. choice: as ``Request.tool_choice``. parallel: several calls.
        ignored: paths of what was not read.
    """

    def __init__(self, fields: Fields) -> None:
        self.ignored: list[str] = []
        self.tools = [
            self._tool(i, item) for i, item in enumerate(fields.array("tools", MAX_TOOLS) or ())
        ] or None
        names = [tool["function"]["name"] for tool in self.tools or ()]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise invalid(f"Two tools are called {name!r}.", f"tools[{i}].function.name", "invalid_value")
        self.parallel = fields.boolean("parallel_tool_calls", True)
        self.choice = self._choice(fields, names)
        if self.tools is None and fields.raw("parallel_tool_calls") is not None:
            self.ignored.append("parallel_tool_calls")

    def _tool(self, number: int, item: Any) -> dict[str, Any]:
        if not isinstance(item, dict):
            raise Fields({}).wrong(f"tools[{number}]", "an object", item)
        tool = Fields(item, f"tools[{number}]")
        kind = tool.checked(tool.need("type"), "type", 64)
        if kind != "function":
            raise UnsupportedParameter(f"Tools of type {kind!r} are not supported.", param=tool.at("type"))
        tool.need("function")
        function = tool.object("function")
        assert function is not None
        name = function.checked(function.need("name"), "name")
        if not NAME.fullmatch(name):
            message = f"{name[:80]!r} is no name of a function: 1 to 64 letters, digits, '_', '-' or '.'."
            raise invalid(message, function.at("name"), "invalid_value")
        function.text("description")
        function.object("parameters")
        # Calls are kept to the schema wherever a grammar is used at all; what cannot be enforced is refused.
        function.boolean("strict")
        self.ignored += [*tool.rest(), *function.rest()]
        return {"type": "function", "function": {k: v for k, v in function.body.items() if v is not None}}

    def _choice(self, fields: Fields, names: list[str]) -> str:
        """``auto``, ``none``, ``required`` or ``function:NAME``."""
        value = fields.raw("tool_choice")
        if value is None:
            return "auto"
        if isinstance(value, dict):
            inner = Fields(value, "tool_choice")
            kind = inner.checked(inner.need("type"), "type", 64)
            if kind == "allowed_tools":
                return self._allowed(inner, names)
            if kind != "function":
                raise UnsupportedParameter(
                    f"tool_choice of type {kind!r} is not supported.", param=inner.at("type")
                )
            inner.need("function")
            function = inner.object("function")
            assert function is not None
            name = function.checked(function.need("name"), "name", 64)
            if name not in names:
                raise invalid(f"There is no tool {name!r}.", "tool_choice", "invalid_value")
            return f"function:{name}"
        word = fields.choice("tool_choice", ("auto", "none", "required")) or "auto"
        if word == "required" and not names:
            raise invalid(
                "'tool_choice' is 'required', but there are no tools.", "tool_choice", "invalid_value"
            )
        return word

    def _allowed(self, inner: Fields, names: list[str]) -> str:
        """``allowed_tools`` that allow all tools, or require exactly one. What a part of them would mean for
        the prompt is not settled."""
        allowed = inner.object("allowed_tools") or inner
        mode = allowed.choice("mode", ("auto", "required")) or "auto"
        listed = []
        for i, item in enumerate(allowed.array("tools", MAX_TOOLS) or ()):
            function = item.get("function", item) if isinstance(item, dict) else None
            name = function.get("name") if isinstance(function, dict) else None
            if name not in names:
                raise invalid(
                    f"There is no tool {str(name)[:64]!r} (tools[{i}] of those allowed).",
                    "tool_choice",
                    "invalid_value",
                )
            listed.append(name)
        if set(listed) == set(names):
            return mode
        if mode == "required" and len(set(listed)) == 1:
            return f"function:{listed[0]}"
        raise UnsupportedParameter(
            "allowed_tools with some of the tools is not supported; send only those.", param="tool_choice"
        )


def read_calls(message: Fields) -> list[dict[str, Any]] | None:
    """``tool_calls`` of an assistant's message, checked; arguments stay the text they came as."""
    calls = message.array("tool_calls", MAX_TOOLS)
    if not calls:
        return None
    found = []
    for i, item in enumerate(calls):
        if not isinstance(item, dict):
            raise message.wrong(f"tool_calls[{i}]", "an object", item)
        call = Fields(item, message.at(f"tool_calls[{i}]"))
        if (call.text("type") or "function") != "function":
            raise UnsupportedParameter("Only calls of functions are supported.", param=call.at("type"))
        call.need("function")
        function = call.object("function")
        assert function is not None
        name = function.checked(function.need("name"), "name", 64)
        arguments = function.raw("arguments")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        spelled = "{}" if arguments is None else function.checked(arguments, "arguments")
        known = {"id": call.text("id", 256), "type": "function"}
        found.append({**known, "function": {"name": name, "arguments": spelled or "{}"}})
    return found
