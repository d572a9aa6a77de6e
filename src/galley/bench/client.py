"""A streaming client that costs little: asyncio, httptools, and no object but the times that are wanted.

It shares processors with the server it measures, so every microsecond here is taken from there; results
quote what it used. Reads OpenAI's server-sent events of ``/completions`` and ``/chat/completions``.
"""

import asyncio
import ssl
import time
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

import httptools
import msgspec

from galley.errors import ConfigError, GalleyError

__all__ = ["Ask", "Client", "Outcome", "Target"]


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Whom to ask, and how.

    Attributes:
        url: base address as OpenAI's clients take it; without a path it is ``/v1``.
        extra: fields put into every body; ``ignore_eos: true`` makes outputs as long as asked for where it
            is known.
    """

    url: str
    model: str
    key: str | None = None
    chat: bool = False
    extra: dict[str, Any] = {}


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request to be made."""

    prompt: str
    max_tokens: int
    seed: int = 0


class Outcome(msgspec.Struct, kw_only=True):
    """What became of one request. Times are seconds of ``time.perf_counter``, or since the run's start.

    Attributes:
        scheduled: when it was to be sent; latencies count from here, so that a client or a server that falls
            behind cannot hide it (no coordinated omission).
        times: when each piece of text came. done: when the answer was complete or had failed.
        tokens: output tokens by the server's count, else the number of pieces (``counted`` is then False).
        prompt_tokens, cached_tokens: by the server's count, the latter found in its prefix cache.
        error: None, or a short class such as ``http 503 overloaded``, ``connection``, ``timeout``.
    """

    scheduled: float
    sent: float
    times: list[float] = []
    done: float = 0.0
    tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    counted: bool = False
    error: str | None = None

    def since(self, start: float) -> "Outcome":
        """With times counted from ``start``."""
        return msgspec.structs.replace(
            self,
            scheduled=self.scheduled - start,
            sent=self.sent - start,
            times=[at - start for at in self.times],
            done=self.done - start,
        )

    @property
    def ttft(self) -> float | None:
        return self.times[0] - self.scheduled if self.times else None

    @property
    def e2e(self) -> float:
        return self.done - self.scheduled

    @property
    def gaps(self) -> list[float]:
        """Between pieces of text."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_EVENT = msgspec.json.Decoder(_Event)


class _Exchange(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self.alive = False
        self._end: asyncio.Future[None] | None = None
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._events = False
        self._rest = b""
        self.status = 0
        self.body = bytearray()
        self.times: list[float] = []
        self.usage: _Usage | None = None
        self.finished = False
        self.fault: str | None = None
        self.heard = False

    async def ask(self, request: bytes) -> None:
        """Send and wait for the whole answer. Raises ConnectionError when the connection ends before it."""
        assert self._transport is not None
        self._reset()
        self._end = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._end

    def close(self) -> None:
        self.alive = False
        if self._transport is not None:
            self._transport.abort()

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transport is one in all but name.
        self._transport = cast(asyncio.Transport, transport)
        self.alive = True

    def data_received(self, data: bytes) -> None:
        self.heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.alive = False
        self._fail(ConnectionError(str(exc) if exc else "the server closed the connection"))

    def _fail(self, error: Exception) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_exception(error)

    # httptools calls these

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._events = value.startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if not self._events:
            self.body += body
            return
        now = time.perf_counter()
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        if self._end is not None and not self._end.done():
            self._end.set_result(None)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            return
        try:
            event = _EVENT.decode(data)
        except msgspec.DecodeError as error:
            self.fault = self.fault or f"stream: not an event of OpenAI's form ({error})"[:120]
            return
        if event.error is not None:
            self.fault = self.fault or f"stream: {_code(event.error)}"
        if event.usage is not None:
            self.usage = event.usage
        for choice in event.choices:
            delta = choice.delta
            if choice.text or (delta is not None and (delta.content or delta.reasoning_content)):
                self.times.append(now)
            self.finished = self.finished or choice.finish_reason is not None


class Client:
    """Asks one target; connections are kept and reused. ``async with``, or ``close`` it.

    Raises ConfigError for an address that is not http:// or https://.
    """

    def __init__(self, target: Target, *, timeout_s: float = 600.0) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self._place = _split(target.url)
        self._idle: list[_Exchange] = []
        self._tls = ssl.create_default_context() if self._place.scheme == "https" else None

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def ask(self, ask: Ask, *, scheduled: float | None = None) -> Outcome:
        """One streamed answer, timed. Failures are in ``Outcome.error``, never raised; cancels are."""
        target = self.target
        body: dict[str, Any] = {
            "model": target.model,
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "seed": ask.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            **target.extra,
        }
        if target.chat:
            body["messages"] = [{"role": "user", "content": ask.prompt}]
        else:
            body["prompt"] = ask.prompt
        path = "/chat/completions" if target.chat else "/completions"
        request = self._request("POST", path, msgspec.json.encode(body))
        sent = time.perf_counter()
        outcome = Outcome(scheduled=sent if scheduled is None else scheduled, sent=sent)
        exchange: _Exchange | None = None
        try:
            async with asyncio.timeout(self.timeout_s):
                exchange = await self._exchange(request)
        except TimeoutError:
            outcome.error = "timeout"
        except OSError as error:
            outcome.error = f"connection: {type(error).__name__}"
        outcome.done = time.perf_counter()
        if exchange is not None:
            self._read(exchange, outcome)
        return outcome

    async def models(self) -> list[str]:
        """Names that the target serves. Raises GalleyError when it does not tell."""
        try:
            async with asyncio.timeout(min(30.0, self.timeout_s)):
                exchange = await self._exchange(self._request("GET", "/models", b""))
            if exchange.status != 200:
                raise GalleyError(f"{self.target.url}/models answers {exchange.status}", code="bench_target")
            found = msgspec.json.decode(exchange.body, type=dict[str, Any])
            return [str(model["id"]) for model in found["data"]]
        except (OSError, TimeoutError, msgspec.DecodeError, KeyError, TypeError) as error:
            raise GalleyError(
                f"{self.target.url} does not list its models: {error}", code="bench_target"
            ) from error

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        place = self._place
        head = [
            f"{method} {place.path}{path} HTTP/1.1",
            f"Host: {place.netloc}",
            "Accept: text/event-stream",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        if self.target.key is not None:
            head.append(f"Authorization: Bearer {self.target.key}")
        return "\r\n".join([*head, "", ""]).encode() + body

    async def _exchange(self, request: bytes) -> _Exchange:
        while self._idle:
            kept = self._idle.pop()
            if not kept.alive:
                continue
            try:
                return await self._through(kept, request)
            except ConnectionError:
                # Closed for idleness just as we sent: nobody has read the request. Else it is a failure.
                if kept.heard:
                    raise
        place = self._place
        host = str(place.hostname)
        port = place.port or (443 if self._tls else 80)
        loop = asyncio.get_running_loop()
        _, fresh = await loop.create_connection(_Exchange, host, port, ssl=self._tls)
        return await self._through(fresh, request)

    async def _through(self, exchange: _Exchange, request: bytes) -> _Exchange:
        try:
            await exchange.ask(request)
        except BaseException:
            exchange.close()  # leaving closes, which is how a server learns of it
            raise
        if exchange.alive:
            self._idle.append(exchange)
        return exchange

    @staticmethod
    def _read(exchange: _Exchange, outcome: Outcome) -> None:
        outcome.times = exchange.times
        outcome.tokens = len(exchange.times)
        usage = exchange.usage
        if usage is not None:
            outcome.prompt_tokens = usage.prompt_tokens
            if usage.prompt_tokens_details is not None:
                outcome.cached_tokens = usage.prompt_tokens_details.cached_tokens
            if usage.completion_tokens is not None:
                outcome.tokens, outcome.counted = usage.completion_tokens, True
        if exchange.status != 200:
            outcome.error = f"http {exchange.status} {_code_of(bytes(exchange.body))}".rstrip()
        elif exchange.fault is not None:
            outcome.error = exchange.fault
        elif not exchange.finished:
            outcome.error = "incomplete"


def _split(url: str) -> SplitResult:
    place = urlsplit(url.rstrip("/"))
    try:
        good = place.scheme in ("http", "https") and place.hostname and (place.port or 1)
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"{url!r} is not an address such as http://127.0.0.1:7117/v1", param="url")
    return place if place.path else place._replace(path="/v1")


def _code(error: Any) -> str:
    """A short class of an error object: its code, else its type, else its message, cut."""
    if isinstance(error, dict):
        error = error.get("code") or error.get("type") or error.get("message")
    return str(error)[:60]


def _code_of(body: bytes) -> str:
    try:
        found = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return ""
    return _code(found.get("error", found)) if isinstance(found, dict) else ""
