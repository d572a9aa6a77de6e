"""``POST /v1/responses``: the request, put into the words of chat completions and checked by its reader."""

import asyncio
from typing import Any

import msgspec

from galley.endpoint.chat import ChatDoor
from galley.endpoint.reply import Options
from galley.endpoint.responses.items import Items, read_tool_choice, read_tools
from galley.endpoint.responses.reply import ResponseReply
from galley.endpoint.shelf import Shelf
from galley.endpoint.translate import rename_all, rename_keys, renamed
from galley.endpoint.wire import Fields, invalid
from galley.errors import GalleyError, UnsupportedParameter
from galley.router.router import Answer
from galley.types import Request

__all__ = ["ResponseDoor", "ResponseOptions"]

NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "verbosity": "text.verbosity",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "include",
}
"""Chat paths and what this API calls them."""

SAME = (
    "model",
    "metadata",
    "moderation",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "stream",
    "temperature",
    "top_logprobs",
    "top_p",
    "user",
)
"""Passed to the chat reader under the same name."""

REFUSED = ("context_management", "conversation", "prompt")
NAMED = ("max_tool_calls",)
"""Counts calls of built-in tools only, of which there are none."""
OWN = ("keep", "names")
INCLUDES = "message.output_text.logprobs"


class ResponseOptions(Options, frozen=True, kw_only=True):
    """What the response object repeats of its request, and what is to be stored."""

    shown: dict[str, Any] = msgspec.field(default_factory=dict)
    items: list[dict[str, Any]] = msgspec.field(default_factory=list)
    previous: str | None = None
    background: bool = False


