"""Anthropic's turns of content blocks to chat messages."""

from typing import Any

import msgspec

from galley.endpoint.wire import Fields, invalid
from galley.errors import UnsupportedParameter

__all__ = ["Turns"]


class Turns:
    """``system`` and ``messages`` as chat messages.

    Attributes:
        messages: chat messages; a turn with tool results becomes one ``tool`` message each, then the rest.
        names: chat path to the caller's path.
        ignored: what had no effect.
    """

    def __init__(self, fields: Fields) -> None:
        self.messages: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}
        self.ignored: list[str] = []
        system = fields.raw("system")
        if system:
            text = "\n\n".join(self._texts(fields, system, "system"))
            self._push({"role": "system", "content": text}, "system")
        fields.need("messages")
        turns = fields.array("messages")
        if not turns:
            raise invalid("'messages' must not be empty.", "messages", "empty_array")
        for i, given in enumerate(turns):
            if not isinstance(given, dict):
                raise fields.wrong(f"messages[{i}]", "an object", given)
            turn = Fields(given, f"messages[{i}]")
            turn.need("role")
            role = turn.choice("role", ("user", "assistant", "system"))
            content = turn.need("content")
            if role == "assistant":
                self._assistant(turn, content)
            elif role == "system":
                self._push(
                    {"role": role, "content": "\n\n".join(self._texts(turn, content, "content"))}, turn.path
                )
            else:
                self._user(turn, content)
            self.ignored += turn.rest()
        if self.messages[-1]["role"] == "assistant":
            raise UnsupportedParameter(
                "The last message is the assistant's: continuing a given beginning is not supported.",
                param=f"messages[{len(turns) - 1}].role",
            )

    def _push(self, message: dict[str, Any], path: str) -> None:
        self.names[f"messages[{len(self.messages)}]"] = path
        self.messages.append(message)

    def _blocks(self, turn: Fields, content: object, name: str) -> list[Fields]:
        """Content as blocks; text alone is one text block."""
        if isinstance(content, str):
            content = [{"type": "text", "text": turn.checked(content, name)}]
        if not isinstance(content, list):
            raise turn.wrong(name, "a string or an array of blocks", content)
        blocks = []
        for i, given in enumerate(content):
            if not isinstance(given, dict):
                raise turn.wrong(f"{name}[{i}]", "an object", given)
            block = Fields(given, turn.at(f"{name}[{i}]"))
            block.checked(block.need("type"), "type", 64)
            # Every prefix is cached here, so a breakpoint is always kept, whatever its time to live.
            block.object("cache_control")
            blocks.append(block)
        return blocks

    def _texts(self, turn: Fields, content: object, name: str) -> list[str]:
        """Blocks that may be text only."""
        return [self._text(block) for block in self._blocks(turn, content, name)]

    def _text(self, block: Fields) -> str:
        sort = block.raw("type")
        if sort != "text":
            raise UnsupportedParameter(
                f"Content blocks of type {sort!r} are not supported here; this model reads text.",
                param=block.at("type"),
            )
        text = block.checked(block.need("text"), "text")
        self.ignored += block.rest()
        return text

    def _user(self, turn: Fields, content: object) -> None:
        texts: list[str] = []
        for block in self._blocks(turn, content, "content"):
            if block.raw("type") != "tool_result":
                texts.append(self._text(block))
                continue
            call = block.checked(block.need("tool_use_id"), "tool_use_id", 256)
            given = block.raw("content")
            text = "" if given is None else "\n".join(self._texts(block, given, "content"))
            if block.boolean("is_error"):
                text = f"Error: {text}"
            self.ignored += block.rest()
            self._push({"role": "tool", "tool_call_id": call, "content": text}, block.path)
        if texts or not self.messages or self.messages[-1]["role"] != "tool":
            self._push({"role": "user", "content": "\n".join(texts)}, turn.path)

    def _assistant(self, turn: Fields, content: object) -> None:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        here = f"messages[{len(self.messages)}]"
        for block in self._blocks(turn, content, "content"):
            sort = block.raw("type")
            if sort == "thinking":
                thoughts.append(block.checked(block.need("thinking"), "thinking"))
                block.raw("signature")
            elif sort == "redacted_thinking":
                # Only its maker can read it: there is nothing to give to another model.
                self.ignored.append(block.path)
                continue
            elif sort == "tool_use":
                arguments = block.object("input")
                if arguments is None:
                    block.need("input")
                self.names[f"{here}.tool_calls[{len(calls)}]"] = block.path
                calls.append(
                    {
                        "id": block.checked(block.need("id"), "id", 256),
                        "type": "function",
                        "function": {
                            "name": block.checked(block.need("name"), "name", 256),
                            "arguments": msgspec.json.encode(block.body["input"]).decode(),
                        },
                    }
                )
                block.raw("caller")
            else:
                texts.append(self._text(block))
                continue
            self.ignored += block.rest()
        message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts) if texts else None}
        if thoughts:
            message["reasoning_content"] = "\n".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        self._push(message, turn.path)
