"""Input items of the Responses API to chat messages, and chat tools from response tools."""

import secrets
from typing import Any

from galley.endpoint.wire import Fields
from galley.errors import UnsupportedParameter

__all__ = ["Items", "read_tool_choice", "read_tools"]

PREFIXES = {
    "message": "msg_",
    "reasoning": "rs_",
    "function_call": "fc_",
    "function_call_output": "fco_",
}
"""Item types read, and how their ids begin."""
TEXTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")

ROLES = ("user", "assistant", "system", "developer")


class Items:
    """Items in, ``messages`` out; what was left out is listed.

    Attributes:
        messages: chat messages, calls and reasoning joined to the assistant message they belong to.
        names: chat path to item path, for errors.
        items: the items as they will be stored: with ids.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}
        self.items: list[dict[str, Any]] = []
        self.ignored: list[str] = []
        self._thought = ""

    def instruct(self, text: str) -> None:
        """System text before everything else."""
        self._push({"role": "system", "content": text}, "instructions")

    def recall(self, items: list[dict[str, Any]]) -> None:
        """Items of earlier responses: they were checked when they were made."""
        for item in items:
            self._item(Fields(item, "previous_response_id"), stored=True)

    def take(self, given: object, fields: Fields) -> None:
        """``input``: text, or a list of items."""
        if isinstance(given, str):
            text = fields.checked(given, "input")
            given = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}]
        if not isinstance(given, list):
            raise fields.wrong("input", "a string or an array of items", given)
        for i, item in enumerate(given):
            if not isinstance(item, dict):
                raise fields.wrong(f"input[{i}]", "an object", item)
            self._item(Fields(item, f"input[{i}]"))

    def finish(self) -> None:
        """Reasoning that nothing followed is a message of its own."""
        if self._thought:
            self._push({"role": "assistant", "content": ""}, "input")

    def _push(self, message: dict[str, Any], path: str) -> None:
        if self._thought and message["role"] == "assistant":
            message["reasoning_content"] = self._thought
            self._thought = ""
        self.names[f"messages[{len(self.messages)}]"] = path
        self.messages.append(message)

    def _item(self, item: Fields, *, stored: bool = False) -> None:
        sort = item.text("type", 64) or ("message" if "role" in item.body else None)
        if sort is None:
            item.need("type")
        id, status = item.text("id", 128), item.raw("status")
        if sort not in PREFIXES:
            raise UnsupportedParameter(f"Items of type {sort!r} are not supported.", param=item.at("type"))
        if not stored:
            shown = {**item.body, "type": sort, "id": id or PREFIXES[sort] + secrets.token_hex(16)}
            if sort != "reasoning":
                shown["status"] = status if isinstance(status, str) else "completed"
            if sort == "message" and isinstance(shown.get("content"), str):
                kind = "output_text" if shown.get("role") == "assistant" else "input_text"
                part = {"type": kind, "text": shown["content"]}
                shown["content"] = [part | ({"annotations": []} if kind == "output_text" else {})]
            self.items.append(shown)
        match sort:
            case "message":
                self._message(item)
            case "reasoning":
                self._reason(item)
            case "function_call":
                self._call(item)
            case _:
                self._result(item)
        if not stored:
            self.ignored += item.rest()

    def _message(self, item: Fields) -> None:
        item.need("role")
        role = item.choice("role", ROLES)
        item.raw("phase")
        self._push({"role": role, "content": self._text(item, item.need("content"), "content")}, item.path)

    def _reason(self, item: Fields) -> None:
        """Goes to the assistant message that follows. The summary counts where the text itself is missing."""
        if item.raw("encrypted_content") is not None:
            self.ignored.append(item.at("encrypted_content"))
        texts: list[str] = []
        for name in ("content", "summary"):
            given = item.raw(name)
            if given and not texts:
                found = self._text(item, given, name)
                texts = [found] if isinstance(found, str) else [part["text"] for part in found]
        self._thought += "\n".join(texts)

    def _call(self, item: Fields) -> None:
        call = {
            "id": item.checked(item.need("call_id"), "call_id", 128),
            "type": "function",
            "function": {
                "name": item.checked(item.need("name"), "name", 256),
                "arguments": item.checked(item.need("arguments"), "arguments"),
            },
        }
        last = self.messages[-1] if self.messages else {}
        if last.get("role") == "assistant" and not self._thought:
            number = len(last.setdefault("tool_calls", []))
            self.names[f"messages[{len(self.messages) - 1}].tool_calls[{number}]"] = item.path
            last["tool_calls"].append(call)
        else:
            self.names[f"messages[{len(self.messages)}].tool_calls[0]"] = item.path
            self._push({"role": "assistant", "content": None, "tool_calls": [call]}, item.path)

    def _result(self, item: Fields) -> None:
        call = item.checked(item.need("call_id"), "call_id", 128)
        output = self._text(item, item.need("output"), "output")
        self._push({"role": "tool", "tool_call_id": call, "content": output}, item.path)

    def _text(self, item: Fields, content: object, name: str) -> str | list[dict[str, Any]]:
        """Text, or text parts in chat form."""
        if isinstance(content, str):
            return item.checked(content, name)
        if not isinstance(content, list):
            raise item.wrong(name, "a string or an array of parts", content)
        if not content:
            return ""
        parts: list[dict[str, Any]] = []
        for i, given in enumerate(content):
            if not isinstance(given, dict):
                raise item.wrong(f"{name}[{i}]", "an object", given)
            part = Fields(given, item.at(f"{name}[{i}]"))
            part.need("type")
            sort = part.text("type", 64)
            if sort not in TEXTS:
                raise UnsupportedParameter(
                    f"Content parts of type {sort!r} are not supported; this model reads text.",
                    param=part.at("type"),
                )
            key = "refusal" if sort == "refusal" else "text"
            parts.append({"type": "text", "text": part.checked(part.need(key), key)})
            for name_of_output in ("annotations", "logprobs"):
                part.raw(name_of_output)
            self.ignored += part.rest()
        return parts


def read_tools(fields: Fields, names: dict[str, str]) -> list[dict[str, Any]] | None:
    """Function tools in chat form; built-in tools are a 400, since nothing here could run them."""
    given = fields.array("tools", 1024)
    if given is None:
        return None
    tools = []
    for i, item in enumerate(given):
        if not isinstance(item, dict):
            raise fields.wrong(f"tools[{i}]", "an object", item)
        tool = Fields(item, f"tools[{i}]")
        sort = tool.checked(tool.need("type"), "type", 64)
        if sort != "function":
            raise UnsupportedParameter(f"Tools of type {sort!r} are not supported.", param=tool.at("type"))
        inner = {key: value for key, value in item.items() if key != "type" and value is not None}
        names[f"tools[{i}].function"] = f"tools[{i}]"
        tools.append({"type": "function", "function": inner})
    return tools


def read_tool_choice(fields: Fields) -> object:
    """``tool_choice`` in chat form."""
    given = fields.raw("tool_choice")
    if not isinstance(given, dict):
        return given
    choice = Fields(given, "tool_choice")
    sort = choice.checked(choice.need("type"), "type", 64)
    if sort == "function":
        return {"type": "function", "function": {"name": choice.checked(choice.need("name"), "name", 256)}}
    if sort == "allowed_tools":
        tools = []
        for i, item in enumerate(choice.array("tools", 1024) or ()):
            tool = Fields(item if isinstance(item, dict) else {}, f"tool_choice.tools[{i}]")
            if tool.need("type") != "function":
                raise UnsupportedParameter("Only function tools are supported.", param=tool.at("type"))
            tools.append({"type": "function", "function": {"name": tool.checked(tool.need("name"), "name")}})
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.need("mode"), "tools": tools}}
    raise UnsupportedParameter(f"A tool choice of type {sort!r} is not supported.", param="tool_choice.type")
