"""A real HTTP server that plays an upstream, well or badly, by a seeded script.

Behaviours: ``ok``, ``refuse`` (500), ``overload`` (503), ``limit`` (429 with Retry-After), ``auth`` (401),
``bad`` (400), ``stall`` (never answers), ``slow`` (late first token), ``cut`` (dies in mid-stream), ``eof``
(a clean end without a finish reason), ``garbage`` (200 that is not JSON), ``error200`` (an error in a 200),
``empty`` (200 without choices), ``drop`` (closes without a word). ``kill`` closes the port.

Where tools are offered it calls the first of them, unless ``tool_choice`` is none; where log-probabilities
are asked for they come with every word, unless ``logprobs`` is None.
"""

import asyncio
import json
import random
from collections import Counter

WORDS = ["The ", "answer ", "is ", "forty", "-two", "."]


class MockUpstream:
    """``async with MockUpstream() as up``; then ``up.url``."""

    def __init__(self, name="mock", script=None, weights=None, seed=0, delay_s=0.0, slow_s=0.3, gap_s=0.0):
        self.name = name
        self.script = list(script or ())
        self.weights = weights or {"ok": 1.0}
        self.rng = random.Random(seed)
        self.delay_s, self.slow_s, self.gap_s = delay_s, slow_s, gap_s
        self.calls = Counter()
        self.bodies = []
        self.headers = []
        self.answers = Counter()
        """Whole answers sent, by idempotency key."""
        self.open = set()
        self.cancelled = 0
        self.keep_bodies = True
        self.port = 0
        self.server = None
        self.logprobs = -0.1
        self.words = WORDS

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    async def __aenter__(self):
        await self.start()
        return self

    async def __aexit__(self, *_):
        await self.kill()

    async def start(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def kill(self):
        if self.server is not None:
            self.server.close()
            self.server = None
            for writer in list(self.open):
                writer.transport.abort()
            await asyncio.sleep(0)

    async def _serve(self, reader, writer):
        self.open.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if ": " in line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if head[0].startswith("GET"):
                    writer.write(plain(200, {"data": []}))
                    continue
                asked = json.loads(body)
                if self.keep_bodies:
                    self.bodies.append((head[0].split()[1], asked))
                    self.headers.append(headers)
                behaviour = (
                    self.script.pop(0)
                    if self.script
                    else self.rng.choices(list(self.weights), list(self.weights.values()))[0]
                )
                self.calls[behaviour] += 1
                if not await self._behave(behaviour, asked, headers, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            self.cancelled += 1
        finally:
            self.open.discard(writer)
            writer.transport.abort()

    async def _behave(self, behaviour, asked, headers, writer):
        """False when the connection ends."""
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if behaviour in ("refuse", "overload", "limit", "auth", "bad"):
            status = {"refuse": 500, "overload": 503, "limit": 429, "auth": 401, "bad": 400}[behaviour]
            more = ["retry-after: 1"] if behaviour == "limit" else []
            error = {"error": {"message": f"{behaviour} by {self.name}", "code": behaviour}}
            writer.write(plain(status, error, more))
            return True
        if behaviour == "drop":
            return False
        if behaviour == "stall":
            await asyncio.sleep(3600)
        if behaviour == "slow":
            await asyncio.sleep(self.slow_s)
        if behaviour == "garbage":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n<html")
            return True
        if behaviour == "error200":
            writer.write(plain(200, {"error": {"message": "not really", "code": 500}}))
            return True
        if behaviour == "empty":
            writer.write(plain(200, {"choices": [], "usage": None}))
            return True
        words = self.words
        usage = {"prompt_tokens": 11, "completion_tokens": len(words), "total_tokens": 11 + len(words)}
        if "/messages" in self.bodies[-1][0] if self.bodies else False:
            return await self._anthropic(behaviour, asked, writer)
        key = headers.get("idempotency-key", "")
        if not asked.get("stream"):
            if behaviour == "cut":
                whole = plain(200, self._chat(asked, usage))
                writer.write(whole[: len(whole) - 20])
                await writer.drain()
                return False
            writer.write(plain(200, self._chat(asked, usage)))
            self.answers[key] += 1
            return True
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        writer.write(chunk({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
        if calls(asked):
            for piece in [
                {
                    "index": 0,
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": named(asked), "arguments": ""},
                },
                {"index": 0, "function": {"arguments": '{"a":'}},
                {"index": 0, "function": {"arguments": " 1}"}},
            ]:
                writer.write(chunk({"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]}))
            writer.write(chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}))
            writer.write(frame(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            return True
        for number, word in enumerate(words):
            if behaviour in ("cut", "eof") and number == 3:
                if behaviour == "eof":
                    writer.write(b"0\r\n\r\n")
                await writer.drain()
                return False
            said = {"index": 0, "delta": {"content": word}, **self._logprobs(asked, [word])}
            writer.write(chunk({"model": asked["model"], "choices": [said]}))
            await writer.drain()
            if self.gap_s:
                await asyncio.sleep(self.gap_s)
        writer.write(chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}))
        writer.write(chunk({"choices": [], "usage": usage}))
        writer.write(frame(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        self.answers[key] += 1
        return True

    def _anthropic_call(self, asked, writer):
        """A thought, and two calls of the first tool, the second without arguments."""
        usage = {"input_tokens": 7, "output_tokens": 9}
        name = named(asked)
        blocks = [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "tool_use", "id": "toolu_1", "name": name, "input": {"a": 1}},
            {"type": "tool_use", "id": "toolu_2", "name": name, "input": {}},
        ]
        if not asked.get("stream"):
            message = {
                "type": "message",
                "model": asked["model"],
                "content": blocks,
                "stop_reason": "tool_use",
            }
            writer.write(plain(200, {**message, "usage": usage}))
            return True
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        writer.write(sse({"type": "message_start", "message": {"model": asked["model"], "usage": usage}}))
        pieces = {
            0: [{"type": "thinking_delta", "thinking": "hm"}, {"type": "signature_delta", "signature": "s"}],
            1: [{"type": "input_json_delta", "partial_json": p} for p in ("", '{"a":', " 1}")],
            2: [{"type": "input_json_delta", "partial_json": ""}],
        }
        for number, block in enumerate(blocks):
            begun = {**block, "input": {}} if block["type"] == "tool_use" else {**block, "thinking": ""}
            writer.write(sse({"type": "content_block_start", "index": number, "content_block": begun}))
            for piece in pieces[number]:
                writer.write(sse({"type": "content_block_delta", "index": number, "delta": piece}))
            writer.write(sse({"type": "content_block_stop", "index": number}))
        ended = {"delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}}
        writer.write(sse({"type": "message_delta", **ended}) + sse({"type": "message_stop"}) + b"0\r\n\r\n")
        return True

    def _logprobs(self, asked, words):
        """The field of a choice; none where none were asked for."""
        if not asked.get("logprobs") or self.logprobs is None:
            return {}

        def one(word, value):
            return {"token": word, "logprob": value, "bytes": list(word.encode())}

        return {
            "logprobs": {
                "content": [
                    {
                        **one(word, self.logprobs),
                        "top_logprobs": [
                            one(word if i == 0 else f"~{i}", self.logprobs - i)
                            for i in range(asked.get("top_logprobs", 0))
                        ],
                    }
                    for word in words
                ]
            }
        }

    def _chat(self, asked, usage):
        whole = chat(asked, usage, self.words)
        if "messages" in asked:
            whole["choices"][0] |= self._logprobs(asked, self.words)
        return whole

    async def _anthropic(self, behaviour, asked, writer):
        if asked.get("tools") and asked.get("tool_choice", {}).get("type") != "none":
            return self._anthropic_call(asked, writer)
        usage = {"input_tokens": 7, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 1}
        if not asked.get("stream"):
            writer.write(
                plain(
                    200,
                    {
                        "type": "message",
                        "model": asked["model"],
                        "content": [{"type": "text", "text": "".join(WORDS)}],
                        "stop_reason": "end_turn",
                        "usage": {**usage, "output_tokens": 6},
                    },
                )
            )
            return True
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        events = [{"type": "message_start", "message": {"model": asked["model"], "usage": usage}}]
        events += [{"type": "ping"}, {"type": "content_block_start", "content_block": {"type": "text"}}]
        events += [
            {"type": "content_block_delta", "delta": {"type": "text_delta", "text": word}} for word in WORDS
        ]
        events += [
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 6}},
            {"type": "message_stop"},
        ]
        for event in events:
            data = f"event: {event['type']}\r\ndata: {json.dumps(event)}\r\n\r\n".encode()
            writer.write(frame(data))
        writer.write(b"0\r\n\r\n")
        return True


def sse(event):
    return frame(f"event: {event['type']}\r\ndata: {json.dumps(event)}\r\n\r\n".encode())


def calls(asked):
    return bool(asked.get("tools")) and asked.get("tool_choice") != "none"


def named(asked):
    tool = asked["tools"][0]
    return tool.get("function", tool)["name"]


def chat(asked, usage, words=WORDS):
    if calls(asked):
        call = {
            "id": "call_1",
            "type": "function",
            "function": {"name": named(asked), "arguments": '{"a": 1}'},
        }
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
        return {"id": "x", "model": asked["model"], "choices": [choice], "usage": usage}
    return {
        "id": "x",
        "object": "chat.completion",
        "model": asked["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "".join(words)},
                "finish_reason": "stop",
            }
        ],
        "usage": usage,
    }


def plain(status, body, more=()):
    raw = json.dumps(body).encode()
    head = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(raw)}", *more]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + raw


def frame(data):
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def chunk(body):
    return frame(b"data: " + json.dumps(body).encode() + b"\n\n")
