"""The exchange of every generation door: check, open, stream or gather, and one receipt whatever happens."""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from galley.audit.assemble import receipt_id as new_receipt_id
from galley.economics.amount import dollars
from galley.endpoint.access import named, tenant_of
from galley.endpoint.client import Client, DisconnectError, wire_error
from galley.endpoint.keys import Principal
from galley.endpoint.params import stub
from galley.endpoint.quota import limit_headers
from galley.endpoint.reply import Options, Reply, Whole
from galley.endpoint.translate import renamed
from galley.endpoint.wire import header_list, parse_object
from galley.errors import GalleyError, InvalidRequest
from galley.router.router import Answer, Router
from galley.types import Delta, Judgement, Request

__all__ = ["Door", "Generate", "Keep", "Limits", "Outcome"]

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]


NDJSON_HEADERS = [(b"content-type", b"application/x-ndjson"), *SSE_HEADERS[1:]]


class Door(Protocol):
    """What differs between the APIs."""

    api: str

    def parse(
        self, body: dict[str, Any], *, request_id: str, capture: bool, key: str | None
    ) -> tuple[Request, Options] | Awaitable[tuple[Request, Options]]: ...

    def reply(self, answer: Answer, options: Options) -> Whole:
        """A ``Reply`` where ``options.stream`` may be set."""
        ...


