"""``POST /v1/messages``: Anthropic's request, put into the words of chat completions and checked there."""

from typing import Any

import msgspec

from galley.endpoint.chat import ChatDoor
from galley.endpoint.messages.reply import MessageReply
from galley.endpoint.messages.turns import Turns
from galley.endpoint.reply import Options
from galley.endpoint.translate import rename_all, rename_keys, renamed
from galley.endpoint.wire import Fields, invalid
from galley.errors import GalleyError, UnsupportedParameter
from galley.router.router import Answer, Router
from galley.types import Request

__all__ = ["MessagesDoor"]

NAMES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "response_format.json_schema.schema": "output_config.format.schema",
    "reasoning_effort": "thinking",
    "thinking_token_budget": "thinking.budget_tokens",
    "user": "metadata.user_id",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}
"""Chat paths and what this API calls them."""
SAME = ("model", "stream", "temperature", "top_p", "top_k")
REFUSED = ("container", "mcp_servers", "context_management", "fallbacks", "user_profile_id")
TIERS = {"auto": "auto", "standard_only": "default"}


class MessagesDoor:
    """Reads requests.

    ``max_tokens`` is a bound here, not a reservation: where it is more than the context can hold, the answer
    may fill the context and then stops with ``model_context_window_exceeded``.

    Args:
        router: knows the models' contexts.
        need_max_tokens: False for counting, where it is not sent.
    """

    api = "messages"

    def __init__(self, router: Router, *, need_max_tokens: bool = True) -> None:
        self._router = router
        self._need_max_tokens = need_max_tokens
        self._chat = ChatDoor()

    async def parse(
        self, body: dict[str, Any], *, request_id: str, capture: bool, key: str | None
    ) -> tuple[Request, Options]:
        """A Request, or InvalidRequest naming the field at fault, in this API's words."""
        fields = Fields(body)
        model = fields.checked(fields.need("model"), "model", 512)
        if self._need_max_tokens:
            fields.need("max_tokens")
        fields.integer("max_tokens", 1)
        fields.refuse(REFUSED)
        turns = Turns(fields)
        names = NAMES | turns.names
        chat: dict[str, Any] = {name: body[name] for name in SAME if body.get(name) is not None}
        for name in SAME:
            fields.raw(name)
        fields.number("temperature", 0, 1)
        chat["messages"] = turns.messages
        chat |= self._converted(fields, names)
        if fields.raw("max_tokens") is not None:
            chat["max_completion_tokens"] = body["max_tokens"]
        thinking, noted = self._thinking(fields)
        chat |= thinking
        ignored = turns.ignored + noted
        # Every prefix is cached here, so the wish is met, whatever the time to live.
        fields.object("cache_control")
        try:
            request, options = self._chat.parse(chat, request_id=request_id, capture=capture, key=key)
        except GalleyError as error:
            raise renamed(error, names) from None
        metadata = fields.object("metadata")
        user = metadata.text("user_id", 512) if metadata is not None else None
        ignored += rename_all(request.ignored_params, names) + fields.rest()
        ignored += metadata.rest() if metadata is not None else []
        request = msgspec.structs.replace(
            request,
            api=self.api,
            user=user,
            ignored_params=ignored,
            clamped=rename_keys(request.clamped, names),
        )
        return await self._bounded(request, model), msgspec.structs.replace(options, names=names)

    def reply(self, answer: Answer, options: Options) -> MessageReply:
        """Shapes one answer."""
        return MessageReply(answer)

    async def _bounded(self, request: Request, model: str) -> Request:
        """With the bound taken away where the context is the tighter one; said on the receipt."""
        most = request.params.max_tokens
        name = self._router.catalog.aliases.get(model, model)
        context = next((card.context for card in self._router.catalog.cards() if card.id == name), None)
        if most is None or context is None or most <= context // 4:
            return request
        _, provider = self._router.catalog.find(model)
        unbounded = msgspec.structs.replace(
            request, params=msgspec.structs.replace(request.params, max_tokens=None)
        )
        prepared = await provider.prepare(unbounded)
        left = prepared.max_tokens[0]
        if most <= left:
            return request
        note = f"{most} lowered to the {left} that the context of {context} leaves"
        return msgspec.structs.replace(unbounded, clamped={**request.clamped, "max_tokens": note})

    @staticmethod
    def _converted(fields: Fields, names: dict[str, str]) -> dict[str, Any]:
        """What has another name or form in chat completions."""
        chat: dict[str, Any] = {}
        stops = fields.array("stop_sequences", 128)
        if stops:
            chat["stop"] = stops
        tier = fields.choice("service_tier", tuple(TIERS))
        if tier is not None:
            chat["service_tier"] = TIERS[tier]
        tools = fields.array("tools", 1024)
        if tools is not None:
            chat["tools"] = [read_tool(fields, i, tool, names) for i, tool in enumerate(tools)]
        choice = fields.object("tool_choice")
        if choice is not None:
            chat |= read_tool_choice(choice)
        config = fields.object("output_config")
        if config is not None:
            form = config.object("format")
            if form is not None:
                if form.need("type") != "json_schema":
                    raise UnsupportedParameter("Only 'json_schema' is supported.", param=form.at("type"))
                schema = {"name": "output", "strict": True, "schema": form.need("schema")}
                chat["response_format"] = {"type": "json_schema", "json_schema": schema}
            if config.raw("effort") is not None:
                chat["reasoning_effort"] = config.raw("effort")
                names["reasoning_effort"] = config.at("effort")
        return chat

    @staticmethod
    def _thinking(fields: Fields) -> tuple[dict[str, Any], list[str]]:
        """``thinking`` as an effort, or as the budget it names."""
        thinking = fields.object("thinking")
        if thinking is None:
            return {}, []
        thinking.need("type")
        sort = thinking.choice("type", ("enabled", "disabled", "adaptive"))
        budget = thinking.integer("budget_tokens", 1024)
        if sort == "enabled":
            thinking.need("budget_tokens")
            thinking.raw("display")
            return {"thinking_token_budget": budget}, thinking.rest()
        thinking.raw("display")
        noted = thinking.rest() + ([thinking.at("budget_tokens")] if budget is not None else [])
        # An effort beside it (``output_config.effort``) says how hard; without one the model chooses.
        wanted = {"reasoning_effort": "none"} if sort == "disabled" else {}
        if sort == "adaptive" and (fields.body.get("output_config") or {}).get("effort") is None:
            wanted = {"reasoning_effort": "medium"}
        return wanted, noted


