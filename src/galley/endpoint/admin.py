"""``/v1/admin``: models loaded, put to sleep, woken and unloaded while serving (SLP-4, SLP-6)."""

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route

from galley.audit.approvals import Approvals
from galley.endpoint.adapters import AdapterPages
from galley.endpoint.wire import Fields, parse_object
from galley.errors import AuthenticationError, InvalidRequest, Overloaded, PayloadTooLarge
from galley.providers.fleet import Fleet
from galley.providers.resident import Resident
from galley.router.router import Router

__all__ = ["Admin"]


class Admin:
    """The routes that change which models are in memory, and the one that shows it.

    ``GET /v1/x/status`` is open to whoever may use the server. The others exist only with an admin key of
    their own, sent as ``x-galley-admin-key``; without one they are 404 like any other unknown path (SLP-6).

    Args:
        approvals: the queue of what waits for somebody's yes; None has no routes for it.
        load, unload: add a model of the store to the fleet, and take one away.
        router: whose catalog adapters are entered in.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        key: str | None,
        load: Callable[[str], Resident],
        unload: Callable[[str], Awaitable[None]],
        router: Router,
        approvals: Approvals | None = None,
        max_body: int = 1 << 16,
    ) -> None:
        self._fleet = fleet
        self._key = None if key is None else hashlib.sha256(key.encode()).digest()
        self._load = load
        self._unload = unload
        self._adapters = AdapterPages(fleet, router, fields=self._fields, check=self._check)
        self._approvals = approvals
        self._max_body = max_body

    def routes(self) -> list[Route]:
        """What to serve."""
        shown = [Route("/v1/x/status", self.status)]
        if self._key is None:
            return shown
        return [
            *shown,
            Route("/v1/admin/models", self.models),
            Route("/v1/admin/models/load", self.load, methods=["POST"]),
            Route("/v1/admin/models/unload", self.unload, methods=["POST"]),
            Route("/v1/admin/models/sleep", self.sleep, methods=["POST"]),
            Route("/v1/admin/models/wake", self.wake, methods=["POST"]),
            Route("/v1/admin/models/pin", self.pin, methods=["POST"]),
            *self._adapters.routes(),
            *self._queue(),
        ]

    def _queue(self) -> list[Route]:
        if self._approvals is None:
            return []
        return [
            Route("/v1/admin/approvals", self.approvals),
            Route("/v1/admin/approvals/{id}", self.approval),
            Route("/v1/admin/approvals/{id}/approve", self.approve, methods=["POST"]),
            Route("/v1/admin/approvals/{id}/deny", self.deny, methods=["POST"]),
        ]

    async def approvals(self, request: HTTPRequest) -> Response:
        """``GET /v1/admin/approvals?state=``: what waits, oldest first; ``state=all`` has the others too."""
        self._check(request)
        assert self._approvals is not None
        state = request.query_params.get("state", "pending")
        found = await asyncio.to_thread(self._approvals.list, None if state == "all" else state)
        return respond({"object": "list", "data": found})

    async def approval(self, request: HTTPRequest) -> Response:
        """``GET /v1/admin/approvals/{id}``."""
        self._check(request)
        assert self._approvals is not None
        return respond(await asyncio.to_thread(self._approvals.get, request.path_params["id"]))

    async def approve(self, request: HTTPRequest) -> Response:
        """``{"approver": NAME, "reason": TEXT, "call": SHA256}``: say yes."""
        return await self._decide(request, yes=True)

    async def deny(self, request: HTTPRequest) -> Response:
        """The same to say no; that ends it."""
        return await self._decide(request, yes=False)

    async def _decide(self, request: HTTPRequest, *, yes: bool) -> Response:
        fields = await self._fields(request, "approver", "reason", "call")
        assert self._approvals is not None
        found = await asyncio.to_thread(
            self._approvals.decide,
            request.path_params["id"],
            approver=fields.checked(fields.need("approver"), "approver", 200),
            approve=yes,
            reason=fields.text("reason", 500),
            call=fields.text("call", 64),
        )
        return respond(found)

    async def status(self, request: HTTPRequest) -> Response:
        """``GET /v1/x/status``: every model, its state and its memory."""
        return respond({"object": "list", "data": self._fleet.status()})

    async def models(self, request: HTTPRequest) -> Response:
        """``GET /v1/admin/models``: the same, for those with the key."""
        self._check(request)
        return await self.status(request)

    async def load(self, request: HTTPRequest) -> Response:
        """``{"model": NAME, "wake": true}``: serve a model of the store; opened at once if asked."""
        fields = await self._fields(request, "model", "wake")
        name, wake = self._name(fields), fields.boolean("wake", True)
        if any(one.id == name for one in self._fleet.status()):
            raise InvalidRequest(f"{name!r} is served already.", param="model")
        resident = self._load(name)
        if wake:
            await resident.awake()
        return respond(resident.status())

    async def unload(self, request: HTTPRequest) -> Response:
        """``{"model": NAME}``: finish what is in hand, then serve it no more."""
        name = self._name(await self._fields(request, "model"))
        await self._unload(name)
        return respond({"id": name, "unloaded": True})

    async def sleep(self, request: HTTPRequest) -> Response:
        """``{"model": NAME, "level": 1}``: give the memory back; 2 keeps nothing at all."""
        fields = await self._fields(request, "model", "level")
        resident, level = self._fleet.find(self._name(fields)), fields.integer("level", 1, 2) or 1
        if not await resident.sleep(level):
            raise Overloaded(
                f"{resident.card.id!r} is still answering.", code="model_busy", retry_after_s=5.0
            )
        return respond(resident.status())

    async def wake(self, request: HTTPRequest) -> Response:
        """``{"model": NAME}``: open it now."""
        resident = self._fleet.find(self._name(await self._fields(request, "model")))
        await resident.awake()
        return respond(resident.status())

    async def pin(self, request: HTTPRequest) -> Response:
        """``{"model": NAME, "pinned": true}``: it never falls asleep of itself or for another."""
        fields = await self._fields(request, "model", "pinned")
        resident = self._fleet.find(self._name(fields))
        resident.pinned = fields.boolean("pinned", True)
        return respond(resident.status())

    def _check(self, request: HTTPRequest) -> None:
        given = hashlib.sha256(request.headers.get("x-galley-admin-key", "").encode()).digest()
        if self._key is None or not hmac.compare_digest(given, self._key):
            raise AuthenticationError("Missing or wrong admin key. Send it as 'x-galley-admin-key: KEY'.")

    async def _fields(self, request: HTTPRequest, *known: str) -> Fields:
        self._check(request)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > self._max_body:
                raise PayloadTooLarge(f"The body is larger than {self._max_body} bytes.")
        found = parse_object(body)
        if strange := sorted(set(found) - set(known)):
            raise InvalidRequest(
                f"Unknown parameter {strange[0][:100]!r}.", param=strange[0][:100], code="unknown_parameter"
            )
        return Fields(found)

    @staticmethod
    def _name(fields: Fields) -> str:
        return fields.checked(fields.need("model"), "model", 512)


def respond(found: Any) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(found), media_type="application/json")
