"""Ollama's small pages: which models there are, what they are made of, and which are awake."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from galley import __version__
from galley.endpoint.ollama.door import known_name
from galley.endpoint.ollama.facts import ModelFacts
from galley.endpoint.ollama.options import read_keep_alive
from galley.endpoint.ollama.reply import moment
from galley.endpoint.paging import principal_of, respond
from galley.endpoint.wire import Fields, parse_object
from galley.errors import GalleyError, PayloadTooLarge
from galley.providers.base import ModelCard
from galley.providers.fleet import Fleet
from galley.router.router import Router

__all__ = ["LoadOrAnswer", "OllamaPages"]

SMALL = 4096
"""Bytes of a body that may ask for nothing but that a model be loaded."""


class OllamaPages:
    """``/api/tags``, ``/api/show``, ``/api/ps``, ``/api/version``.

    Args:
        facts: what a model's file says, by the name it is served under; None for a model that is elsewhere.
            Called in a thread.
        fleet: which models are awake; None where all always are.
    """

    def __init__(
        self, router: Router, facts: Callable[[str], ModelFacts | None], fleet: Fleet | None, *, max_body: int
    ) -> None:
        self._router = router
        self._facts = facts
        self._fleet = fleet
        self._max_body = max_body

    def routes(self) -> list[Route]:
        """What to serve."""
        return [
            Route("/api/tags", self.tags),
            Route("/api/show", self.show, methods=["POST"]),
            Route("/api/ps", self.ps),
            Route("/api/version", self.version),
        ]

    async def version(self, request: HTTPRequest) -> Response:
        """``GET /api/version``: Galley's own."""
        return respond({"version": __version__})

    async def tags(self, request: HTTPRequest) -> Response:
        """``GET /api/tags``: the models that the key may ask."""
        principal = principal_of(request)
        cards = [card for card in self._router.catalog.cards() if principal.may_ask(card.id)]
        found = [await self._listed(card) for card in cards]
        return respond({"models": found})

    async def ps(self, request: HTTPRequest) -> Response:
        """``GET /api/ps``: those of them that are awake."""
        principal = principal_of(request)
        awake = {one.id: one for one in self._fleet.status()} if self._fleet is not None else {}
        found = []
        for card in self._router.catalog.cards():
            status = awake.get(card.id)
            if not principal.may_ask(card.id) or card.location != "local":
                continue
            if status is not None and status.state != "awake":
                continue
            line = await self._listed(card)
            leaves = None if status is None else status.sleeps_in_s
            # A model that never leaves has no time of leaving: Ollama writes one far away.
            expires = "9999-12-31T23:59:59Z" if leaves is None else moment(time.time() + leaves)
            size = line["size"] if status is None else status.bytes
            found.append(
                {**line, "size": size, "size_vram": 0, "expires_at": expires, "context_length": card.context}
            )
        return respond({"models": found})

    async def show(self, request: HTTPRequest) -> Response:
        """``POST /api/show``: ``{"model": NAME, "verbose": false}``."""
        body = await request.body()
        if len(body) > self._max_body:
            raise PayloadTooLarge(f"The body is larger than {self._max_body} bytes.")
        fields = Fields(parse_object(body))
        name = fields.text("model", 512) or fields.text("name", 512)
        if name is None:
            fields.need("model")
        card, _ = self._router.catalog.find(known_name(self._router.catalog, name or ""))
        principal_of(request).need_model(card.id, name or "")
        facts = await asyncio.to_thread(self._facts, card.id)
        if facts is None:
            return respond(
                {"details": details(card, None), "model_info": {}, "capabilities": capabilities(card, None)}
            )
        info = (
            facts.info
            if fields.boolean("verbose")
            else {k: v for k, v in facts.info.items() if v is not None}
        )
        return respond(
            {
                "modelfile": f"FROM {card.id}\n",
                "parameters": "\n".join(f"{key} {value}" for key, value in facts.defaults.items()),
                "template": facts.template,
                "license": facts.license,
                "details": details(card, facts),
                "model_info": info,
                "capabilities": capabilities(card, facts),
                "modified_at": moment(facts.modified),
            }
        )

    async def _listed(self, card: ModelCard) -> dict[str, Any]:
        facts = await asyncio.to_thread(self._facts, card.id)
        return {
            "name": card.id,
            "model": card.id,
            "modified_at": moment(card.created if facts is None else facts.modified),
            "size": 0 if facts is None else facts.bytes,
            "digest": "" if facts is None else facts.digest,
            "details": details(card, facts),
        }


