"""A provider without a model: bytes are tokens, the answer is scripted. For tests of everything above it."""

import asyncio
import threading
import time
from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import msgspec

from galley.errors import ContextLengthExceeded, GalleyError, InvalidRequest, Overloaded
from galley.providers.base import Load, Meter, ModelCard, Prepared
from galley.runtime.sampling import params as sampling
from galley.types import Delta, Digests, Receipt, Request, TokenLogprob


@dataclass
class FakeMeter:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    cache_ends: tuple[tuple[int, int], ...] = ()
    completion_tokens: int = 0
    arrived: float = field(default_factory=time.monotonic)
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    itl_max_s: float | None = None
    steps: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    prefill_flop: float = 1e6
    decode_bytes: float = 1e6
    kv_byte_seconds: float = 1.0


class FakeProvider:
    """Says ``words`` one a step, one step every ``step_s``; fails with ``fault`` before word ``fault_at``."""

    def __init__(
        self,
        words: tuple[str, ...] = ("Hel", "lo ", "wörld"),
        *,
        step_s: float = 0.0,
        fault: Exception | None = None,
        fault_at: int = 0,
        full: bool = False,
        name: str = "fake-1b",
        context: int = 100,
        script: tuple[Delta, ...] = (),
        tokens: tuple[bytes, ...] = (),
    ) -> None:
        self.name = "fake"
        self.words = words
        self.step_s = step_s
        self.tokens = tokens
        """Ids of each word, when they are not to be its first character's."""
        self.fault = fault
        self.fault_at = fault_at
        self.full = full
        self.fingerprint = "fp_fake"
        self.digests = Digests(weights="w", tokenizer="t", template="c", engine="e")
        self.context = context
        self.script = script
        """Deltas said instead of the words, by every choice."""
        self.cards = [ModelCard(id=name, context=context, created=7, served_by=f"fake:{name}@cpu")]
        self.running = 0
        self.steps = 0
        self.seen: list[Request] = []
        self.gate: threading.Event | None = None
        """Keeps encode, decode and render waiting, as large work does."""

    async def prepare(self, request: Request) -> Prepared:
        self.seen.append(request)
        prompts = [list(self.render(request).encode())] if request.messages is not None else []
        prompts += [list(p.encode()) if isinstance(p, str) else p for p in request.prompts or ()]
        params = request.params
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=42)
        sampling.check(params, 256)
        room = []
        for ids in prompts:
            left = self.context - len(ids)
            if left < 1 or (params.max_tokens or 0) > left:
                raise ContextLengthExceeded(
                    prompt_tokens=len(ids),
                    max_tokens=params.max_tokens,
                    context=self.context,
                    param="messages",
                )
            room.append(params.max_tokens or left)
        echo = [self.decode(ids) for ids in prompts] if request.echo else []
        return Prepared(request=request, params=params, prompts=prompts, max_tokens=room, echo=echo)

    async def start(self, prepared: Prepared, meter: Meter) -> "FakeRun":
        if self.full:
            raise Overloaded("The queue is full.", retry_after_s=2.0)
        self.running += prepared.count
        return FakeRun(self, prepared, meter)

    def load(self) -> Load:
        return Load(running=self.running, blocks_total=8, blocks_free=8 - self.running, block_size=16)

    def token(self, id: int) -> tuple[str, bytes]:
        if id >= 128:  # a byte of a longer character
            return "\ufffd", bytes([id])
        return chr(id), chr(id).encode()

    def encode(self, text: str, *, special: bool) -> list[int]:
        assert self.gate is None or self.gate.wait(10)
        return ([1] if special else []) + list(text.encode())

    def decode(self, ids: list[int]) -> str:
        assert self.gate is None or self.gate.wait(10)
        if any(not 0 <= id < 256 for id in ids):
            raise InvalidRequest("outside", param="tokens[0]", code="invalid_token_id")
        return bytes(ids).decode("utf-8", "replace")

    def render(self, request: Request) -> str:
        assert self.gate is None or self.gate.wait(10)
        return "".join(f"<{m['role']}>{m['content']}" for m in request.messages or ())


class FakeRun:
    def __init__(self, provider: FakeProvider, prepared: Prepared, meter: Meter) -> None:
        self.provider = provider
        self.prepared = prepared
        self.meter = meter
        self.left = set(range(prepared.count))
        for index in self.left:
            ids = prepared.prompts[index // prepared.params.n]
            meter.jobs[index] = FakeMeter(prompt_tokens=len(ids), first_scheduled=time.monotonic())

    async def deltas(self) -> AsyncIterator[Delta]:
        provider = self.provider
        params = self.prepared.params
        words = provider.words if not provider.script else ("x",) * len(provider.script)
        if (embed := self.prepared.request.embed) is not None:
            for index, ids in enumerate(self.prepared.prompts):
                vector = array("f", [float(len(ids)), *ids[: embed.dimensions]])
                delta = Delta(index=index, vector=vector.tobytes(), finish="stop")
                self.meter.note(delta)
                self.end(index)
                yield delta
            return
        for step, word in enumerate(words):
            await asyncio.sleep(provider.step_s)
            provider.steps += 1
            if provider.fault is not None and step == provider.fault_at:
                raise provider.fault
            for index in sorted(self.left):
                job = self.meter.jobs[index]
                job.completion_tokens += 1
                job.first_token = job.first_token or time.monotonic()
                job.last_token = time.monotonic()
                most = self.prepared.max_tokens[index // params.n]
                last = step == len(words) - 1
                finish = "length" if job.completion_tokens >= most else "stop" if last else None
                logprobs = None
                if params.logprobs is not None and not provider.tokens:
                    top = [(65 + i, -0.5 * (i + 1)) for i in range(params.logprobs)]
                    logprobs = [TokenLogprob(ord(word[0]), -0.25, 1, top)]
                if provider.script:
                    given = provider.script[step]
                    finish = given.finish or ("stop" if last else None)
                    delta = msgspec.structs.replace(given, index=index, finish=finish)
                else:
                    if not provider.tokens:
                        ids = [ord(word[0])]
                    else:
                        ids = list(provider.tokens[step])
                        logprobs = [TokenLogprob(id, -0.25, 1, [(id, -0.25), (id ^ 1, -0.5)]) for id in ids]
                    delta = Delta(index=index, text=word, token_ids=ids, logprobs=logprobs, finish=finish)
                self.meter.note(delta)
                if finish:
                    self.end(index)
                yield delta

    def end(self, index: int) -> None:
        if index in self.left:
            self.left.discard(index)
            self.meter.jobs[index].finished = time.monotonic()
            self.provider.running -= 1

    async def stop(self) -> None:
        for index in list(self.left):
            self.end(index)


class Ledger:
    """Receipts in a list."""

    def __init__(self) -> None:
        self.receipts: list[Receipt] = []

    def record(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)


FAULT = GalleyError("the kernel fell over", code="engine_fault")
