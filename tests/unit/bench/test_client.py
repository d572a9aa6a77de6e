"""The streaming client against servers that behave, and servers that do not."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from galley.bench.arrivals import Arrival
from galley.bench.client import Ask, Client, Outcome, Target
from galley.bench.load import closed_loop, open_loop
from galley.errors import ConfigError, GalleyError

Reply = Callable[[asyncio.StreamReader, asyncio.StreamWriter, bytes], Awaitable[None]]


@asynccontextmanager
async def server(reply: Reply) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Address of a server that reads whole requests and answers each by ``reply``; and what it was sent."""
    asked: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
                body = await reader.readexactly(length)
                asked.append(head + body)
                await reply(reader, writer, body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1", asked
    finally:
        listener.close()
        await listener.wait_closed()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(piece: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": piece, "finish_reason": finish}])


USAGE = event(
    choices=[],
    usage={"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}},
)
WHOLE = [text("a"), b": ping\n\n", text(""), text("b"), text("", "stop"), USAGE, b"data: [DONE]\n\n"]


def saying(*pieces: bytes, end: bytes = b"0\r\n\r\n", pause: float = 0.0) -> Reply:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        writer.write(HEAD)
        for piece in pieces:
            writer.write(chunk(piece))
            await writer.drain()
            await asyncio.sleep(pause)
        writer.write(end)

    return reply


async def ask(url: str, **target: object) -> Outcome:
    async with Client(Target(url=url, model="m", **target), timeout_s=20) as client:  # type: ignore[arg-type]
        return await client.ask(Ask(prompt="hi", max_tokens=5, seed=3))


async def test_pieces_are_timed_and_tokens_counted_by_the_server() -> None:
    async with server(saying(*WHOLE, pause=0.01)) as (url, asked):
        got = await ask(url, key="k", extra={"ignore_eos": True})
    assert got.error is None and len(got.times) == 2 and (got.tokens, got.counted) == (5, True)
    assert (got.prompt_tokens, got.cached_tokens) == (7, 2)
    assert got.sent < got.times[0] < got.times[1] < got.done and got.gaps[0] >= 0.009
    head, _, body = asked[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/completions HTTP/1.1") and b"Authorization: Bearer k" in head
    assert json.loads(body) == {
        "model": "m", "prompt": "hi", "max_tokens": 5, "temperature": 0, "seed": 3, "stream": True,
        "stream_options": {"include_usage": True}, "ignore_eos": True,
    }  # fmt: skip


async def test_events_cut_anywhere_are_put_together() -> None:
    stream = b"".join(WHOLE).replace(b"\n", b"\r\n")
    for size in (1, 3, 1000):
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        async with server(saying(*pieces)) as (url, _):
            got = await ask(url)
        assert (got.error, len(got.times), got.tokens) == (None, 2, 5)


async def test_chat_deltas_and_no_usage() -> None:
    pieces = [
        event(choices=[{"delta": {"role": "assistant", "content": ""}}]),
        event(choices=[{"delta": {"reasoning_content": "hm"}}]),
        event(choices=[{"delta": {"content": "x"}}]),
        event(choices=[{"delta": {}, "finish_reason": "length"}], usage=None),
    ]
    async with server(saying(*pieces)) as (url, asked):
        got = await ask(url, chat=True)
    assert (got.error, got.tokens, got.counted, len(got.times)) == (None, 2, False, 2)
    assert asked[0].startswith(b"POST /v1/chat/completions ")
    assert json.loads(asked[0].partition(b"\r\n\r\n")[2])["messages"] == [{"role": "user", "content": "hi"}]


async def test_connections_are_reused_and_a_stale_one_replaced() -> None:
    peers = set()

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        peers.add(writer.get_extra_info("peername"))
        await saying(*WHOLE)(reader, writer, body)
        if json.loads(body)["prompt"] == "bye":
            await writer.drain()
            writer.close()

    async with server(reply) as (url, _), Client(Target(url=url, model="m")) as client:
        for prompt in ("one", "two", "bye", "four"):
            got = await client.ask(Ask(prompt=prompt, max_tokens=1))
            assert got.error is None
    assert len(peers) == 2


async def raw(writer: asyncio.StreamWriter, data: bytes, *, close: bool = False) -> None:
    writer.write(data)
    await writer.drain()
    if close:
        writer.close()


def answering(data: bytes, *, close: bool = False) -> Reply:
    return lambda reader, writer, body: raw(writer, data, close=close)


REFUSED = json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": "overloaded"}}).encode()
REFUSAL = b"HTTP/1.1 503 Busy\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(REFUSED)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (answering(REFUSAL + REFUSED), "http 503 overloaded"),
        (answering(b"HTTP/1.1 404 No\r\nContent-Length: 4\r\n\r\nnope"), "http 404"),
        (answering(b"BEEP 1.0\r\n\r\n", close=True), "connection: ConnectionError"),
        (answering(HEAD + chunk(text("a")), close=True), "connection: ConnectionError"),
        (saying(text("a"), b"data: [DONE]\n\n"), "incomplete"),
        (saying(text("a"), event(error={"code": "engine_fault", "message": "x"})), "stream: engine_fault"),
        (saying(b"data: {nope\n\n"), "stream: not an event"),
    ],
)
async def test_every_failure_has_a_name(reply: Reply, error: str) -> None:
    async with server(reply) as (url, _):
        got = await ask(url)
    assert got.error is not None and got.error.startswith(error) and got.done >= got.sent


async def test_nobody_there_and_nobody_answering() -> None:
    got = await ask("http://127.0.0.1:9/v1")
    assert got.error is not None and got.error.startswith("connection: ")

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        await reader.read()

    async with server(never) as (url, _), Client(Target(url=url, model="m"), timeout_s=0.2) as client:
        got = await client.ask(Ask(prompt="x", max_tokens=1))
    assert got.error == "timeout" and got.e2e >= 0.2


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://x/v1", "http://", "http://x:notaport/"])
def test_addresses_are_checked(url: str) -> None:
    with pytest.raises(ConfigError):
        Client(Target(url=url, model="m"))


async def test_models_are_listed_or_the_reason_told() -> None:
    body = b'{"data": [{"id": "a"}, {"id": "b"}]}'
    good = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with server(answering(good + body)) as (url, asked), Client(Target(url=url, model="")) as client:
        assert await client.models() == ["a", "b"]
        assert asked[0].startswith(b"GET /v1/models ")
    for reply in (answering(REFUSAL + REFUSED), answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")):
        async with server(reply) as (url, _), Client(Target(url=url, model="")) as client:
            with pytest.raises(GalleyError):
                await client.models()


async def test_open_loop_sends_on_time_whatever_the_answers_do() -> None:
    """Three requests 50 ms apart to a server that takes 300 ms: all are under way at once."""
    async with (
        server(saying(*WHOLE, pause=0.04)) as (url, _),
        Client(Target(url=url, model="m")) as client,
    ):
        arrivals = [Arrival(0.05 * k) for k in range(1, 4)]
        loaded = await open_loop(client, arrivals, lambda k, arrival: Ask(prompt=str(k), max_tokens=1))
    assert [round(o.scheduled, 6) for o in loaded.outcomes] == [0.05, 0.1, 0.15]
    assert all(o.error is None and o.sent >= o.scheduled for o in loaded.outcomes)
    assert loaded.outcomes[2].sent < loaded.outcomes[0].done
    assert loaded.wall_s >= max(o.done for o in loaded.outcomes)


async def test_open_loop_counts_a_late_client_as_latency() -> None:
    """The event loop stands still over an arrival: its latency begins when it should have been sent."""
    async with server(saying(*WHOLE)) as (url, _), Client(Target(url=url, model="m")) as client:
        asyncio.get_running_loop().call_later(0.05, time.sleep, 0.3)
        loaded = await open_loop(client, [Arrival(0.1)], lambda k, arrival: Ask(prompt="x", max_tokens=1))
    (late,) = loaded.outcomes
    assert late.sent - late.scheduled >= 0.2 and late.ttft is not None and late.ttft >= 0.2


async def test_closed_loop_keeps_so_many_under_way_and_no_more() -> None:
    under_way, most = 0, 0

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)
        under_way -= 1
        await saying(*WHOLE)(reader, writer, body)

    async with server(reply) as (url, asked), Client(Target(url=url, model="m")) as client:
        loaded = await closed_loop(client, 3, 10, lambda k: Ask(prompt=str(k), max_tokens=1))
    assert most == 3 and len(asked) == len(loaded.outcomes) == 10
    assert [json.loads(a.partition(b"\r\n\r\n")[2])["prompt"] for a in asked][:3] == ["0", "1", "2"]


async def test_a_cancelled_load_leaves_no_request_behind() -> None:
    gone = asyncio.Event()

    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        await reader.read()
        gone.set()

    async with server(reply) as (url, _), Client(Target(url=url, model="m")) as client:
        task = asyncio.create_task(closed_loop(client, 1, 5, lambda k: Ask(prompt="x", max_tokens=1)))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(gone.wait(), 10)
