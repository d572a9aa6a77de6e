"""A closed loop of streaming completions against a server, from the standard library alone."""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from benchmarks.server import Server, ServerError

__all__ = ["Answered", "Load", "drive"]


class Answered(msgspec.Struct):
    """One request: when it was sent and when each chunk of text came."""

    sent: float
    chunks: list[float]
    tokens: int
    """As the server's ``usage`` counts them."""


class Load(msgspec.Struct, frozen=True):
    """What a client saw over all requests."""

    seconds: float
    """From the first request sent to the last answer's end."""
    tokens: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    """Time between chunks of one answer; a chunk is mostly, not always, one token."""
    itl_p99_ms: float

    @classmethod
    def of(cls, answers: Sequence[Answered], seconds: float) -> "Load":
        """Raises ValueError when there is no chunk to time."""
        first = [(a.chunks[0] - a.sent) * 1e3 for a in answers]
        gaps = np.concatenate([np.diff(a.chunks) for a in answers]) * 1e3
        if not len(gaps):
            raise ValueError("no answer had two chunks")
        return cls(
            seconds=seconds,
            tokens=sum(a.tokens for a in answers),
            ttft_p50_ms=float(np.quantile(first, 0.5)),
            ttft_p99_ms=float(np.quantile(first, 0.99)),
            itl_p50_ms=float(np.quantile(gaps, 0.5)),
            itl_p99_ms=float(np.quantile(gaps, 0.99)),
        )


def drive(server: Server, prompts: Sequence[Sequence[int]], *, concurrency: int, tokens: int) -> Load:
    """Send all prompts (token ids), ``concurrency`` at a time, ``tokens`` greedy tokens each.

    Raises ServerError when an answer is an error or has another number of tokens than was asked for.
    """
    return asyncio.run(_drive(server, prompts, concurrency, tokens))


async def _drive(server: Server, prompts: Sequence[Sequence[int]], concurrency: int, tokens: int) -> Load:
    todo = list(reversed(prompts))
    answers: list[Answered] = []

    async def client() -> None:
        while todo:
            answers.append(await _one(server, todo.pop(), tokens))

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return Load.of(answers, time.perf_counter() - start)


async def _one(server: Server, prompt: Sequence[int], tokens: int) -> Answered:
    body = {
        "model": server.model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        # A token that ends inside a character has no text yet; servers that know this field tell of it all
        # the same. The others ignore it, and hold it back to the next chunk.
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }
    answer = Answered(sent=time.perf_counter(), chunks=[], tokens=0)
    async for event in _events(server, json.dumps(body).encode()):
        now = time.perf_counter()
        if "error" in event:
            raise ServerError(f"{server.name}: {event['error']}")
        choices = event.get("choices") or []
        if choices and (choices[0].get("text") or choices[0].get("token_ids")):
            answer.chunks.append(now)
        if event.get("usage"):
            answer.tokens = int(event["usage"]["completion_tokens"])
    if answer.tokens != tokens or not answer.chunks:
        raise ServerError(f"{server.name}: {answer.tokens} tokens came, {tokens} were asked for")
    return answer


async def _events(server: Server, body: bytes) -> Any:
    """Events of one answer as they come. Chunk sizes of the transfer coding are lines without ``data:``."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 20)
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        status = await reader.readline()
        if status.split()[1:2] != [b"200"]:
            rest = await reader.read(2000)
            raise ServerError(f"{server.name}: {status!r} {rest[-300:]!r}")
        while line := await reader.readline():
            if line.startswith(b"data:"):
                text = line[5:].strip()
                if text == b"[DONE]":
                    return
                yield json.loads(text)
        raise ServerError(f"{server.name}: the stream ended early")
    finally:
        writer.close()
