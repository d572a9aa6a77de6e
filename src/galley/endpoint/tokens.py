"""``/tokenize``, ``/detokenize``, ``/apply-template``: looking at what a model would see. No receipt: nothing
is generated."""

import asyncio
import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from galley.endpoint.chat import Messages, check_kwargs
from galley.endpoint.client import Client, DisconnectError, wire_error
from galley.endpoint.generate import Door, Limits
from galley.endpoint.keys import Principal
from galley.endpoint.wire import Fields, header_list, parse_object
from galley.errors import ContextLengthExceeded
from galley.providers.base import ModelCard, Provider
from galley.providers.local import OFF_LOOP
from galley.router.router import Router
from galley.types import Request, SamplingParams

__all__ = ["ApplyTemplate", "CountTokens", "Detokenize", "Tokenize"]

P = ParamSpec("P")
T = TypeVar("T")


async def beside(size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Large work goes to a thread, so that it stalls no stream; small work is done sooner than sent."""
    if size > OFF_LOOP:
        return await asyncio.to_thread(work, *args, **kwargs)
    return work(*args, **kwargs)


class TokenDoor(ABC):
    """One JSON object in, one out."""

    def __init__(self, router: Router, *, limits: Limits) -> None:
        self._router = router
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = Client(scope, receive, send)
        try:
            raw = await client.body(self._limits.body, within_s=self._limits.body_s)
            fields = Fields(parse_object(raw))
            principal = scope.get("state", {}).get("principal", Principal())
            answer, ignored = await self.answer(fields, principal)
            headers = [(b"x-galley-ignored-params", header_list(ignored).encode())] if ignored else []
            await client.json(200, msgspec.json.encode(answer), headers)
        except DisconnectError:
            return
        except Exception as error:
            await client.error(wire_error(error))

    @abstractmethod
    async def answer(self, fields: Fields, principal: Principal) -> tuple[dict[str, Any], list[str]]:
        """The object to send, and the fields that had no effect."""

    def find(self, fields: Fields, principal: Principal) -> tuple[ModelCard, Provider]:
        """The model named, or the only one served when none is named (as vLLM allows here)."""
        self._router.admit()
        name = fields.text("model", 512)
        cards = self._router.catalog.cards()
        if name is None and len(cards) == 1:
            name = cards[0].id
        card, provider = self._router.catalog.find(name if name is not None else fields.need("model"))
        principal.need_model(card.id, name or card.id)
        return card, provider

    @staticmethod
    def chat(fields: Fields, model: str) -> Request:
        """The chat request in the body."""
        read = Messages(fields)
        fields.refuse(("tools", "chat_template", "continue_final_message", "documents"))
        return Request(
            id="",
            api="apply-template",
            model=model,
            params=SamplingParams(),
            created=time.time(),
            messages=read.messages,
            template_kwargs=check_kwargs(fields.object("chat_template_kwargs")),
            add_generation_prompt=fields.boolean("add_generation_prompt", True),
        )


class Tokenize(TokenDoor):
    """``{"prompt": str, "add_special_tokens": true}`` or ``{"messages": [...]}`` to ids."""

    async def answer(self, fields: Fields, principal: Principal) -> tuple[dict[str, Any], list[str]]:
        card, provider = self.find(fields, principal)
        if fields.raw("messages") is not None:
            ids = (await provider.prepare(self.chat(fields, card.id))).prompts[0]
        else:
            prompt = fields.checked(fields.need("prompt"), "prompt")
            special = fields.boolean("add_special_tokens", True)
            ids = await beside(len(prompt), provider.encode, prompt, special=special)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": card.context, "tokens": ids}
        if fields.boolean("return_token_strs"):
            found["token_strs"] = await beside(len(ids), lambda: [provider.token(id)[0] for id in ids])
        return found, fields.rest()


class Detokenize(TokenDoor):
    """``{"tokens": [int]}`` to text, special tokens shown."""

    async def answer(self, fields: Fields, principal: Principal) -> tuple[dict[str, Any], list[str]]:
        _, provider = self.find(fields, principal)
        fields.need("tokens")
        ids = fields.integers("tokens") or []
        return {"prompt": await beside(len(ids), provider.decode, ids)}, fields.rest()


class ApplyTemplate(TokenDoor):
    """``{"messages": [...]}`` to the prompt text."""

    async def answer(self, fields: Fields, principal: Principal) -> tuple[dict[str, Any], list[str]]:
        card, provider = self.find(fields, principal)
        # A template is a program: how long it takes does not follow from the size of the messages.
        return {"prompt": await asyncio.to_thread(provider.render, self.chat(fields, card.id))}, fields.rest()


class CountTokens(TokenDoor):
    """A request of another API in, the number of tokens its prompt has out.

    Args:
        door: reads the request as it would be read for an answer.
        shape: fields of the answer beside ``input_tokens``.
    """

    def __init__(
        self, router: Router, door: Door, *, limits: Limits, shape: dict[str, Any] | None = None
    ) -> None:
        super().__init__(router, limits=limits)
        self._door = door
        self._shape = shape or {}

    async def answer(self, fields: Fields, principal: Principal) -> tuple[dict[str, Any], list[str]]:
        card, provider = self.find(fields, principal)
        found = self._door.parse({**fields.body}, request_id="", capture=False, key=principal.key)
        request, _ = await found if inspect.isawaitable(found) else found
        request = msgspec.structs.replace(
            request, model=card.id, params=msgspec.structs.replace(request.params, max_tokens=1)
        )
        try:
            count = len((await provider.prepare(request)).prompts[0])
        except ContextLengthExceeded as error:
            # Counting is what one does to find out: too long a prompt has a length all the same.
            count = int(error.extra["n_prompt_tokens"])
        return {**self._shape, "input_tokens": count}, request.ignored_params