def read_tool(fields: Fields, i: int, given: object, names: dict[str, str]) -> dict[str, Any]:
    """A client tool in chat form; tools that run at Anthropic's are a 400."""
    if not isinstance(given, dict):
        raise fields.wrong(f"tools[{i}]", "an object", given)
    tool = Fields(given, f"tools[{i}]")
    if tool.raw("type") not in (None, "custom"):
        raise UnsupportedParameter(
            f"Tools of type {given['type']!r} are not supported.", param=tool.at("type")
        )
    schema = tool.object("input_schema")
    if schema is None:
        tool.need("input_schema")
    name = tool.checked(tool.need("name"), "name", 256)
    function: dict[str, Any] = {"name": name, "parameters": given["input_schema"]}
    if given.get("description") is not None:
        function["description"] = tool.text("description")
    if given.get("strict") is not None:
        function["strict"] = tool.boolean("strict")
    names[f"tools[{i}].function.parameters"] = tool.at("input_schema")
    names[f"tools[{i}].function"] = f"tools[{i}]"
    return {"type": "function", "function": function}


def read_tool_choice(choice: Fields) -> dict[str, Any]:
    """``tool_choice`` and ``parallel_tool_calls`` in chat form."""
    choice.need("type")
    sort = choice.choice("type", ("auto", "any", "tool", "none"))
    chat: dict[str, Any] = {}
    if choice.boolean("disable_parallel_tool_use"):
        chat["parallel_tool_calls"] = False
    if sort == "tool":
        name = choice.checked(choice.need("name"), "name", 256)
        return chat | {"tool_choice": {"type": "function", "function": {"name": name}}}
    if choice.rest():
        raise invalid(f"{choice.rest()[0]!r} is unknown.", choice.rest()[0], "unknown_parameter")
    return chat | {"tool_choice": {"any": "required"}.get(sort or "", sort)}
