"""Answers: their shapes, streamed and whole, and the receipt behind each."""

import asyncio
import json

import pytest

from galley.errors import EngineFault, GalleyError
from tests.unit.endpoint.fake import FAULT, FakeProvider


def events(text: str) -> list:
    blocks = [b for b in text.split("\n\n") if b and not b.startswith(":")]
    assert all(b.startswith("data: ") for b in blocks)
    return [b[6:] if b[6:] == "[DONE]" else json.loads(b[6:]) for b in blocks]


async def test_chat_whole(desk):
    response = await desk.chat(user="u1", metadata={"team": "x"})
    body = response.json()
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello wörld", "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"]["prompt_tokens"] == len("<user>hi") and body["usage"]["completion_tokens"] == 3
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert body["system_fingerprint"] == "fp_fake" and body["model"] == "fake-1b"
    assert response.headers["x-galley-served-by"] == "fake:fake-1b@cpu"
    receipt = await desk.receipt(response)
    assert receipt["status"] == "ok" and receipt["user"] == "u1" and receipt["metadata"] == {"team": "x"}
    assert receipt["usage"]["completion_tokens"] == 3 and receipt["params"]["seed"] == 42
    assert receipt["choices"] == [
        {"index": 0, "completion_tokens": 3, "finish": "stop", "reasoning_tokens": 0}
    ]
    assert receipt["prompt"] is None and receipt["output"] is None


async def test_chat_stream_with_usage(desk):
    response = await desk.chat(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache, no-transform"
    found = events(response.text)
    assert found[-1] == "[DONE]"
    *chunks, usage = found[:-1]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3
    assert all(c["usage"] is None for c in chunks)
    assert len({(c["id"], c["created"], c["object"]) for c in found[:-1]}) == 1
    deltas = [c["choices"][0] for c in chunks]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert [d["delta"]["content"] for d in deltas[1:-1]] == ["Hel", "lo ", "wörld"]
    assert deltas[-1]["delta"] == {} and deltas[-1]["finish_reason"] == "stop"
    assert all(d["finish_reason"] is None for d in deltas[:-1])


async def test_stream_without_usage_has_no_usage_key(desk):
    found = events((await desk.chat(stream=True)).text)
    assert all("usage" not in c for c in found[:-1])


async def test_choices_are_told_apart(desk):
    response = await desk.complete(prompt=["ab", "cde"], n=2, echo=True)
    body = response.json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in body["choices"]] == [
        "abHello wörld",
        "abHello wörld",
        "cdeHello wörld",
        "cdeHello wörld",
    ]
    assert body["usage"]["prompt_tokens"] == 5 and body["usage"]["completion_tokens"] == 12
    streamed = events((await desk.complete(prompt=["ab", "cde"], n=2, echo=True, stream=True)).text)[:-1]
    texts = {
        i: "".join(c["choices"][0]["text"] for c in streamed if c["choices"][0]["index"] == i)
        for i in range(4)
    }
    assert list(texts.values()) == [c["text"] for c in body["choices"]]


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [104, 105], [[104, 105]]])
async def test_every_form_of_prompt(desk, prompt):
    body = (await desk.complete(prompt=prompt, max_tokens=2)).json()
    assert body["usage"]["prompt_tokens"] == 2
    assert body["choices"][0]["finish_reason"] == "length" and body["choices"][0]["text"] == "Hello "


async def test_chat_logprobs(desk):
    body = (await desk.chat(logprobs=True, top_logprobs=2)).json()
    first = body["choices"][0]["logprobs"]["content"][0]
    assert first == {
        "token": "H",
        "logprob": -0.25,
        "bytes": [72],
        "top_logprobs": [
            {"token": "A", "logprob": -0.5, "bytes": [65]},
            {"token": "B", "logprob": -1.0, "bytes": [66]},
        ],
    }
    found = events((await desk.chat(logprobs=True, stream=True)).text)
    entries = [c["choices"][0]["logprobs"]["content"] for c in found[1:-2]]
    assert [e[0]["token"] for e in entries] == ["H", "l", "w"] and entries[0][0]["top_logprobs"] == []


