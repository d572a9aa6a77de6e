"""The client's side of one exchange: its body, its patience, and whether it is still there."""

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from galley.economics.acts import RateExceeded
from galley.endpoint.dialect import dialect_of
from galley.endpoint.quota import limit_headers
from galley.errors import GalleyError, InvalidRequest, PayloadTooLarge, RequestTimeout

__all__ = ["Client", "DisconnectError", "error_headers", "wire_error"]

Headers = list[tuple[bytes, bytes]]
TELLS, LEFT = "galley.tells", "galley.left"
"""Keys of a scope: the server calls ``scope[LEFT]()`` when the client leaves, if it set ``scope[TELLS]``."""

DISCARD_LIMIT = 64 << 20
"""How much of an over-size body is read and thrown away so that the client gets to see the error."""


class DisconnectError(Exception):
    """The client closed the connection."""


def wire_error(error: BaseException) -> GalleyError:
    """The typed error to show for any exception; unknown ones are logged in full and shown without detail."""
    if isinstance(error, GalleyError):
        return error
    lines = "".join(traceback.format_exception(error))
    sys.stderr.write(f"galley: unexpected fault\n{lines}")
    sys.stderr.flush()
    return GalleyError("Galley met an unexpected fault; its log has the details.")


def error_headers(error: GalleyError) -> Headers:
    """Headers that go with an error: whether and when to retry, how to authenticate, what to do."""
    headers: Headers = []
    if error.status == 429 or error.status >= 500 or isinstance(error, PayloadTooLarge):
        headers.append((b"x-should-retry", b"true" if error.retryable else b"false"))
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, round(error.retry_after_s))).encode()))
        headers.append((b"retry-after-ms", str(round(error.retry_after_s * 1000)).encode()))
    if isinstance(error, RateExceeded):
        headers += limit_headers(error.rates)
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.hint:
        plain = error.hint.encode("ascii", "replace").replace(b"\r", b" ").replace(b"\n", b" ")
        headers.append((b"x-galley-hint", plain[:500]))
    return headers


class Client:
    """One HTTP exchange. ``gone`` turns true when the client leaves before the answer is complete."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.gone = False
        self.started = False
        """Whether response headers have been sent."""
        self.finished = False
        """Whether the last byte has been handed over."""
        self.headers: Headers = []
        """Sent with whatever response comes."""
        self._receive = receive
        self._send = send

    def header(self, name: bytes) -> bytes | None:
        """A request header; names in lower case."""
        for key, value in self.scope["headers"]:
            if key == name:
                return bytes(value)
        return None

    async def body(self, limit: int, *, within_s: float | None = None) -> bytes:
        """The whole body. Raises InvalidRequest, PayloadTooLarge, RequestTimeout, DisconnectError."""
        self._plain()
        try:
            async with asyncio.timeout(within_s):
                return await self._whole_body(limit)
        except TimeoutError:
            raise RequestTimeout(f"The body did not arrive within {within_s:g} s.") from None

    async def pieces(self, limit: int, *, silence_s: float | None = None) -> AsyncIterator[bytes]:
        """The body as it comes. Raises PayloadTooLarge as soon as it is, RequestTimeout, DisconnectError."""
        size = 0
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    message = await self._receive()
            except TimeoutError:
                raise RequestTimeout(f"Nothing of the body arrived for {silence_s:g} s.") from None
            if message["type"] == "http.disconnect":
                self.gone = True
                raise DisconnectError
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise self._too_large(limit)
            yield part
            if not message.get("more_body", False):
                return

    async def _whole_body(self, limit: int) -> bytes:
        declared = self.header(b"content-length")
        if declared is not None and declared.isdigit() and int(declared) > DISCARD_LIMIT:
            raise self._too_large(limit)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone = True
                raise DisconnectError
            part = message.get("body", b"")
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size > DISCARD_LIMIT:
                raise self._too_large(limit)
            if not message.get("more_body", False):
                if size > limit:
                    raise self._too_large(limit)
                return b"".join(parts)

    def _plain(self) -> None:
        coding = (self.header(b"content-encoding") or b"identity").decode("latin-1").lower()
        if coding != "identity":
            raise InvalidRequest(
                f"A body with Content-Encoding {coding[:64]!r} is not read here: send it as it is.",
                code="unsupported_content_encoding",
            )

    @staticmethod
    def _too_large(limit: int) -> InvalidRequest:
        return PayloadTooLarge(f"The body is larger than this server's limit of {limit} bytes.")

    async def beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` while watching for the client to leave; then cancel it at once (CAN-1).

        Streaming or not makes no difference. Returns normally when the client has gone.
        """
        mine = asyncio.current_task()
        assert mine is not None
        over = False

        def left(_: object = None) -> None:
            # Servers also report a disconnect once the response is complete: that is nobody leaving.
            if not self.finished and not over:
                self.gone = True
                mine.cancel()

        watch: asyncio.Future[None] | None = None
        if TELLS in self.scope:
            self.scope[LEFT] = left
        else:
            watch = asyncio.ensure_future(self._watch())
            watch.add_done_callback(left)
        try:
            await work
        except asyncio.CancelledError:
            # Ours alone, or somebody's from outside as well?
            if not self.gone or mine.uncancel():
                raise
        except (DisconnectError, OSError):
            # A failed write is how a server tells of a client that left between two looks.
            self.gone = True
        finally:
            over = True
            if watch is not None:
                watch.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: Headers) -> None:
        """Send the response's head; servers flush it at once."""
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers + self.headers})

    async def write(self, body: bytes, *, more: bool) -> None:
        """Send a piece of the body. Raises DisconnectError when there is nobody to read it."""
        if self.gone:
            raise DisconnectError
        self.finished = self.finished or not more
        try:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
        except OSError as error:
            self.gone = True
            raise DisconnectError from error

    async def json(self, status: int, body: bytes, headers: Headers | None = None) -> None:
        """A whole JSON response."""
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, [(b"content-type", b"application/json"), length, *(headers or [])])
        await self.write(body, more=False)

    async def error(self, error: GalleyError) -> None:
        """An error response, in the dialect of the path."""
        dialect = dialect_of(self.scope["path"])
        body = dialect.body(error, self.scope.get("state", {}).get("request_id"))
        await self.json(dialect.status(error), msgspec.json.encode(body), error_headers(error))
