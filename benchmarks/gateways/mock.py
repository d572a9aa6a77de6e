"""An OpenAI-compatible upstream that does no work: a delay on a kernel timer, then a fixed answer.

``python -m benchmarks.gateways.mock --port 9000``. Chat alone, plain and streamed (16 events), with usage;
any other path is an empty model list. Event loops round timers to a millisecond, which is more than some
gateways add, so delays come from timerfd. Linux.
"""

import argparse
import asyncio
import ctypes
import json
import os
import socket
import time
from collections.abc import Callable
from typing import cast

import httptools
import uvloop

CHUNKS = 16
LIBC = ctypes.CDLL(None, use_errno=True)


class TimerSpec(ctypes.Structure):
    """``struct itimerspec``: interval, then first expiry; seconds and nanoseconds."""

    _fields_ = (
        ("every_s", ctypes.c_long),
        ("every_ns", ctypes.c_long),
        ("first_s", ctypes.c_long),
        ("first_ns", ctypes.c_long),
    )


class Timer:
    """A kernel timer that calls back in the running event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._fd = LIBC.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._then: Callable[[], None] | None = None
        loop.add_reader(self._fd, self._fire)

    def start(self, seconds: float, then: Callable[[], None], *, every: bool = False) -> None:
        """Call ``then`` once after ``seconds``, or ``every`` so often. 0 stops it."""
        self._then = then
        whole, rest = divmod(int(seconds * 1e9), 10**9)
        spec = TimerSpec(whole if every else 0, rest if every else 0, whole, rest)
        LIBC.timerfd_settime(self._fd, 0, ctypes.byref(spec), None)

    def _fire(self) -> None:
        try:
            expired = int.from_bytes(os.read(self._fd, 8), "little")
        except BlockingIOError:
            return
        for _ in range(expired):
            if self._then is not None:
                self._then()


def event(choices: str, more: str = "") -> bytes:
    """One chunk of a stream, framed for chunked transfer."""
    data = (
        'data: {"id":"chatcmpl-mock","object":"chat.completion.chunk","created":1,"model":"mock",'
        f'"choices":[{choices}]{more}}}\n\n'
    ).encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


USAGE = {"prompt_tokens": 12, "completion_tokens": CHUNKS, "total_tokens": 12 + CHUNKS}
WHOLE = json.dumps(
    {
        "id": "chatcmpl-mock",
        "object": "chat.completion",
        "created": 1,
        "model": "mock",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "word " * CHUNKS},
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
).encode()
EVENTS = [event('{"index":0,"delta":{"role":"assistant","content":"word "},"finish_reason":null}')]
EVENTS += [event('{"index":0,"delta":{"content":"word "},"finish_reason":null}')] * (CHUNKS - 1)
LAST = event('{"index":0,"delta":{},"finish_reason":"stop"}') + event("", f',"usage":{json.dumps(USAGE)}')
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
MODELS = b'{"object":"list","data":[{"id":"mock","object":"model","created":0,"owned_by":"mock"}]}'


class Upstream(asyncio.Protocol):
    """One kept-alive connection."""

    def __init__(self, delay_s: float, gap_s: float) -> None:
        self._delay_s, self._gap_s = delay_s, gap_s
        self._timer: Timer | None = None
        self._left: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._path = b""

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path, self._body = url, b""

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        if not self._path.endswith(b"/chat/completions"):
            self._whole(MODELS)
            return
        stream = json.loads(self._body).get("stream")
        if self._timer is None:
            self._timer = Timer(asyncio.get_running_loop())
        if stream:
            self._left = [*EVENTS[1:], LAST + DONE]
            self._timer.start(self._delay_s, self._begin)
        else:
            self._timer.start(self._delay_s, lambda: self._whole(WHOLE))

    def _whole(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)

    def _begin(self) -> None:
        assert self._timer is not None
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        self._transport.write(head + EVENTS[0])
        self._timer.start(self._gap_s, self._next, every=True)

    def _next(self) -> None:
        assert self._timer is not None
        if not self._left:
            return
        self._transport.write(self._left.pop(0))
        if not self._left:
            self._timer.start(0, self._next)


async def main() -> None:
    """Serve until killed."""
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--port", type=int, default=9000)
    ask.add_argument("--delay-ms", type=float, default=5)
    ask.add_argument("--gap-ms", type=float, default=5)
    wanted = ask.parse_args()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Upstream(wanted.delay_ms / 1e3, wanted.gap_ms / 1e3), "127.0.0.1", wanted.port, backlog=4096
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
