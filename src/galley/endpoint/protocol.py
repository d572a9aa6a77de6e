"""What uvicorn says by itself, said as the rest of the server says it."""

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from galley.errors import InvalidRequest

__all__ = ["Protocol"]


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
