"""Creating responses: at once, streamed, or in the background; and cancelling those."""

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from galley.endpoint.client import Client, wire_error
from galley.endpoint.generate import Generate, Limits, Outcome, told
from galley.endpoint.keys import Principal
from galley.endpoint.paging import respond
from galley.endpoint.reply import Options
from galley.endpoint.responses.door import ResponseDoor, ResponseOptions
from galley.endpoint.responses.reply import ResponseReply, response_id
from galley.endpoint.shelf import Shelf
from galley.endpoint.stored import StoredResponses
from galley.endpoint.translate import renamed
from galley.errors import InvalidRequest
from galley.router.router import Router
from galley.types import Request

__all__ = ["Responses"]


class Responses(Generate):
    """``POST /v1/responses`` and ``/cancel``.

    A background response runs as a task of this process; its state is on the shelf, so that it can be asked
    for, and is marked failed when the process does not live to finish it.
    """

    def __init__(self, router: Router, shelf: Shelf, *, store: bool, limits: Limits, capture: bool) -> None:
        door = ResponseDoor(shelf, store=store)
        super().__init__(router, door, limits=limits, capture=capture, keep=self._store)
        self.stored = StoredResponses(shelf)
        self._responses = door
        self._running: dict[str, asyncio.Task[None]] = {}

    async def once(
        self, body: dict[str, Any], *, request_id: str, principal: Principal, metadata: dict[str, str]
    ) -> Outcome:
        """A line of a batch is in the background as it is."""
        body = {**body, "background": False} if body.get("background") is True else body
        return await super().once(body, request_id=request_id, principal=principal, metadata=metadata)

    async def _store(self, request: Request, options: Options, whole: bytes) -> None:
        await self._shelve(request, options, msgspec.json.decode(whole))

    async def _shelve(self, request: Request, options: Options, body: dict[str, Any]) -> None:
        assert isinstance(options, ResponseOptions)
        await self.stored.keep(body, request, options.items, options.previous)

    async def _answer(self, client: Client, request: Request, options: Options, receipt_id: str) -> None:
        if not isinstance(options, ResponseOptions) or not options.background:
            await super()._answer(client, request, options, receipt_id)
            return
        client.headers += told(request)
        begun: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(self._run(request, options, receipt_id, begun))
        id = response_id(receipt_id)
        self._running[id] = task
        task.add_done_callback(lambda _: self._running.pop(id, None))
        try:
            body = await asyncio.shield(begun)
        except Exception as error:
            await client.error(renamed(wire_error(error), options.names))
            return
        await client.json(200, msgspec.json.encode(body))

    async def _run(
        self,
        request: Request,
        options: ResponseOptions,
        receipt_id: str,
        begun: "asyncio.Future[dict[str, Any]]",
    ) -> None:
        """One background response to its end. ``begun`` gets the object, or the refusal."""
        reply: ResponseReply | None = None
        try:
            async with self._router.open(request, receipt_id=receipt_id) as answer:
                reply = self._responses.reply(answer, options)
                body = reply.status("in_progress")
                await self._shelve(request, options, body)
                begun.set_result(body)
                async for delta in answer.deltas():
                    reply.take(delta)
            await self._shelve(request, options, msgspec.json.decode(reply.whole(answer.usage())))
        except asyncio.CancelledError:
            if reply is not None:
                await self._shelve(request, options, reply.status("cancelled"))
        except Exception as error:
            if not begun.done():
                begun.set_exception(error)
            elif reply is not None:
                await self._shelve(request, options, reply.failed(wire_error(error)))

    async def cancel(self, request: HTTPRequest) -> Response:
        """Stop a background response; one that has ended already is shown as it ended."""
        kept = await self.stored.find(request)
        if not kept.body["background"]:
            raise InvalidRequest(
                "Only responses created with 'background': true can be cancelled.", param="response_id"
            )
        task = self._running.get(kept.id)
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))
            kept = await self.stored.find(request)
        return respond(kept.body)
