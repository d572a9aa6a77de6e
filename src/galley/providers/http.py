"""A thin HTTP/1.1 client for upstreams: asyncio transports, httptools parsing, kept-alive connections.

Written out because it is the hot path of a proxy: one ``write`` a request, no task per request, TCP_NODELAY,
bodies handed on as they arrive. No redirects, no cookies, no proxies from the environment, no compression.
"""

import asyncio
import collections
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from typing import cast
from urllib.parse import urlsplit

import httptools

from galley.errors import ConfigError, Upstream

__all__ = ["Pool", "Reply"]

HIGH_WATER = 256 * 1024
"""Bytes of body waiting for a reader above which the socket is no longer read."""
MAX_HEAD = 64 * 1024


class Connection(asyncio.Protocol):
    """One connection; one exchange at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost = False
        self.idle_since = 0.0
        self.used = 0
        self.begin()

    def begin(self) -> None:
        """Forget the last exchange."""
        self._parser = httptools.HttpResponseParser(self)
        self.headers: dict[str, str] = {}
        self._head_bytes = 0
        self.heard = False
        self.complete = False
        self.keep = False
        self.body: collections.deque[bytes] = collections.deque()
        self._waiting = 0
        self._paused = False
        self.fault: str | None = None
        self._head: asyncio.Future[int] | None = None
        self._more: asyncio.Future[None] | None = None
        self._expects = False

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if not self._expects:
            # Bytes nobody asked for: the connection is out of step and must not be used again.
            self.close()
            return
        self.heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the reply is not HTTP: {error}")
            self.close()

    def eof_received(self) -> bool:
        if self._expects and not self.complete and self.heard and self._ends_at_close():
            self.on_message_complete()
            self.keep = False
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if not self.complete:
            self._fail(f"the connection broke{f': {exc}' if exc else ' off'}")

    # ---- httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD:
            self._fail(f"the reply's head is longer than {MAX_HEAD} bytes")
            self.close()
            return
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.keep = self._parser.should_keep_alive()
        if self._head is not None and not self._head.done():
            self._head.set_result(self._parser.get_status_code())

    def on_body(self, piece: bytes) -> None:
        self.body.append(piece)
        self._waiting += len(piece)
        if self._waiting > HIGH_WATER and not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        self.complete = True
        self._wake()

    # ---- for Pool and Reply

    def _ends_at_close(self) -> bool:
        """Neither length nor chunks: by RFC 9112 section 6.3 the body ends where the connection does."""
        return "content-length" not in self.headers and "transfer-encoding" not in self.headers

    def _fail(self, why: str) -> None:
        if self.fault is None:
            self.fault = why
        if self._head is not None and not self._head.done():
            self._head.set_exception(Upstream(why, kind="network"))
        self._wake()

    def _wake(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    async def send(self, data: bytes) -> int:
        """Send a request and wait for the status. Raises Upstream."""
        self.begin()
        self._expects = True
        self.used += 1
        assert self.transport is not None
        self._head = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return await self._head

    async def more(self) -> bytes | None:
        """The next pieces of the body joined; None at its end. Raises Upstream when it was cut short."""
        while not self.body:
            if self.complete:
                self._expects = False
                return None
            if self.fault is not None:
                raise Upstream(self.fault, kind="network")
            self._more = asyncio.get_running_loop().create_future()
            await self._more
        data = self.body.popleft() if len(self.body) == 1 else b"".join(self.body)
        self.body.clear()
        self._waiting = 0
        if self._paused and self.transport is not None and not self.lost:
            self._paused = False
            self.transport.resume_reading()
        return data

    def close(self) -> None:
        self.lost = True
        if self.transport is not None:
            self.transport.abort()


class Reply:
    """A reply whose head is here. ``close`` it, unless it was read to its end."""

    def __init__(self, pool: "Pool", connection: Connection, status: int) -> None:
        self.status = status
        self.headers = connection.headers
        self._pool = pool
        self._connection = connection
        self._done = False

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises Upstream when the connection breaks before its end."""
        while (data := await self._connection.more()) is not None:
            yield data
        self._finish()

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises Upstream when it is cut short or longer than ``limit`` bytes."""
        parts: list[bytes] = []
        size = 0
        while (data := await self._connection.more()) is not None:
            parts.append(data)
            size += len(data)
            if size > limit:
                self.close()
                raise Upstream(f"the reply is longer than {limit} bytes", kind="protocol")
        self._finish()
        return b"".join(parts)

    def _finish(self) -> None:
        if not self._done:
            self._done = True
            self._pool.give_back(self._connection)

    def close(self) -> None:
        """Give up: the connection is cut, so the upstream notices at once. Idempotent."""
        if not self._done:
            self._done = True
            self._connection.close()


class Pool:
    """Kept-alive connections to one upstream. Belongs to one event loop.

    Args:
        url: base, e.g. ``https://api.example.com/v1``.
        connect_s: most seconds for a connection, TLS included.
        max_idle: connections kept open unused, each for at most ``idle_s``.

    Raises ConfigError for a URL that is not http(s).
    """

    def __init__(
        self,
        url: str,
        *,
        connect_s: float = 5.0,
        max_idle: int = 128,
        idle_s: float = 50.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no http or https URL", param="provider.url")
        self.host = parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.base = parts.path.rstrip("/")
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        default = parts.port is None or (parts.scheme, parts.port) in (("http", 80), ("https", 443))
        name = f"[{self.host}]" if ":" in self.host else self.host
        self._authority = name if default else f"{name}:{self.port}"
        self._connect_s = connect_s
        self._max_idle = max_idle
        self._idle_s = idle_s
        self._idle: list[Connection] = []
        self._closed = False

    async def request(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Reply:
        """Send one request; returns when the reply's head is here. Raises Upstream.

        A kept-alive connection that the other side closed before it said anything is replaced by a new one,
        once: it was closed for idleness, and the request carries an Idempotency-Key if it is a POST.
        """
        lines = [f"{method} {self.base}{path} HTTP/1.1\r\nhost: {self._authority}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body or method == "POST":
            lines.append(f"content-length: {len(body)}")
        return await self._send("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)

    async def post(self, path: str, fixed: bytes, idempotency: str, body: bytes) -> Reply:
        """``request`` of a POST whose headers but two are always the same: ``fixed``, as lines each with its
        end. Raises Upstream."""
        first = f"POST {self.base}{path} HTTP/1.1\r\nhost: {self._authority}\r\n"
        last = f"idempotency-key: {idempotency}\r\ncontent-length: {len(body)}\r\n\r\n"
        return await self._send(first.encode("latin-1") + fixed + last.encode("latin-1") + body)

    async def _send(self, data: bytes) -> Reply:
        while True:
            connection = self._take()
            reused = connection is not None
            if connection is None:
                connection = await self._connect()
            try:
                return Reply(self, connection, await connection.send(data))
            except Upstream:
                connection.close()
                if not reused or connection.heard:
                    raise
            except BaseException:
                connection.close()
                raise

    def _take(self) -> Connection | None:
        oldest = time.monotonic() - self._idle_s
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost and connection.idle_since > oldest:
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await loop.create_connection(
                    Connection,
                    self.host,
                    self.port,
                    ssl=self._tls,
                    server_hostname=self.host if self._tls else None,
                )
        except TimeoutError as error:
            raise Upstream(f"no connection within {self._connect_s:g} s", kind="timeout") from error
        except (OSError, ssl.SSLError) as error:
            raise Upstream(f"no connection: {error}", kind="network") from error
        return connection

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose exchange is complete, if it may be kept."""
        if connection.keep and not connection.lost and not self._closed and len(self._idle) < self._max_idle:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close what is idle; what is in use closes when it is given back."""
        self._closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()