async def test_completion_logprobs(desk):
    body = (await desk.complete(logprobs=2)).json()
    found = body["choices"][0]["logprobs"]
    assert found["tokens"] == ["H", "l", "w"] and found["text_offset"] == [0, 1, 2]
    assert found["top_logprobs"][0] == {"A": -0.5, "B": -1.0, "H": -0.25}
    streamed = events((await desk.complete(logprobs=0, stream=True)).text)[:-1]
    assert [c["choices"][0]["logprobs"]["text_offset"] for c in streamed] == [[0], [1], [2]]
    assert streamed[0]["choices"][0]["logprobs"]["top_logprobs"] is None


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs_of_characters_of_several_tokens(open_desk, stream):
    cry = "é😀".encode()
    desk = open_desk(FakeProvider(words=("é", "", "😀", "!"), tokens=(cry[:2], cry[2:4], cry[4:], b"!")))
    response = await desk.complete(logprobs=2, stream=stream)
    pieces = events(response.text)[:-1] if stream else [response.json()]
    found = [c["choices"][0]["logprobs"] for c in pieces]
    every = {key: [x for logprobs in found for x in logprobs[key]] for key in found[0]}
    spelt = [r"bytes:\xc3", r"bytes:\xa9", r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80", "!"]
    assert every["tokens"] == spelt
    assert every["text_offset"] == [0, 0, 1, 1, 1, 1, 2]
    assert every["top_logprobs"][0] == {r"bytes:\xc3": -0.25, r"bytes:\xc2": -0.5}


async def test_what_a_request_leaves_open_is_said(desk):
    await desk.complete(temperature=0.5, top_k=None)
    assert desk.provider.seen[-1].left_open == ["top_p", "top_k", "min_p"]


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63, 2**64 - 1])
async def test_seeds_of_int64_and_uint64_are_taken(desk, seed):
    response = await desk.chat(seed=seed)
    assert response.status_code == 200, response.text
    assert (await desk.receipt(response))["params"]["seed"] == seed


async def test_token_ids_on_request(desk):
    body = (await desk.chat(return_token_ids=True)).json()
    assert body["prompt_token_ids"] == list(b"<user>hi") and body["choices"][0]["token_ids"] == [72, 108, 119]


async def test_fault_before_the_first_byte_is_a_status(open_desk):
    desk = open_desk(FakeProvider(full=True))
    response = await desk.chat(stream=True)
    assert response.status_code == 503 and response.json()["error"]["code"] == "overloaded"
    assert response.headers["x-should-retry"] == "true"
    assert response.headers["retry-after"] == "2" and response.headers["retry-after-ms"] == "2000"
    assert (await desk.receipt(response))["status"] == "error"


