"""The exchange of both generation doors: check, open, stream or gather, and one receipt whatever happens."""

import asyncio
import time
from typing import Any, Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from galley.audit.assemble import receipt_id as new_receipt_id
from galley.endpoint.client import Client, DisconnectError, wire_error
from galley.endpoint.params import stub
from galley.endpoint.reply import Options, Reply
from galley.endpoint.wire import header_list, parse_object
from galley.errors import GalleyError
from galley.router.router import Answer, Router
from galley.types import Request

__all__ = ["Door", "Generate"]

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]


class Door(Protocol):
    """What differs between chat and completions."""

    api: str

    def parse(
        self, body: dict[str, Any], *, request_id: str, capture: bool, key: str | None
    ) -> tuple[Request, Options]: ...

    def reply(self, answer: Answer, options: Options) -> Reply: ...


class Generate:
    """An ASGI endpoint around one door.

    Everything that can be wrong with a request is found before the first byte of the answer, so it is a real
    4xx or 503. After that an error is an SSE event without ``[DONE]``.
    """

    def __init__(
        self, router: Router, door: Door, *, max_body: int, capture: bool, keepalive_s: float = 15.0
    ) -> None:
        self._router = router
        self._door = door
        self._max_body = max_body
        self._capture = capture
        self._keepalive_s = keepalive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = Client(scope, receive, send)
        receipt_id = new_receipt_id()
        client.headers.append((b"x-galley-receipt", receipt_id.encode()))
        started = time.monotonic()
        parsed = await self._parse(client, receipt_id, started)
        if parsed is not None:
            await client.beside(self._answer(client, *parsed, receipt_id))

    async def _parse(self, client: Client, receipt_id: str, started: float) -> tuple[Request, Options] | None:
        """The request, or None after refusing it: with its error, and with a receipt all the same."""
        state = client.scope.get("state", {})
        request_id, key = state.get("request_id", receipt_id), state.get("key")
        body: dict[str, Any] = {}
        try:
            raw = await client.body(self._max_body)
            body = parse_object(raw)
            return self._door.parse(body, request_id=request_id, capture=self._capture, key=key)
        except Exception as error:
            shown = None if isinstance(error, DisconnectError) else wire_error(error)
            refused = stub(body, request_id=request_id, api=self._door.api, key=key)
            self._router.refuse(refused, shown, receipt_id=receipt_id, started=started)
            if shown is not None:
                await client.error(shown)
            return None

    async def _answer(self, client: Client, request: Request, options: Options, receipt_id: str) -> None:
        before = list(client.headers)
        client.headers += told(request)
        try:
            async with self._router.open(request, receipt_id=receipt_id, gone=lambda: client.gone) as answer:
                client.headers[:] = before + told(answer.request)
                client.headers.append((b"x-galley-served-by", answer.card.served_by.encode()))
                # What was adjusted for this model, known only now.
                late = {p: w for p, w in answer.request.clamped.items() if p not in request.clamped}
                if late:
                    words = "; ".join(f"{path}: {what}" for path, what in late.items())
                    client.headers.append((b"x-galley-clamped", words.encode("ascii", "replace")[:2000]))
                reply = self._door.reply(answer, options)
                if options.stream:
                    await self._stream(client, answer, reply)
                else:
                    async for delta in answer.deltas():
                        reply.take(delta)
            # The receipt is recorded now: whoever has the last byte can ask for it.
            if not options.stream:
                if answer.warnings:
                    shown = " ".join("; ".join(answer.warnings).split()).encode("ascii", "replace")
                    client.headers.append((b"x-galley-parse-warning", shown[:2000]))
                await client.json(200, reply.whole(answer.usage()))
            else:
                usage = reply.usage_chunk(answer.usage()) if options.include_usage else b""
                await client.write(usage + b"data: [DONE]\n\n", more=False)
        except DisconnectError:
            raise
        except Exception as error:
            fault = wire_error(error)
            if not client.started:
                await client.error(fault)
            else:
                await client.write(b"data: " + msgspec.json.encode(fault.body()) + b"\n\n", more=False)

    async def _stream(self, client: Client, answer: Answer, reply: Reply) -> None:
        await client.start(200, SSE_HEADERS)
        pulse = Pulse(client, self._keepalive_s)
        try:
            async for delta in answer.deltas():
                chunk = reply.chunks(delta)
                if chunk:
                    pulse.beat()
                    await client.write(chunk, more=True)
        finally:
            pulse.stop()


def told(request: Request) -> list[tuple[bytes, bytes]]:
    """Headers that name what was left out of a request, or changed in it."""
    headers = []
    if request.ignored_params:
        headers.append((b"x-galley-ignored-params", header_list(request.ignored_params).encode()))
    if request.clamped:
        words = "; ".join(f"{path}: {what}" for path, what in request.clamped.items())
        headers.append((b"x-galley-clamped", words.encode("ascii", "replace")[:2000]))
    return headers


class Pulse:
    """A comment every so many silent seconds, for the proxies between. Never an ``id:`` line: with one, the
    official client takes the comment's blank line for an event and fails to parse it."""

    def __init__(self, client: Client, every_s: float) -> None:
        self._client = client
        self._every_s = every_s
        self._last = time.monotonic()
        self._task = asyncio.ensure_future(self._run())

    def beat(self) -> None:
        """Something was sent."""
        self._last = time.monotonic()

    def stop(self) -> None:
        """No more comments."""
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            silent = time.monotonic() - self._last
            if silent < self._every_s:
                await asyncio.sleep(self._every_s - silent)
                continue
            self.beat()
            try:
                await self._client.write(b": keep-alive\n\n", more=True)
            except (DisconnectError, GalleyError):
                return
