"""What uvicorn says by itself, said as the rest of the server says it."""

import contextlib
from collections.abc import Iterator

import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from galley.errors import InvalidRequest

__all__ = ["Listener", "Protocol"]


class Protocol(HttpToolsProtocol):
    """HTTP/1.1 whose answer to bytes that are no HTTP is the four-key error object too."""

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
