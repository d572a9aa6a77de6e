"""Clients that go away: blocks come back, every request has its receipt, the server still answers."""

import asyncio
import json
import random
import socket
import threading
import time

import httpx
import pytest

from galley.types import Receipt

CLIENTS = 200


def head(body: bytes, path: str = "/v1/completions") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode()


async def one_client(port: int, body: bytes, leave_after: int | None) -> bytes:
    """Ask, read; leave after so many bytes of the answer. Returns what was read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head(body) + body)
    await writer.drain()
    got = b""
    while leave_after is None or len(got) < leave_after:
        piece = await reader.read(1 << 16 if leave_after is None else min(256, leave_after - len(got)))
        if not piece:
            break
        got += piece
    if leave_after is not None:
        # RST rather than FIN for half of them: both are ways to vanish.
        if leave_after % 2:
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort() if leave_after % 2 else writer.close()
    else:
        writer.close()
    return got


def wait_for_receipts(server, count: int, within_s: float = 30) -> list[Receipt]:
    """Exactly so many receipts, once there are as many."""
    deadline = time.monotonic() + within_s
    while len(server.server.receipts.list(10_000)) < count:
        assert time.monotonic() < deadline, f"{len(server.server.receipts.list(10_000))} of {count} receipts"
        time.sleep(0.01)
    found = server.server.receipts.list(10_000)
    assert len(found) == count == len({receipt.id for receipt in found})
    return found


def test_can1_200_clients_half_vanish_mid_stream(tiny_serve):
    server = tiny_serve(max_jobs=32, max_wait_s=0)
    before = server.engine.stats()
    start = before.blocks_free + before.blocks_cached
    dice = random.Random(20)
    bodies = [
        json.dumps(
            {
                "model": server.model,
                "prompt": f"client {number}: " + "word " * dice.randrange(20),
                "max_tokens": 60,
                "ignore_eos": True,
                "stream": number % 4 != 3,
                "seed": number,
                "n": 1 + number % 2,
            }
        ).encode()
        for number in range(CLIENTS)
    ]
    leaves = [dice.randrange(1, 6000) if number % 2 else None for number in range(CLIENTS)]

    async def all_clients() -> list[bytes]:
        pairs = zip(bodies, leaves, strict=True)
        return await asyncio.gather(*(one_client(server.port, body, leave) for body, leave in pairs))

    answers = asyncio.run(all_clients())
    receipts = wait_for_receipts(server, CLIENTS, 60)
    server.idle(60)
    after = server.engine.stats()
    assert after.blocks_free + after.blocks_cached == start and after.blocks_used == 0
    assert server.engine.scheduler.check() == []
    for answer, leave in zip(answers, leaves, strict=True):
        if leave is None:
            assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
            assert b"[DONE]" in answer or b'"finish_reason":"length"' in answer
    counts = {status: sum(r.status == status for r in receipts) for status in ("ok", "disconnected", "error")}
    # A client that left after a whole answer was written cannot be told from one that stayed.
    assert counts["ok"] >= CLIENTS / 2 and counts["disconnected"] >= 20 and counts["error"] == 0, counts
    assert sum(counts.values()) == CLIENTS
    assert all(
        r.usage.completion_tokens == 60 * (1 + (r.params["n"] == 2)) for r in receipts if r.status == "ok"
    )
    body = {"model": server.model, "prompt": "still there?", "max_tokens": 4, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("moment", ["at once", "mid-decode"])
def test_can1_engine_stops_within_a_step(tiny_serve, stream, moment):
    """The step that runs when the server sees the client leave is the last: it is held until then."""
    server = tiny_serve()
    started, seen = 0, []
    held, gate = threading.Event(), threading.Event()
    backend, cancel = server.engine.backend, server.engine.cancel
    run, hold_at = backend.run, 5 if moment == "mid-decode" else 1

    def holding(rows) -> None:
        nonlocal started
        started += 1
        if started >= hold_at:
            held.set()
            assert gate.wait(30)
        run(rows)

    def noting(job_id: str) -> None:
        seen.append(started)
        cancel(job_id)
        gate.set()

    backend.run, server.engine.cancel = holding, noting
    body = json.dumps(
        {"model": server.model, "prompt": "x", "max_tokens": 480, "ignore_eos": True, "stream": stream}
    ).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head(body) + body)
        if moment == "mid-decode":
            assert held.wait(30)
    [receipt] = wait_for_receipts(server, 1)
    server.idle(30)
    assert server.engine.stats().blocks_used == 0
    assert receipt.status == "disconnected" and receipt.usage.completion_tokens < 480
    if moment == "mid-decode":
        assert seen[0] == started == 5
    else:
        # It may leave before anything is submitted, or while the first step is being put together.
        assert started <= (seen[0] + 1 if seen else 0) <= 2


def test_client_that_never_finishes_asking_leaves_only_its_receipt(tiny_serve):
    server = tiny_serve()
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head(b"x" * 1000) + b"x" * 10)
    receipts = wait_for_receipts(server, 10)
    assert {(r.status, r.model) for r in receipts} == {("disconnected", "")}
    assert httpx.get(f"{server.url}/ready").status_code == 200
    assert server.server.router.active == 0 and server.engine.stats().steps == 0


def test_can4_slow_reader_does_not_stall_the_others(tiny_serve):
    server = tiny_serve()
    body = json.dumps(
        {"model": server.model, "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 8}
    ).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(head(body) + body)
        quick = {"model": server.model, "prompt": "y", "max_tokens": 20, "ignore_eos": True}
        assert httpx.post(f"{server.url}/v1/completions", json=quick, timeout=30).status_code == 200
        deadline = time.monotonic() + 60
        while server.engine.stats().running or server.engine.stats().waiting:
            assert time.monotonic() < deadline, "the engine waits for a client that does not read"
            time.sleep(0.01)
    server.idle()
    assert server.engine.stats().blocks_used == 0