class ResponseDoor:
    """Reads requests; ``previous_response_id`` is answered from the shelf.

    Args:
        store: whether answers are kept when the request does not say.
    """

    api = "responses"

    def __init__(self, shelf: Shelf, *, store: bool = True) -> None:
        self._shelf = shelf
        self._store = store
        self._chat = ChatDoor()

    async def parse(
        self, body: dict[str, Any], *, request_id: str, capture: bool, key: str | None
    ) -> tuple[Request, ResponseOptions]:
        """A Request, or InvalidRequest naming the field at fault, in this API's words."""
        fields = Fields(body)
        fields.checked(fields.need("model"), "model", 512)
        fields.refuse(REFUSED)
        if fields.choice("truncation", ("auto", "disabled")) == "auto":
            raise unsupported_value("truncation", "auto", "Prompts are never cut")
        items = Items()
        instructions = fields.text("instructions")
        if instructions:
            items.instruct(instructions)
        previous = fields.text("previous_response_id", 128)
        if previous is not None:
            for link in await asyncio.to_thread(self._shelf.chain, previous, "response", key or ""):
                if link.running:
                    raise invalid(
                        f"Response {link.id!r} is still running.",
                        "previous_response_id",
                        "response_not_finished",
                    )
                items.recall(link.input)
                items.recall(link.body["output"])
        if fields.raw("input") is not None or previous is None:
            items.take(fields.need("input"), fields)
        items.finish()
        names = NAMES | items.names
        store = fields.boolean("store", self._store)
        background = fields.boolean("background")
        if background and not store:
            raise invalid("'background' needs 'store': true.", "background", "invalid_value")
        if background and fields.boolean("stream"):
            raise unsupported_value("background", "true", "Streaming a background response")
        chat = {name: body[name] for name in SAME if body.get(name) is not None}
        for name in SAME:
            fields.raw(name)
        chat |= self._converted(fields, names)
        chat["messages"] = items.messages
        streaming = fields.object("stream_options")
        if streaming is not None:
            chat["stream_options"] = streaming.body
        try:
            request, options = self._chat.parse(
                # Capture into receipts is a setting of its own; a refusal to store holds for it too.
                chat | ({} if store else {"store": False}),
                request_id=request_id,
                capture=capture,
                key=key,
            )
        except GalleyError as error:
            raise renamed(error, names) from None
        ignored = rename_all(request.ignored_params, names) + items.ignored
        ignored += [name for name in NAMED if fields.raw(name) is not None]
        ignored += self._includes(fields) + self._reasoning(fields) + fields.rest()
        request = msgspec.structs.replace(
            request, api=self.api, ignored_params=ignored, clamped=rename_keys(request.clamped, names)
        )
        kept = ResponseOptions(
            **{name: getattr(options, name) for name in Options.__struct_fields__ if name not in OWN},
            keep=store,
            names=names,
            shown=shown(body, request, store=store),
            items=items.items,
            previous=previous,
            background=background,
        )
        return request, kept

    def reply(self, answer: Answer, options: Options) -> ResponseReply:
        """Shapes one answer."""
        assert isinstance(options, ResponseOptions)
        return ResponseReply(answer, options, shown=options.shown)

    @staticmethod
    def _converted(fields: Fields, names: dict[str, str]) -> dict[str, Any]:
        """What has another name or another form in chat completions."""
        chat: dict[str, Any] = {}
        most = fields.raw("max_output_tokens")
        if most is not None:
            chat["max_completion_tokens"] = most
        tools = read_tools(fields, names)
        if tools is not None:
            chat["tools"] = tools
        choice = read_tool_choice(fields)
        if choice is not None:
            chat["tool_choice"] = choice
        reasoning = fields.object("reasoning")
        if reasoning is not None and reasoning.raw("effort") is not None:
            chat["reasoning_effort"] = reasoning.raw("effort")
        text = fields.object("text")
        if text is not None:
            if text.raw("verbosity") is not None:
                chat["verbosity"] = text.raw("verbosity")
            form = text.object("format")
            if form is not None:
                sort = form.need("type")
                inner = {name: value for name, value in form.body.items() if name != "type"}
                chat["response_format"] = (
                    {"type": sort, "json_schema": inner} if sort == "json_schema" else form.body
                )
        include = fields.array("include", 64) or []
        top = fields.integer("top_logprobs", 0, 20)
        if INCLUDES in include or top is not None:
            chat["logprobs"] = True
        return chat

    @staticmethod
    def _includes(fields: Fields) -> list[str]:
        """What cannot be included is named: there are no such items here."""
        found = []
        for i, name in enumerate(fields.array("include", 64) or ()):
            if not isinstance(name, str):
                raise fields.wrong(f"include[{i}]", "a string", name)
            if name != INCLUDES:
                found.append(f"include[{i}]")
        return found

    @staticmethod
    def _reasoning(fields: Fields) -> list[str]:
        reasoning = fields.object("reasoning")
        if reasoning is None:
            return []
        reasoning.raw("effort")
        return reasoning.rest()


def unsupported_value(name: str, value: str, why: str) -> UnsupportedParameter:
    """A value of a known parameter that is not implemented."""
    return UnsupportedParameter(f"{name}: {value!r} is not supported. {why}.", param=name)


def shown(body: dict[str, Any], request: Request, *, store: bool) -> dict[str, Any]:
    """What a response object repeats of its request."""
    reasoning, text = body.get("reasoning") or {}, body.get("text") or {}
    return {
        "background": body.get("background") or False,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": body.get("max_tool_calls"),
        "metadata": request.metadata,
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": body.get("previous_response_id"),
        "prompt_cache_key": body.get("prompt_cache_key"),
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "safety_identifier": body.get("safety_identifier"),
        "service_tier": request.service_tier,
        "store": store,
        "temperature": request.params.temperature,
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": [
            {"description": None, "parameters": None, "strict": False}
            | {key: value for key, value in tool.items() if value is not None}
            for tool in body.get("tools") or []
        ],
        "top_logprobs": body.get("top_logprobs") or 0,
        "top_p": request.params.top_p,
        "presence_penalty": request.params.presence_penalty,
        "frequency_penalty": request.params.frequency_penalty,
        "truncation": "disabled",
        "user": body.get("user"),
    }
