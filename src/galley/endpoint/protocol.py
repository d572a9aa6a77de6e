"""What uvicorn says by itself, said as the rest of the server says it."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any, cast

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from galley.endpoint.client import LEFT, TELLS
from galley.errors import InvalidRequest

__all__ = ["Listener", "Protocol"]


class Protocol(HttpToolsProtocol):
    """HTTP/1.1 whose answer to bytes that are no HTTP is the four-key error object too, and which tells a
    client's leaving at once (``scope[LEFT]``), so that no task has to wait for it."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast(dict[str, Any], self.scope)[TELLS] = True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.cycle is not None and not self.cycle.response_complete:
            left = self.cycle.scope.get(LEFT)
            if callable(left):
                left()

    def send_400_response(self, msg: str) -> None:
        """Refuse what could not be parsed and close the connection. There is no request, so no receipt."""
        error = InvalidRequest(msg, code="invalid_http")
        body = msgspec.json.encode(error.body())
        head = (
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n" % len(body)
        )
        self.transport.write(head + body)
        self.transport.close()


class Listener(uvicorn.Server):
    """uvicorn without its signal handling: it re-raises SIGTERM at the end, which is not exit code 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def settle(self, within_s: float) -> None:
        """Let the exchanges under way end, and cut those that do not in time."""
        state = self.server_state
        end = time.monotonic() + within_s
        while state.tasks and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if not state.tasks:
            return
        for connection in list(state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await asyncio.wait(state.tasks, timeout=within_s)