async def test_fault_mid_stream_is_an_event_without_done(open_desk):
    desk = open_desk(FakeProvider(fault=FAULT, fault_at=2))
    response = await desk.chat(stream=True)
    found = events(response.text)
    assert response.status_code == 200
    assert found[-1]["error"]["code"] == "engine_fault" and set(found[-1]["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }
    receipt = await desk.receipt(response)
    assert receipt["status"] == "error" and receipt["usage"]["completion_tokens"] == 2


async def test_can3_unexpected_exception_shows_no_detail_and_may_not_be_retried(open_desk, capsys):
    desk = open_desk(FakeProvider(fault=ZeroDivisionError("secret path"), fault_at=0))
    response = await desk.chat()
    assert response.status_code == 500 and "secret" not in response.text
    assert response.headers["x-should-retry"] == "false"
    assert "secret path" in capsys.readouterr().err
    assert "ZeroDivisionError" in (await desk.receipt(response))["error"]["message"]
    desk.provider.fault = EngineFault("again")
    assert (await desk.chat()).headers["x-should-retry"] == "true"


async def test_capture_keeps_text_unless_the_request_says_no(open_desk):
    desk = open_desk(capture=True)
    kept = await desk.receipt(await desk.chat())
    assert kept["prompt"] == [{"role": "user", "content": "hi"}] and kept["output"] == ["Hello wörld"]
    left = await desk.receipt(await desk.chat(store=False))
    assert left["prompt"] is None and left["output"] is None


async def test_keep_alive_is_a_comment(open_desk):
    desk = open_desk(FakeProvider(step_s=0.08), keepalive_s=0.02)
    text = (await desk.chat(stream=True)).text
    assert text.count(": keep-alive\n\n") >= 3 and "id:" not in text
    assert events(text)[-1] == "[DONE]"


async def test_params_reach_the_provider(desk):
    await desk.complete(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=-1, stop="x", max_completion_tokens=9,
        min_tokens=2, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.3,
        logit_bias={"65": 5}, stop_token_ids=[3], ignore_eos=True, include_stop_str_in_output=True,
        skip_special_tokens=False, priority=3, cache_salt="s",
    )  # fmt: skip
    request = desk.provider.seen[-1]
    p = request.params
    assert (p.temperature, p.top_p, p.top_k, p.min_p, p.seed) == (0.5, 0.9, 5, 0.1, -1)
    assert (p.stops, p.max_tokens, p.min_tokens, p.logit_bias) == (["x"], 9, 2, {65: 5.0})
    assert (p.repetition_penalty, p.frequency_penalty, p.presence_penalty) == (1.1, 0.2, 0.3)
    assert (p.stop_token_ids, p.ignore_eos, p.include_stop_str_in_output) == ([3], True, True)
    assert (p.skip_special_tokens, request.priority, request.cache_salt) == (False, 3, "s")
    assert request.ignored_params == []


async def test_can1_disconnect_cancels_streaming_or_not(open_desk):
    """The ASGI conversation itself: the client leaves while the engine works."""
    desk = open_desk(FakeProvider(words=("x",) * 10_000, step_s=0.001))
    for number, stream in enumerate((True, False)):
        body = json.dumps({"model": "fake-1b", "prompt": "hi", "stream": stream, "max_tokens": 90}).encode()
        desk.provider.words = ("x",) * 80
        desk.provider.step_s = 0.01
        leave = asyncio.Event()
        turns = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive(turns=turns, leave=leave):
            for message in turns:
                return message
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            return None

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
            "query_string": b"", "headers": [(b"host", b"localhost")], "root_path": "", "http_version": "1.1",
        }  # fmt: skip
        task = asyncio.ensure_future(desk.app(scope, receive, send))
        before = desk.provider.steps
        while desk.provider.steps < before + 3:
            await asyncio.sleep(0.001)
        assert desk.provider.running == 1
        at = desk.provider.steps
        leave.set()
        await asyncio.wait_for(task, 1)
        assert desk.provider.running == 0 and desk.provider.steps <= at + 1
        await asyncio.to_thread(desk.store.flush)
        receipts = desk.store.list()
        assert len(receipts) == number + 1 and receipts[0].status == "disconnected"
        assert 3 <= receipts[0].usage.completion_tokens <= at - before + 1


async def test_loading_draining_and_failed_servers_say_so(desk):
    desk.router.state = "loading"
    ready = await desk.http.get("/ready")
    assert ready.status_code == 503 and ready.json()["error"]["code"] == "model_loading"
    refused = await desk.chat()
    assert refused.status_code == 503 and refused.headers["x-should-retry"] == "true"
    assert (await desk.http.get("/health")).json()["state"] == "loading"
    desk.router.drain()
    assert (await desk.chat()).json()["error"]["code"] == "shutting_down"
    desk.router.fail("no such file")
    failed = await desk.chat()
    assert failed.status_code == 500 and failed.headers["x-should-retry"] == "false"
    assert (await desk.http.get("/health")).json()["status"] == "degraded"
    desk.router.state = "ready"
    assert (await desk.http.get("/ready")).status_code == 200


async def test_error_object_of_a_foreign_code(desk):
    desk.provider.fault = GalleyError("x", code="cancelled")
    response = await desk.chat()
    assert response.status_code == 500
    assert (await desk.receipt(response))["status"] == "cancelled"
