"""``/v1/keys``: API keys over HTTP, for keys with the scope ``admin``."""

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from galley.endpoint.keys import SCOPES, Key, KeyStore
from galley.endpoint.paging import Page, respond
from galley.endpoint.wire import Fields, parse_object
from galley.errors import PayloadTooLarge

__all__ = ["KeyPages"]


class KeyPages:
    """Create, list, revoke."""

    def __init__(self, keys: KeyStore, *, max_body: int) -> None:
        self._keys = keys
        self._max_body = max_body

    async def create(self, request: HTTPRequest) -> Response:
        """``{"name", "scopes", "models", "expires_in_days", "org", "team"}``; the answer shows the key,
        once."""
        raw = await request.body()
        if len(raw) > self._max_body:
            raise PayloadTooLarge(f"The body is larger than this server's limit of {self._max_body} bytes.")
        fields = Fields(parse_object(raw))
        scopes: list[Any] = []
        for i, scope in enumerate(fields.array("scopes", len(SCOPES)) or ["inference"]):
            scopes.append(Fields({f"scopes[{i}]": scope}).choice(f"scopes[{i}]", SCOPES))
        models = [
            fields.checked(name, f"models[{i}]", 512)
            for i, name in enumerate(fields.array("models", 1000) or ())
        ]
        days = fields.number("expires_in_days")
        name = fields.text("name", 100) or ""
        key, secret = await asyncio.to_thread(
            self._keys.create,
            name,
            scopes=scopes,
            models=models,
            days=days,
            org=fields.text("org", 100),
            team=fields.text("team", 100),
        )
        response = respond({**shown(key), "key": secret}, 201)
        if fields.rest():
            response.headers["x-galley-ignored-params"] = ", ".join(fields.rest())
        return response

    async def list(self, request: HTTPRequest) -> Response:
        """All keys, never their secrets."""
        page = Page.read(request, order="asc")
        return respond(page.cut([shown(key) for key in await asyncio.to_thread(self._keys.all)]))

    async def revoke(self, request: HTTPRequest) -> Response:
        """``DELETE /v1/keys/{id}``: refused from now on; the row stays, for the receipts that name it."""
        return respond(shown(await asyncio.to_thread(self._keys.revoke, request.path_params["id"])))


def shown(key: Key) -> dict[str, Any]:
    """A key on the wire."""
    return {"object": "key", **msgspec.to_builtins(key)}
