"""Anthropic's messages over a scripted provider."""

import json

import pytest

from galley.types import Delta
from tests.unit.endpoint.fake import FAULT, FakeProvider
from tests.unit.endpoint.test_responses import CALLS, events

HI = [{"role": "user", "content": "hi"}]


async def ask(desk, **fields):
    body = {"model": "fake-1b", "max_tokens": 20, "messages": HI} | fields
    return await desk.http.post("/v1/messages", json=body)


async def test_whole_message(desk):
    response = await ask(
        desk,
        system=[{"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
        metadata={"user_id": "u1"},
        top_k=5,
    )
    body = response.json()
    assert body["type"] == "message" and body["role"] == "assistant" and body["stop_reason"] == "end_turn"
    assert body["content"] == [{"type": "text", "text": "Hello wörld", "citations": None}]
    assert body["usage"]["output_tokens"] == 3 and body["usage"]["input_tokens"] == 23
    request = desk.provider.seen[-1]
    assert request.messages[0] == {"role": "system", "content": "be kind"}
    assert request.user == "u1" and request.params.top_k == 5 and request.params.max_tokens == 20
    assert "x-galley-ignored-params" not in response.headers and response.headers["request-id"]


async def test_events(desk):
    got = events((await ask(desk, stream=True)).text)
    assert [e["type"] for e in got] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert got[0]["message"]["usage"]["input_tokens"] == 8 and got[0]["message"]["stop_reason"] is None
    assert "".join(e["delta"]["text"] for e in got[2:5]) == "Hello wörld"
    assert got[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert got[-2]["usage"]["output_tokens"] == 3


async def test_thinking_text_and_tools(open_desk):
    desk = open_desk(FakeProvider(script=CALLS))
    body = (await ask(desk)).json()
    assert [b["type"] for b in body["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    called = {"type": "tool_use", "id": "call_a", "name": "f", "input": {"x": 1}}
    assert body["content"][2] == {**called, "caller": {"type": "direct"}}
    assert body["stop_reason"] == "tool_use"
    got = events((await ask(desk, stream=True)).text)
    starts = [e["content_block"] for e in got if e["type"] == "content_block_start"]
    assert [s["type"] for s in starts] == ["thinking", "text", "tool_use", "tool_use"]
    assert starts[2]["input"] == {}
    json_text = "".join(
        e["delta"]["partial_json"] for e in got if e["type"] == "content_block_delta" and e["index"] == 2
    )
    assert json.loads(json_text) == {"x": 1}
    stops = [e["index"] for e in got if e["type"] == "content_block_stop"]
    assert stops == [0, 1, 2, 3]


async def test_stop_sequence_and_max_tokens(open_desk):
    desk = open_desk(
        FakeProvider(script=(Delta(index=0, text="a", token_ids=[1], finish="stop", stop="END"),))
    )
    body = (await ask(desk, stop_sequences=["END"])).json()
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "END")
    assert desk.provider.seen[-1].params.stop == ["END"]
    short = open_desk(FakeProvider())
    assert (await ask(short, max_tokens=2)).json()["stop_reason"] == "max_tokens"


async def test_max_tokens_beyond_the_context_fills_it_and_says_so(open_desk):
    desk = open_desk(FakeProvider(words=("x",) * 200))
    response = await ask(desk, max_tokens=5000)
    body = response.json()
    assert body["stop_reason"] == "model_context_window_exceeded" and body["usage"]["output_tokens"] == 92
    assert "5000 lowered to the 92" in response.headers["x-galley-clamped"]
    assert "max_tokens" in (await desk.receipt(response))["clamped"]


async def test_count_tokens(desk):
    body = {"model": "fake-1b", "messages": HI, "system": "x" * 300}
    response = await desk.http.post("/v1/messages/count_tokens", json=body)
    assert response.json() == {"input_tokens": 316}


@pytest.mark.parametrize(
    ("fields", "status", "kind", "word"),
    [
        ({"model": "nope"}, 404, "not_found_error", "nope"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400,
         "invalid_request_error", "messages[0].content[0].type"),
        ({"messages": [*HI, {"role": "assistant", "content": "Sure"}]}, 400,
         "invalid_request_error", "beginning"),
        ({"temperature": 1.5}, 400, "invalid_request_error", "temperature"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, 400, "invalid_request_error", "context"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, 400,
         "invalid_request_error", "tools[0].type"),
        ({"mcp_servers": [{"url": "x"}]}, 400, "invalid_request_error", "mcp_servers"),
    ],
)  # fmt: skip
async def test_errors_have_anthropics_shape(desk, fields, status, kind, word):
    response = await ask(desk, **fields)
    body = response.json()
    assert response.status_code == status and body["type"] == "error", body
    assert body["error"]["type"] == kind and body["request_id"] == response.headers["request-id"]
    assert word in body["error"]["message"] or word == body["error"].get("param"), body


async def test_overload_is_529_and_a_fault_ends_the_stream(open_desk):
    busy = await ask(open_desk(FakeProvider(full=True)))
    assert busy.status_code == 529 and busy.json()["error"]["type"] == "overloaded_error"
    assert busy.headers["x-should-retry"] == "true" and busy.headers["retry-after"] == "2"
    desk = open_desk(FakeProvider(fault=FAULT, fault_at=2))
    got = events((await ask(desk, stream=True)).text)
    assert got[-1]["type"] == "error" and got[-1]["error"]["type"] == "api_error"


async def test_access_errors_speak_anthropic_too(open_desk):
    desk = open_desk(keys=["sk-a"])
    refused = await ask(desk)
    assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
    body = {"model": "fake-1b", "max_tokens": 5, "messages": HI}
    good = await desk.http.post("/v1/messages", json=body, headers={"x-api-key": "sk-a"})
    assert good.status_code == 200


async def test_history_becomes_chat_messages(open_desk):
    from galley.endpoint.messages.turns import Turns
    from galley.endpoint.wire import Fields

    turns = Turns(
        Fields(
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": "hm", "signature": "s"},
                            {"type": "redacted_thinking", "data": "x"},
                            {"type": "text", "text": "wait"},
                            {"type": "tool_use", "id": "t1", "name": "f", "input": {"ü": 1}},
                        ],
                    },
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "t1", "content": "42"},
                            {"type": "text", "text": "and?"},
                        ],
                    },
                ]
            }
        )
    )
    assert turns.messages == [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "wait",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"ü":1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "42"},
        {"role": "user", "content": "and?"},
    ]
    assert turns.ignored == ["messages[1].content[1]"]