def details(card: ModelCard, facts: ModelFacts | None) -> dict[str, Any]:
    """``details`` of a model; empty where its file is not here."""
    family = "" if facts is None else facts.family
    return {
        "parent_model": "",
        "format": "" if facts is None else "gguf",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": "" if facts is None else spelt(facts.parameters),
        "quantization_level": card.quantization if facts is None else facts.quantization,
    }


def capabilities(card: ModelCard, facts: ModelFacts | None) -> list[str]:
    """What a client may ask of it, in Ollama's words."""
    found = ["completion"]
    if card.chat:
        found.append("tools")
    if facts is not None and facts.thinks:
        found.append("thinking")
    return found


def spelt(count: int) -> str:
    """``134.5M``, ``1.2B``."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


class LoadOrAnswer:
    """A request without messages, or without a prompt, asks for a model to be loaded, or with
    ``keep_alive: 0`` to be put to sleep. Every other goes on to its door.

    Args:
        empty: the field whose emptiness says so. field: what the answer has of it.
        body_s: how long the body may take.
    """

    def __init__(
        self,
        app: ASGIApp,
        router: Router,
        fleet: Fleet | None,
        *,
        empty: str,
        field: dict[str, Any],
        body_s: float | None,
    ) -> None:
        self._app = app
        self._body_s = body_s
        self._router = router
        self._fleet = fleet
        self._empty = empty
        self._field = field

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head: list[Message] = []
        with contextlib.suppress(TimeoutError):  # then the door says that the body is late
            async with asyncio.timeout(self._body_s):
                await self._peek(receive, head)
        fields = self._load_asked(head)
        left = iter(head)

        async def again() -> Message:
            return next(left, None) or await receive()

        await (self._app if fields is None else self._load(fields))(scope, again, send)

    @staticmethod
    async def _peek(receive: Receive, head: list[Message]) -> None:
        """The messages of a small body, or as many as show that it is none."""
        size = 0
        while size <= SMALL:
            message = await receive()
            head.append(message)
            size += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                return

    def _load_asked(self, head: list[Message]) -> Fields | None:
        if not head or head[-1]["type"] != "http.request" or head[-1].get("more_body"):
            return None
        try:
            fields = Fields(parse_object(b"".join(message.get("body", b"") for message in head)))
        except GalleyError:
            return None  # the door says so, with a receipt
        return fields if not fields.raw(self._empty) and fields.raw("model") is not None else None

    def _load(self, fields: Fields) -> ASGIApp:
        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            request = HTTPRequest(scope, receive)
            self._router.admit()
            name = fields.checked(fields.need("model"), "model", 512)
            card, _ = self._router.catalog.find(known_name(self._router.catalog, name))
            principal_of(request).need_model(card.id, name)
            keep = read_keep_alive(fields)
            reason = "load"
            if self._fleet is not None and self._fleet.stay(card.id, keep):
                resident = self._fleet.find(card.id)
                if keep == 0:
                    reason = "unload"
                    await resident.sleep()
                else:
                    await resident.awake()
            shown = {"model": card.id, "created_at": moment(time.time()), **self._field}
            line = msgspec.json.encode({**shown, "done": True, "done_reason": reason}) + b"\n"
            sort = "application/x-ndjson" if fields.boolean("stream", True) else "application/json"
            await Response(line, media_type=sort)(scope, receive, send)

        return answer