class Keep(Protocol):
    """Stores a finished answer, before its last byte is sent."""

    async def __call__(self, request: Request, options: Options, whole: bytes) -> None: ...


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on one exchange."""

    body: int = 8 << 20
    """Bytes."""
    body_s: float | None = 60.0
    """Longest wait for the body."""
    total_s: float | None = None
    """Longest time from arrival to the last token, where the request itself does not say less."""
    keepalive_s: float = 15.0
    """Silence after which a stream gets a comment."""


class Outcome(msgspec.Struct, frozen=True):
    """How one answer without HTTP ended."""

    status: int
    body: bytes
    """JSON: the answer, or the error object."""
    error: GalleyError | None = None


class Generate:
    """An ASGI endpoint around one door.

    Everything that can be wrong with a request is found before the first byte of the answer, so it is a real
    4xx or 503. After that an error is the stream's last event, and nothing says that it ended well.

    Args:
        capture: store prompts and outputs in receipts.
        keep: what to do with an answer whose request says ``store`` (``options.keep``).
    """

    def __init__(
        self, router: Router, door: Door, *, limits: Limits, capture: bool, keep: Keep | None = None
    ) -> None:
        self._router = router
        self._door = door
        self._limits = limits
        self._capture = capture
        self._keep = keep

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = Client(scope, receive, send)
        receipt_id = new_receipt_id()
        client.headers.append((b"x-galley-receipt", receipt_id.encode()))
        started = time.monotonic()
        parsed = await self._parse(client, receipt_id, started)
        if parsed is not None:
            await client.beside(self._answer(client, *parsed, receipt_id))

    async def once(
        self, body: dict[str, Any], *, request_id: str, principal: Principal, metadata: dict[str, str]
    ) -> "Outcome":
        """One whole answer without HTTP: a line of a batch. Runs after everybody else (``flex``) unless it
        says otherwise. ``metadata`` goes on the receipt. Raises nothing but cancellation."""
        receipt_id = new_receipt_id()
        started = time.monotonic()
        request = None
        try:
            body = {"service_tier": "flex", **body}
            request, options = await self.read(body, request_id=request_id, principal=principal)
            if options.stream:
                raise InvalidRequest("A line of a batch cannot be streamed.", param="stream")
            request = msgspec.structs.replace(
                request,
                metadata={**request.metadata, **metadata},
                tenant=principal.tenant or request.user or "local",
                org=principal.org,
                team=principal.team,
                batch=True,
            )
            async with self._router.open(request, receipt_id=receipt_id) as answer:
                reply = self._door.reply(answer, options)
                async for delta in answer.deltas():
                    reply.take(delta)
            whole = reply.whole(answer.usage())
            if self._keep is not None and options.keep:
                await self._keep(request, options, whole)
            return Outcome(200, whole)
        except Exception as error:
            shown = wire_error(error)
            if request is None:
                refused = stub(body, request_id=request_id, api=self._door.api, key=principal.key)
                self._router.refuse(refused, shown, receipt_id=receipt_id, started=started)
            return Outcome(shown.status, msgspec.json.encode(shown.body()), shown)

    async def read(
        self, body: dict[str, Any], *, request_id: str, principal: Principal
    ) -> tuple[Request, Options]:
        """The request, checked as far as can be without a model. Raises GalleyError."""
        found = self._door.parse(body, request_id=request_id, capture=self._capture, key=principal.key)
        request, options = await found if inspect.isawaitable(found) else found
        allowed = principal.reachable(request.model, self._router.catalog)
        if allowed:
            request = msgspec.structs.replace(request, allowed_models=allowed)
        if options.keep and self._keep is None:
            options = msgspec.structs.replace(options, keep=False)
            request = msgspec.structs.replace(request, ignored_params=["store", *request.ignored_params])
        if self._limits.total_s is not None:
            least = min(self._limits.total_s, request.max_total_s or self._limits.total_s)
            request = msgspec.structs.replace(request, max_total_s=least)
        return request, options

    async def _parse(self, client: Client, receipt_id: str, started: float) -> tuple[Request, Options] | None:
        """The request, or None after refusing it: with its error, and with a receipt all the same."""
        state = client.scope.get("state", {})
        request_id, principal = state.get("request_id", receipt_id), state.get("principal", Principal())
        body: dict[str, Any] = {}
        try:
            raw = await client.body(self._limits.body, within_s=self._limits.body_s)
            body = parse_object(raw)
            request, options = await self.read(body, request_id=request_id, principal=principal)
            request = msgspec.structs.replace(
                request,
                tenant=tenant_of(client, principal, request.user),
                org=principal.org,
                team=principal.team,
                session=request.session or named(client, "x-galley-session"),
            )
            return request, options
        except Exception as error:
            shown = None if isinstance(error, DisconnectError) else wire_error(error)
            refused = stub(body, request_id=request_id, api=self._door.api, key=principal.key)
            self._router.refuse(refused, shown, receipt_id=receipt_id, started=started)
            if shown is not None:
                await client.error(shown)
            return None

    async def _answer(self, client: Client, request: Request, options: Options, receipt_id: str) -> None:
        before = list(client.headers)
        client.headers += told(request)
        reply: Whole | None = None
        streamed: Reply | None = None
        try:
            async with self._router.open(request, receipt_id=receipt_id, gone=lambda: client.gone) as answer:
                client.headers[:] = before + told(answer.request)
                client.headers.append((b"x-galley-served-by", answer.card.served_by.encode()))
                if answer.prepared.pooling_note:
                    client.headers.append((b"x-galley-pooling", answer.prepared.pooling_note.encode()))
                client.headers += limit_headers(answer.purse.rates, answer.purse.warnings)
                if answer.judgement is not None:
                    client.headers.append((b"x-galley-cascade", cascade_words(answer.judgement).encode()))
                reply = self._door.reply(answer, options)
                if options.stream:
                    assert isinstance(reply, Reply)
                    streamed = reply
                    await self._stream(client, answer, streamed, options)
                else:
                    async for delta in answer.deltas():
                        reply.take(delta)
            # The receipt is recorded now: whoever has the last byte can ask for it, and for the answer.
            whole = b"" if options.stream and not options.keep else reply.whole(answer.usage())
            if self._keep is not None and options.keep:
                await self._keep(request, options, whole)
            if streamed is None:
                money = answer.receipt.money if answer.receipt is not None else None
                if money is not None:
                    client.headers.append((b"x-galley-cost-usd", dollars(money.cost_pico).encode()))
                if answer.warnings:
                    words = " ".join("; ".join(answer.warnings).split()).encode("ascii", "replace")
                    client.headers.append((b"x-galley-parse-warning", words[:2000]))
                await client.json(200, whole)
            else:
                await client.write(streamed.ending(answer.usage()), more=False)
        except DisconnectError:
            raise
        except Exception as error:
            shown = renamed(wire_error(error), options.names)
            if not client.started or streamed is None:
                await client.error(shown)
            else:
                await client.write(streamed.fault(shown), more=False)

    async def _stream(self, client: Client, answer: Answer, reply: Reply, options: Options) -> None:
        deltas = answer.deltas()
        first: Delta | None = None
        if answer.request.max_queue_s is not None or answer.request.max_total_s is not None:
            # The head waits for the first token, so that a deadline missed in the queue is a real 503 or 504.
            first = await anext(deltas, None)
        await client.start(200, NDJSON_HEADERS if options.ndjson else SSE_HEADERS)
        head = reply.opening()
        if head:
            await client.write(head, more=True)
        pulse = Pulse(client, float("inf") if options.ndjson else self._limits.keepalive_s)
        try:
            async for delta in follow(first, deltas):
                if options.keep:
                    reply.take(delta)
                chunk = reply.chunks(delta)
                if chunk:
                    pulse.beat()
                    await client.write(chunk, more=True)
        finally:
            pulse.stop()


async def follow(first: Delta | None, rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    """A piece taken already, if any, and those after it."""
    if first is not None:
        yield first
    async for delta in rest:
        yield delta


def told(request: Request) -> list[tuple[bytes, bytes]]:
    """Headers that name what was left out of a request, or changed in it."""
    headers = []
    if request.ignored_params:
        headers.append((b"x-galley-ignored-params", header_list(request.ignored_params).encode()))
    if request.clamped:
        words = "; ".join(f"{path}: {what}" for path, what in request.clamped.items())
        headers.append((b"x-galley-clamped", words.encode("ascii", "replace")[:2000]))
    return headers


def cascade_words(judgement: Judgement) -> str:
    """A cascade's decision in one header line."""
    what = f"escalated to {judgement.to}" if judgement.escalated else "kept"
    words = " ".join(f"{judgement.first} {what}: {judgement.reason}".split())
    return words.encode("ascii", "replace").decode()[:1000]


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
