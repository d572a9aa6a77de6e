"""A provider over HTTP: one base URL, some models, a dialect. ``start`` returns at the commit point.

The commit point is the first event with real output. Before it nothing has been shown to anybody, so a
failure is only an exception, which the router may answer by trying elsewhere. After it a failure is the
client's to know: the run raises ``Upstream`` of kind ``cut`` and never ends as if all were well.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence

import msgspec

from galley.errors import InvalidRequest, Upstream, UpstreamKind
from galley.providers.base import Load, Meter, ModelCard, Prepared
from galley.providers.dialect import Dialect, Heard, Timeouts
from galley.providers.http import Pool, Reply
from galley.providers.refusal import classify, failure
from galley.providers.sse import Events
from galley.runtime.meter import JobMeter
from galley.types import Delta, Digests, Request, Usage

__all__ = ["RemoteProvider", "RemoteRun"]

MAX_REPLY = 32 << 20
BUFFERED = 64
"""Events held back before the commit point."""


class RemoteProvider:
    """Runs requests on another server. Satisfies ``Provider``.

    Args:
        models: logical model to (name on the wire, context in tokens).
        key: sent as the dialect sends keys; never logged, never in an error.
    """

    def __init__(
        self,
        name: str,
        pool: Pool,
        dialect: Dialect,
        models: Mapping[str, tuple[str, int]],
        *,
        key: str | None = None,
        location: str = "cloud",
        timeouts: Timeouts | None = None,
        headers: Mapping[str, str] | None = None,
        health_path: str = "/models",
    ) -> None:
        self.name = name
        self.pool = pool
        self.dialect = dialect
        self.location = location
        self.digests = Digests()
        self.fingerprint = f"fp_remote_{name}"
        self.timeouts = timeouts or Timeouts()
        self.cards: Sequence[ModelCard] = [
            ModelCard(
                id=model,
                context=context,
                created=0,
                location=location,
                served_by=f"{location}:{wire}@{name}",
            )
            for model, (wire, context) in models.items()
        ]
        self._models = dict(models)
        self._headers = {
            "content-type": "application/json",
            "accept": "application/json, text/event-stream",
            "user-agent": "galley",
            **dialect.headers(key),
            **(headers or {}),
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in self._headers.items())
        self._fixed = lines.encode("latin-1")
        self._health_path = health_path
        self._running = 0

    async def prepare(self, request: Request) -> Prepared:
        """See ``Provider.prepare``: the server elsewhere tokenises and checks; this checks what it can carry.
        ``request.model`` is the logical model. Raises InvalidRequest."""
        why = self.dialect.lacks(request)
        if why is not None:
            raise InvalidRequest(f"{self.name} cannot serve this: {why}", code="unsupported_parameter")
        adjusted = self.dialect.adjusted(request)
        if adjusted:
            request = msgspec.structs.replace(request, clamped=request.clamped | adjusted)
        count = 1 if request.messages is not None else len(request.prompts or ())
        room = request.params.max_tokens or self._models[request.model][1]
        echo = [str(prompt) for prompt in request.prompts or ()] if request.echo else []
        return Prepared(
            request=request,
            params=request.params,
            prompts=[[] for _ in range(count)],
            max_tokens=[room] * count,
            echo=echo,
        )

    async def start(self, prepared: Prepared, meter: Meter) -> "RemoteRun":
        """Send the request and wait for the commit point. Raises Upstream."""
        run = RemoteRun(self, prepared, meter)
        self._running += 1
        try:
            await run.begin()
        except BaseException as error:
            await run.stop()
            if isinstance(error, Upstream) and not error.extra:
                raise failure(error.kind, self.name, str(error)) from error
            raise
        return run

    async def send(self, request: Request, idempotency: str) -> Reply:
        """One POST. Raises Upstream."""
        path, body = self.dialect.encode(request, self._models[request.model][0])
        return await self.pool.post(path, self._fixed, idempotency, body)

    async def healthy(self, timeout_s: float) -> bool:
        """Whether the server answers its models page with anything below 500 within ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self.pool.request("GET", self._health_path, self._headers)
                await reply.read(MAX_REPLY)
        except (Upstream, TimeoutError):
            return False
        return reply.status < 500

    def ended(self) -> None:
        """One run less."""
        self._running -= 1

    def load(self) -> Load:
        """See ``Provider.load``; only what we sent is known."""
        return Load(running=self._running)

    def close(self) -> None:
        """Close idle connections."""
        self.pool.close()

    def token(self, id: int) -> tuple[str, bytes]:
        raise self._elsewhere()

    def encode(self, text: str, *, special: bool) -> list[int]:
        raise self._elsewhere()

    def decode(self, ids: list[int]) -> str:
        raise self._elsewhere()

    def render(self, request: Request) -> str:
        raise self._elsewhere()

    def _elsewhere(self) -> InvalidRequest:
        return InvalidRequest(
            f"The tokenizer of {self.name} is not on this machine.", code="tokenizer_elsewhere"
        )


