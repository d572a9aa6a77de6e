"""``POST /v1/chat/completions``: the request, checked."""

from typing import Any

from galley.endpoint.caching import Breakpoints
from galley.endpoint.params import common, read_stream, sampling
from galley.endpoint.reply import ChatReply, Options
from galley.endpoint.structure import read_structure
from galley.endpoint.tools import Tools, read_calls
from galley.endpoint.wire import Fields, invalid
from galley.errors import UnsupportedParameter
from galley.providers.messages import refuse_reserved
from galley.providers.reasoning import EFFORTS
from galley.types import Request

__all__ = ["ChatDoor"]

ROLES = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES = ("function",)


class ChatDoor:
    """Reads chat requests."""

    api = "chat.completions"
    reply = ChatReply

    def parse(
        self, body: dict[str, Any], *, request_id: str, capture: bool, key: str | None
    ) -> tuple[Request, Options]:
        """A Request, or InvalidRequest naming the field at fault. Nothing is read past, nothing guessed."""
        fields = Fields(body)
        model = fields.checked(fields.need("model"), "model", 512)
        read = Messages(fields)
        wants = fields.boolean("logprobs")
        top = fields.integer("top_logprobs", 0, 20)
        if top is not None and not wants:
            raise invalid("'top_logprobs' needs 'logprobs': true.", "top_logprobs", "invalid_value")
        shared = common(fields, request_id=request_id, api=self.api, capture=capture, key=key)
        stream, include_usage = read_stream(fields)
        kwargs = fields.object("chat_template_kwargs")
        structure, path = read_structure(fields)
        tools = Tools(fields)
        params = sampling(fields, logprobs=(top or 0) if wants else None, structure=structure)
        add_prompt = fields.boolean("add_generation_prompt", True)
        options = Options(
            stream=stream,
            include_usage=include_usage,
            return_token_ids=fields.boolean("return_token_ids"),
            keep=fields.boolean("store"),
        )
        effort = fields.choice("reasoning_effort", EFFORTS)
        budget = fields.integer("thinking_token_budget", 0, 2**31 - 1)
        shared["ignored_params"] += read.ignored + tools.ignored + fields.rest()
        request = Request(
            **shared,
            model=model,
            params=params,
            messages=read.messages,
            cache_breakpoints=read.breakpoints.last(read.adjusted),
            tools=tools.tools,
            tool_choice=tools.choice,
            parallel_tool_calls=tools.parallel,
            reasoning_effort=effort,
            thinking_budget=budget,
            structured_path=path,
            template_kwargs=check_kwargs(kwargs),
            add_generation_prompt=add_prompt,
            stream=stream,
            clamped=read.adjusted,
        )
        return request, options


class Messages:
    """The ``messages`` array as ``{role, content: str}``, with calls and reasoning, and what was changed."""

    def __init__(self, fields: Fields) -> None:
        self.messages: list[dict[str, Any]] = []
        self.ignored: list[str] = []
        self.adjusted: dict[str, str] = {}
        self.breakpoints = Breakpoints(fields)
        fields.need("messages")
        given = fields.array("messages")
        if not given:
            raise invalid("'messages' must not be empty.", "messages", "empty_array")
        for i, item in enumerate(given):
            if not isinstance(item, dict):
                raise fields.wrong(f"messages[{i}]", "an object", item)
            self._add(Fields(item, f"messages[{i}]"))

    def _add(self, message: Fields) -> None:
        message.need("role")
        role = message.choice("role", ROLES + OTHER_ROLES)
        if role in OTHER_ROLES:
            raise UnsupportedParameter(
                f"Messages of role {role!r} are not supported.", param=message.at("role")
            )
        message.refuse(("function_call", "audio"))
        calls = read_calls(message) if role == "assistant" else None
        more: dict[str, Any] = {"tool_calls": calls} if calls else {}
        if role == "assistant":
            thought = message.text("reasoning_content") or message.text("reasoning")
            more |= {"reasoning_content": thought} if thought else {}
        elif role == "tool":
            more |= {name: text for name in ("tool_call_id", "name") if (text := message.text(name, 256))}
        if role == "developer":
            role = "system"
            self.adjusted[message.at("role")] = "developer read as system"
        content = message.raw("content")
        if content is None and role != "assistant":
            message.need("content")
        text = "" if content is None else self._text(message, content)
        self.breakpoints.read(message, len(self.messages), len(text))
        self.messages.append({"role": role, "content": text, **more})
        self.ignored += message.rest()

    def _text(self, message: Fields, content: object) -> str:
        """Text parts are joined by newlines, as vLLM does for templates that take strings."""
        if isinstance(content, str):
            return message.checked(content, "content")
        if not isinstance(content, list):
            raise message.wrong("content", "a string or an array of parts", content)
        if not content:
            raise invalid(
                f"{message.at('content')!r} must not be empty.", message.at("content"), "empty_array"
            )
        texts: list[str] = []
        for i, item in enumerate(content):
            if not isinstance(item, dict):
                raise message.wrong(f"content[{i}]", "an object", item)
            part = Fields(item, message.at(f"content[{i}]"))
            sort = part.checked(part.need("type"), "type", 64)
            if sort != "text":
                raise UnsupportedParameter(
                    f"Content parts of type {sort!r} are not supported; this model reads text.",
                    param=part.at("type"),
                )
            texts.append(part.checked(part.need("text"), "text"))
            self.breakpoints.read(part, len(self.messages), len("\n".join(texts)))
            self.ignored += part.rest()
        return "\n".join(texts)


def check_kwargs(kwargs: Fields | None) -> dict[str, Any]:
    """Variables for the chat template; those the template gets anyway may not be overridden."""
    if kwargs is None:
        return {}
    refuse_reserved(kwargs.body, "chat_template_kwargs")
    return dict(kwargs.body)
