"""Asking again for kept answers: stored chat completions, and responses with their input items."""

import asyncio
import time
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from galley.endpoint.client import Client
from galley.endpoint.paging import Page, listing, principal_of, respond
from galley.endpoint.params import read_metadata
from galley.endpoint.reply import Options
from galley.endpoint.shelf import Kept, Shelf
from galley.endpoint.wire import Fields, parse_object
from galley.errors import InvalidRequest, UnsupportedParameter
from galley.types import Request

__all__ = ["StoredChat", "StoredResponses"]

CHAT = "chat.completion"


class StoredChat:
    """``/v1/chat/completions/{id}``: what was created with ``store: true``."""

    def __init__(self, shelf: Shelf, *, max_body: int) -> None:
        self._shelf = shelf
        self._max_body = max_body

    async def keep(self, request: Request, options: Options, whole: bytes) -> None:
        """Store one answer with its messages."""
        body = msgspec.json.decode(whole)
        body["metadata"] = request.metadata
        messages = [
            {"id": f"{body['id']}-{i}", "content_parts": None, "name": None, **message}
            for i, message in enumerate(request.messages or ())
        ]
        kept = Kept(
            id=body["id"],
            kind=CHAT,
            owner=request.key or "",
            created=request.created,
            model=body["model"],
            metadata=request.metadata,
            input=messages,
            body=body,
        )
        await asyncio.to_thread(self._shelf.put, kept)

    async def get(self, request: HTTPRequest) -> Response:
        """The completion as it was."""
        return respond((await self._find(request)).body)

    async def update(self, request: HTTPRequest) -> Response:
        """New ``metadata``."""
        client = Client(request.scope, request.receive, _unsent)
        fields = Fields(parse_object(await client.body(self._max_body)))
        fields.need("metadata")
        metadata = read_metadata(fields)
        kept = await self._find(request)
        body = {**kept.body, "metadata": metadata}
        changed = msgspec.structs.replace(kept, metadata=metadata, body=body)
        await asyncio.to_thread(self._shelf.put, changed)
        response = respond(body)
        if fields.rest():
            response.headers["x-galley-ignored-params"] = ", ".join(fields.rest())
        return response

    async def delete(self, request: HTTPRequest) -> Response:
        """Forget it."""
        id, owner = request.path_params["id"], principal_of(request).key or ""
        await asyncio.to_thread(self._shelf.delete, id, CHAT, owner)
        return respond({"object": "chat.completion.deleted", "id": id, "deleted": True})

    async def list(self, request: HTTPRequest) -> Response:
        """``?after=&limit=&order=&model=&metadata[key]=value``."""
        page = Page.read(request, order="asc", allowed=("model", "metadata"))
        wanted = {}
        for name, value in page.more.items():
            if name.startswith("metadata[") and name.endswith("]") and '"' not in name:
                wanted[name[9:-1]] = value
            elif name != "model":
                raise InvalidRequest("Write metadata[KEY]=VALUE.", param=name[:100], code="invalid_value")
        found, more = await asyncio.to_thread(
            self._shelf.page,
            CHAT,
            principal_of(request).key or "",
            limit=page.limit,
            after=page.after,
            newest_first=page.newest_first,
            model=page.more.get("model"),
            metadata=wanted,
        )
        return respond(listing([kept.body for kept in found], more=more))

    async def messages(self, request: HTTPRequest) -> Response:
        """The messages it answered."""
        page = Page.read(request, order="asc")
        return respond(page.cut((await self._find(request)).input))

    async def _find(self, request: HTTPRequest) -> Kept:
        owner = principal_of(request).key or ""
        return await asyncio.to_thread(self._shelf.get, request.path_params["id"], CHAT, owner)


class StoredResponses:
    """``/v1/responses/{id}``, its input items, and the end of what a dead process left running."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def bury(self) -> int:
        """Mark as failed what an earlier process left in progress; how many there were."""
        orphans = self._shelf.orphans()
        for kept in orphans:
            why = "The server stopped before this response was complete."
            body = {**kept.body, "status": "failed", "error": {"code": "server_error", "message": why}}
            self._shelf.put(msgspec.structs.replace(kept, running=False, body=body))
        return len(orphans)

    async def get(self, request: HTTPRequest) -> Response:
        """The response as it is now. ``stream`` and ``starting_after`` are not supported."""
        ignored = []
        for name, value in request.query_params.items():
            if name in ("starting_after",) or (name == "stream" and value.lower() not in ("false", "0")):
                raise UnsupportedParameter(f"{name!r} is not supported here; poll instead.", param=name)
            if name in ("include", "include[]", "include_obfuscation"):
                ignored.append(name)
            elif name != "stream":
                raise InvalidRequest(
                    f"Unknown query parameter {name[:100]!r}.", param=name[:100], code="unknown_parameter"
                )
        response = respond((await self.find(request)).body)
        if ignored:
            response.headers["x-galley-ignored-params"] = ", ".join(ignored)
        return response

    async def delete(self, request: HTTPRequest) -> Response:
        """Forget it; later responses that continue it cannot be continued any more."""
        id = request.path_params["id"]
        await asyncio.to_thread(self._shelf.delete, id, "response", principal_of(request).key or "")
        return respond({"id": id, "object": "response", "deleted": True})

    async def input_items(self, request: HTTPRequest) -> Response:
        """The items of its own input, newest first."""
        page = Page.read(request, allowed=("include", "include[]"))
        response = respond(page.cut((await self.find(request)).input))
        if page.more:
            response.headers["x-galley-ignored-params"] = ", ".join(page.more)
        return response

    async def find(self, request: HTTPRequest) -> Kept:
        """One's own response. Raises NotFound."""
        owner = principal_of(request).key or ""
        return await asyncio.to_thread(self._shelf.get, request.path_params["id"], "response", owner)

    async def keep(
        self, body: dict[str, Any], request: Request, items: list[Any], previous: str | None
    ) -> None:
        """Store one response object."""
        kept = Kept(
            id=body["id"],
            kind="response",
            owner=request.key or "",
            # When it was stored first: the order of a list is that of creation.
            created=request.created or time.time(),
            model=body["model"],
            previous=previous,
            metadata=request.metadata,
            running=body["status"] in ("queued", "in_progress"),
            input=items,
            body=body,
        )
        await asyncio.to_thread(self._shelf.put, kept)


async def _unsent(message: Any) -> None:
    raise AssertionError("a page reads its body here and answers elsewhere")