class RemoteRun:
    """One request at a remote provider. Satisfies ``Run``."""

    def __init__(self, provider: RemoteProvider, prepared: Prepared, meter: Meter) -> None:
        self.provider = provider
        self.said_model: str | None = None
        """The model name in the reply."""
        self._prepared = prepared
        self._meter = meter
        self._reader = provider.dialect.reader(prepared.request)
        self._reply: Reply | None = None
        self._events = Events()
        self._incoming: AsyncIterator[bytes] | None = None
        self._held: list[Delta] = []
        self._open = set(range(prepared.count))
        self._characters = [0] * prepared.count
        self._usage: Usage | None = None
        self._done = False
        self._stopped = False
        self._now = time.monotonic
        self._sent = self._now()
        self._first: float | None = None
        self._last: float | None = None
        self._slowest = 0.0

    async def begin(self) -> None:
        """To the commit point. Raises Upstream; then nothing was shown."""
        limits = self.provider.timeouts
        try:
            async with asyncio.timeout(limits.first):
                request = self._prepared.request
                # A retry is the same work; what a cascade asks of another model is not.
                self._reply = await self.provider.send(request, f"{request.id}-{request.model}")
                if self._reply.status != 200:
                    raise await self._refusal(self._reply)
                if request.stream:
                    self._incoming = self._reply.chunks()
                    while not self._committed():
                        await self._receive()
                        if len(self._held) > BUFFERED and not self._first:
                            raise self._fault("protocol", f"{BUFFERED} events came without any output")
                else:
                    self._whole(await self._reply.read(MAX_REPLY))
        except TimeoutError as error:
            raise self._fault("timeout", f"no output within {limits.first:g} s") from error
        if limits.slow_chars and request.stream:
            await self._guard(limits)

    async def _guard(self, limits: Timeouts) -> None:
        """Hold the answer back until it has shown that it flows."""
        try:
            async with asyncio.timeout(limits.slow_s):
                while self._open and sum(self._characters) < limits.slow_chars:
                    await self._receive()
        except TimeoutError as error:
            had = sum(self._characters)
            raise self._fault("timeout", f"slow: {had} characters in {limits.slow_s:g} s") from error

    async def deltas(self) -> AsyncIterator[Delta]:
        """See ``Run.deltas``. Raises Upstream of kind ``cut`` when the answer breaks off."""
        try:
            while True:
                held, self._held = self._held, []
                for delta in held:
                    self._meter.note(delta)
                    yield delta
                if self._held:
                    continue
                if self._done:
                    return
                try:
                    async with asyncio.timeout(self.provider.timeouts.idle):
                        await self._receive()
                except TimeoutError as error:
                    idle = self.provider.timeouts.idle
                    raise self._fault("cut", f"nothing came for {idle:g} s in mid-answer") from error
                except Upstream as error:
                    raise self._fault("cut", error.message) from error
        finally:
            self._settle()

    @property
    def over(self) -> bool:
        """Whether the reply was read to its end, so that ``stop`` has nothing to wait for."""
        return self._done

    async def stop(self) -> None:
        """See ``Run.stop``: cuts the connection unless the reply was read to its end."""
        if self._stopped:
            return
        self._stopped = True
        self.provider.ended()
        if self._reply is not None:
            self._reply.close()
        if self._incoming is not None:
            with contextlib.suppress(RuntimeError):
                await self._incoming.aclose()  # type: ignore[attr-defined]
        self._settle()

    # ---- reading

    def _committed(self) -> bool:
        return self._first is not None or self._done

    async def _receive(self) -> None:
        """One read of the socket into ``_held``. Raises Upstream."""
        assert self._incoming is not None
        data = await anext(self._incoming, None)
        if data is None:
            self._done = True
            if self._open:
                raise self._fault("protocol", "the stream ended without a finish reason")
            return
        for name, payload in self._events.feed(data):
            self._take(self._reader.event(name, payload))

    def _whole(self, raw: bytes) -> None:
        try:
            payload = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._fault("protocol", f"the reply is not JSON: {error}") from error
        self._take(self._reader.whole(payload))
        if self._open:
            raise self._fault("protocol", f"{len(self._open)} of {self._prepared.count} choices are missing")
        self._done = True

    def _take(self, heard: Heard) -> None:
        now = self._now()
        if heard.usage is not None:
            self._usage = heard.usage
        self.said_model = heard.model or self.said_model
        for delta in heard.deltas:
            if delta.index not in self._open:
                raise self._fault("protocol", f"output for choice {delta.index}, which is not open")
            said = len(delta.text) + len(delta.reasoning) + sum(len(c.arguments) for c in delta.tool_calls)
            if said or delta.tool_calls or delta.finish is not None:
                if self._last is not None:
                    self._slowest = max(self._slowest, now - self._last)
                self._first = self._first if self._first is not None else now
                self._last = now
            self._characters[delta.index] += said
            if delta.finish is not None:
                self._open.discard(delta.index)
            self._held.append(delta)
        if heard.done and self._open:
            raise self._fault("protocol", "the stream was declared done without a finish reason")

    async def _refusal(self, reply: Reply) -> Upstream:
        """The error that a status other than 200 stands for."""
        raw = await reply.read(1 << 20)
        return classify(self.provider.name, reply.status, reply.headers, raw)

    def _fault(self, kind: UpstreamKind, why: str) -> Upstream:
        return failure(kind, self.provider.name, why)

    # ---- the meter

    def _settle(self) -> None:
        """Put what is known of tokens and times into the request's meter. Idempotent."""
        if self._first is None:
            return
        usage = self._usage
        if usage is None:
            self._meter.estimated = True
            request = self._prepared.request
            usage = Usage(
                prompt_tokens=-(-characters(request) // 4),
                completion_tokens=sum(-(-count // 4) for count in self._characters),
            )
        shares = share(usage.completion_tokens, self._characters)
        for index in range(self._prepared.count):
            self._meter.jobs[index] = JobMeter(
                prompt_tokens=usage.prompt_tokens if index == 0 else 0,
                cached_tokens=usage.cached_tokens if index == 0 else 0,
                cache_write_tokens=usage.cache_write_tokens if index == 0 else 0,
                completion_tokens=shares[index],
                arrived=self._sent,
                first_scheduled=self._sent,
                first_token=self._first,
                last_token=self._last,
                finished=self._last,
                itl_max_s=self._slowest or None,
            )
            self._meter.kept[index] = shares[index]


def characters(request: Request) -> int:
    """Characters of the prompt."""
    if request.messages is not None:
        return sum(len(str(message.get("content") or "")) for message in request.messages)
    return sum(len(prompt) for prompt in request.prompts or ())


def share(total: int, weights: Sequence[int]) -> list[int]:
    """Split a whole number in proportion to weights, exactly (largest remainder)."""
    if not weights:
        return []
    if sum(weights) == 0:
        return [total, *[0] * (len(weights) - 1)]
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(value) for value in exact]
    order = sorted(range(len(weights)), key=lambda i: parts[i] - exact[i])
    for i in order[: total - sum(parts)]:
        parts[i] += 1
    return parts
