"""Processor time of the HTTP side per streamed chunk: everything between the engine's step and the socket.

``python -m benchmarks.front`` runs the application in this process over a provider that has its deltas
ready, with a client that throws the bytes away, and prints one JSON object. No engine, no kernel, no network:
what is left is reading deltas, writing events, and the ASGI calls. Target: 60 µs a chunk.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.unit.endpoint.fake import FakeProvider, FakeRun

from galley.audit.receipts import ReceiptStore
from galley.endpoint.app import build_app
from galley.endpoint.state import State
from galley.providers.base import Meter, Prepared
from galley.router.router import Router
from galley.types import Delta, TokenLogprob

HI = [{"role": "user", "content": "hi"}]
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": HI}),
    "chat+logprobs": ("/v1/chat/completions", {"messages": HI, "logprobs": True, "top_logprobs": 5}),
    "completions": ("/v1/completions", {"prompt": "hi"}),
    "responses": ("/v1/responses", {"input": "hi", "store": False}),
    "messages": ("/v1/messages", {"messages": HI, "max_tokens": 1_000_000}),
}


class ReadyRun(FakeRun):
    """Deltas without delay; one turn of the loop a step, as an engine's wake-up costs."""

    async def deltas(self) -> AsyncIterator[Delta]:
        words = len(self.provider.words)
        wanted = self.prepared.params.logprobs
        top = [(65 + i, -0.5) for i in range(wanted or 0)]
        logprobs = None if wanted is None else [TokenLogprob(65, -0.25, 1, top)]
        for step in range(words):
            await asyncio.sleep(0)
            for index in sorted(self.left):
                last = step == words - 1
                delta = Delta(
                    index=index,
                    text=" token",
                    token_ids=[65],
                    logprobs=logprobs,
                    finish="stop" if last else None,
                )
                self.meter.note(delta)
                yield delta
        for index in list(self.left):
            self.end(index)


class ReadyProvider(FakeProvider):
    """A provider whose answers are there already."""

    async def start(self, prepared: Prepared, meter: Meter) -> FakeRun:
        self.running += prepared.count
        return ReadyRun(self, prepared, meter)


async def ask(app: Any, path: str, body: dict[str, Any]) -> int:
    """One request straight into the application; how many pieces of body it sent."""
    raw, pieces, sent = json.dumps(body).encode(), 0, False
    never = asyncio.Event()

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": raw, "more_body": False}
        await never.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal pieces
        pieces += message["type"] == "http.response.body"

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"", "headers": [(b"host", b"127.0.0.1")], "scheme": "http", "root_path": "",
        "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await app(scope, receive, send)
    return pieces


async def measure(chunks: int, repeats: int) -> dict[str, Any]:
    """Microseconds of processor time a chunk, by door: the median and the best of ``repeats``."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store, state = ReceiptStore(Path(folder) / "receipts.db"), State(Path(folder))
        provider = ReadyProvider(words=("x",) * chunks, context=10_000_000)
        app = build_app(Router([provider], store), store, state=state)
        for name, (path, fields) in BODIES.items():
            body = {"model": "fake-1b", "stream": True} | fields
            await ask(app, path, body)
            times = []
            for _ in range(repeats):
                began = time.process_time()
                pieces = await ask(app, path, body)
                times.append((time.process_time() - began) / pieces * 1e6)
            found[name] = {"median_us": statistics.median(times), "best_us": min(times), "pieces": pieces}
        store.close()
        state.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    print(json.dumps(asyncio.run(measure(given.chunks, given.repeats)), indent=1))


if __name__ == "__main__":
    main()
