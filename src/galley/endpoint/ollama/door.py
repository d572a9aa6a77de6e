"""``POST /api/chat`` and ``/api/generate``: Ollama's requests, put into the words of chat completions."""

from collections.abc import Callable
from typing import Any

import msgspec

from galley.endpoint.chat import ChatDoor
from galley.endpoint.completions import CompletionsDoor
from galley.endpoint.ollama.options import Converted, read_keep_alive
from galley.endpoint.ollama.reply import OllamaReply
from galley.endpoint.reply import Options
from galley.endpoint.translate import rename_all, rename_keys, renamed
from galley.endpoint.wire import Fields, invalid
from galley.errors import GalleyError, UnsupportedParameter
from galley.router.catalog import Catalog
from galley.router.router import Answer, Router
from galley.types import Request

__all__ = ["ChatRequests", "GenerateRequests", "Stay", "known_name"]

Stay = Callable[[str, float | None], bool]
"""Told how many seconds a model shall stay awake without requests (None: as the server is set up); whether
that means anything here."""


def known_name(catalog: Catalog, name: str) -> str:
    """A model's name here. Ollama's clients may add the tag ``:latest``, which is no part of names here."""
    bare = name.removesuffix(":latest")
    if bare != name and name not in catalog.models and name not in catalog.aliases:
        return bare
    return name


class OllamaDoor:
    """What both doors share.

    Args:
        stay: where ``keep_alive`` goes; None where models are not put to sleep.
    """

    api = ""
    field = "message"

    def __init__(self, router: Router, stay: Stay | None = None) -> None:
        self._router = router
        self._stay = stay

    async def parse(
        self, body: dict[str, Any], *, request_id: str, capture: bool, key: str | None
    ) -> tuple[Request, Options]:
        """A Request, or InvalidRequest naming the field at fault, in Ollama's words."""
        fields = Fields(body)
        asked = fields.checked(fields.need("model"), "model", 512)
        model = known_name(self._router.catalog, asked)
        real = self._router.catalog.aliases.get(model, model)
        context = next((c.context for c in self._router.catalog.cards() if c.id == real), None)
        converted = Converted(fields, context=context)
        if model != asked:
            converted.adjusted["model"] = f"read as {model}"
        keep = read_keep_alive(fields)
        converted.chat |= {"model": model, "stream": fields.boolean("stream", True)}
        names, chat = converted.names, converted.chat
        inner = self._translate(fields, converted)
        if (self._stay is None or not self._stay(real, keep)) and keep is not None:
            converted.ignored.append("keep_alive")
        try:
            request, options = inner.parse(chat, request_id=request_id, capture=capture, key=key)
        except GalleyError as error:
            raise renamed(error, names) from None
        request = msgspec.structs.replace(
            request,
            api=self.api,
            structured_path="format" if request.structured_path else "",
            ignored_params=converted.ignored + rename_all(request.ignored_params, names) + fields.rest(),
            clamped=rename_keys(request.clamped, names) | converted.adjusted,
        )
        return request, msgspec.structs.replace(options, names=names, ndjson=True)

    def reply(self, answer: Answer, options: Options) -> OllamaReply:
        """Shapes one answer."""
        return OllamaReply(answer, self.field)

    def _translate(self, fields: Fields, converted: Converted) -> ChatDoor | CompletionsDoor:
        """Fill in what is to be answered; the door that reads it."""
        raise NotImplementedError


class ChatRequests(OllamaDoor):
    """``/api/chat``."""

    api = "ollama.chat"

    def _translate(self, fields: Fields, converted: Converted) -> ChatDoor:
        fields.need("messages")
        messages = []
        for i, given in enumerate(fields.array("messages") or ()):
            if not isinstance(given, dict):
                raise fields.wrong(f"messages[{i}]", "an object", given)
            messages.append(self._message(Fields(given, f"messages[{i}]"), converted))
        converted.chat["messages"] = messages
        tools = fields.array("tools")
        if tools:
            converted.chat["tools"] = tools
        return ChatDoor()

    @staticmethod
    def _message(message: Fields, converted: Converted) -> dict[str, Any]:
        if message.array("images"):
            raise UnsupportedParameter(
                f"{message.at('images')!r} is not supported; this model reads text.",
                param=message.at("images"),
            )
        found: dict[str, Any] = {"role": message.need("role"), "content": message.raw("content")}
        if found["content"] is None and message.raw("tool_calls"):
            found["content"] = ""
        if message.raw("thinking") is not None:
            found["reasoning_content"] = message.raw("thinking")
            converted.names[message.at("reasoning_content")] = message.at("thinking")
        for theirs, ours in (("tool_calls", "tool_calls"), ("tool_name", "name"), ("tool_call_id",) * 2):
            if message.raw(theirs) is not None:
                found[ours] = message.raw(theirs)
        return {**found, **{name: message.body[name] for name in message.rest_names()}}


class GenerateRequests(OllamaDoor):
    """``/api/generate``: one prompt through the chat template, or with ``raw`` as it is."""

    api = "ollama.generate"
    field = "response"

    def _translate(self, fields: Fields, converted: Converted) -> ChatDoor | CompletionsDoor:
        chat = converted.chat
        fields.refuse(("template", "context", "width", "height", "steps"))
        if fields.array("images"):
            raise UnsupportedParameter("'images' is not supported; this model reads text.", param="images")
        prompt = fields.checked(fields.need("prompt"), "prompt")
        system, suffix = fields.text("system"), fields.text("suffix")
        if fields.boolean("raw") or suffix:
            if system:
                raise invalid("'system' needs the chat template.", "system", "invalid_value")
            chat |= {"prompt": prompt, **({"suffix": suffix} if suffix else {})}
            if chat.pop("logprobs", False):
                chat["logprobs"] = chat.pop("top_logprobs", 0)
            return CompletionsDoor()
        lead = [{"role": "system", "content": system}] if system else []
        chat["messages"] = [*lead, {"role": "user", "content": prompt}]
        converted.names |= {"messages": "prompt", f"messages[{len(lead)}].content": "prompt"}
        return ChatDoor()
