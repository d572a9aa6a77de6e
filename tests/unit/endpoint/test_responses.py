"""The Responses API over a scripted provider: shapes, order of events, state."""

import asyncio
import json

import pytest

from galley.types import Delta, ToolCallDelta
from tests.unit.endpoint.fake import FAULT, FakeProvider

CALLS = (
    Delta(index=0, reasoning="Let me ", token_ids=[1], cached_tokens=2),
    Delta(index=0, reasoning="look.", text="Looking", token_ids=[2]),
    Delta(
        index=0, tool_calls=[ToolCallDelta(index=0, id="call_a", name="f", arguments='{"x"')], token_ids=[3]
    ),
    Delta(
        index=0,
        tool_calls=[
            ToolCallDelta(index=0, arguments=":1}"),
            ToolCallDelta(index=1, id="call_b", name="g", arguments="{}"),
        ],
        token_ids=[4],
        finish="tool_calls",
    ),
)


async def create(desk, **fields):
    return await desk.http.post("/v1/responses", json={"model": "fake-1b", "input": "hi"} | fields)


def events(text):
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            data = json.loads(lines["data"])
            assert lines["event"] == data["type"]
            found.append(data)
    return found


async def test_whole_response(desk):
    response = await create(desk, instructions="be brief", max_output_tokens=5, metadata={"a": "b"})
    body = response.json()
    assert response.status_code == 200 and body["object"] == "response" and body["status"] == "completed"
    (item,) = body["output"]
    assert item["type"] == "message" and item["content"][0]["text"] == "Hello wörld"
    assert body["usage"]["input_tokens"] == 24 and body["usage"]["output_tokens"] == 3
    assert body["metadata"] == {"a": "b"} and body["store"] is True and body["instructions"] == "be brief"
    assert desk.provider.seen[-1].messages[0] == {"role": "system", "content": "be brief"}
    assert desk.provider.seen[-1].params.max_tokens == 5
    assert (await desk.receipt(response))["api"] == "responses"


async def test_events_are_numbered_and_in_order(desk):
    got = events((await create(desk, stream=True)).text)
    assert [e["sequence_number"] for e in got] == list(range(len(got)))
    assert [e["type"].removeprefix("response.") for e in got] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 3,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(e["delta"] for e in got if e["type"].endswith("output_text.delta")) == "Hello wörld"
    last = got[-1]["response"]
    assert last["output"][0]["content"][0]["text"] == "Hello wörld" and last["usage"]["total_tokens"] == 11
    stored = (await desk.http.get(f"/v1/responses/{last['id']}")).json()
    assert stored == last


async def test_reasoning_text_and_calls_are_items_of_their_own(open_desk):
    desk = open_desk(FakeProvider(script=CALLS))
    streamed = events((await create(desk, stream=True)).text)
    whole = (await create(desk)).json()
    kinds = [e["type"].removeprefix("response.") for e in streamed]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    for output in (whole["output"], streamed[-1]["response"]["output"]):
        assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
        assert output[0]["content"] == [{"type": "reasoning_text", "text": "Let me look."}]
        assert (output[2]["call_id"], output[2]["arguments"]) == ("call_a", '{"x":1}')
    done = [e["item"] for e in streamed if e["type"] == "response.output_item.done"]
    assert done == streamed[-1]["response"]["output"]


async def test_length_is_incomplete(desk):
    body = (await create(desk, max_output_tokens=2)).json()
    assert body["status"] == "incomplete" and body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["status"] == "incomplete"
    last = events((await create(desk, max_output_tokens=2, stream=True)).text)[-1]
    assert last["type"] == "response.incomplete" and last["response"]["status"] == "incomplete"


async def test_fault_mid_stream_fails_the_response(open_desk):
    desk = open_desk(FakeProvider(fault=FAULT, fault_at=1))
    got = events((await create(desk, stream=True)).text)
    assert [e["type"] for e in got[-2:]] == ["error", "response.failed"]
    assert got[-2]["code"] == "engine_fault" and got[-1]["response"]["error"]["code"] == "engine_fault"


async def test_a_conversation_continues_from_the_shelf(desk):
    first = (await create(desk, input="one")).json()
    second = (await create(desk, input="two", previous_response_id=first["id"])).json()
    third = await create(
        desk, input=[{"role": "user", "content": "three"}], previous_response_id=second["id"]
    )
    assert third.status_code == 200
    roles = [(m["role"], m["content"]) for m in desk.provider.seen[-1].messages]
    said = ("assistant", "Hello wörld")
    assert roles == [("user", "one"), said, ("user", "two"), said, ("user", "three")]
    items = (await desk.http.get(f"/v1/responses/{second['id']}/input_items")).json()
    assert [i["content"][0]["text"] for i in items["data"]] == ["two"] and not items["has_more"]
    gone = (await desk.http.delete(f"/v1/responses/{first['id']}")).json()
    assert gone == {"id": first["id"], "object": "response", "deleted": True}
    broken = await create(desk, input="four", previous_response_id=second["id"])
    error = broken.json()["error"]
    assert broken.status_code == 400 and error["code"] == "previous_response_not_found"
    assert first["id"] in error["message"] and second["id"] in error["message"]


async def test_store_false_is_kept_nowhere(desk):
    body = (await create(desk, store=False)).json()
    assert body["store"] is False
    assert (await desk.http.get(f"/v1/responses/{body['id']}")).status_code == 404
    assert (await create(desk, previous_response_id=body["id"])).status_code == 400


async def test_background_runs_and_can_be_cancelled(open_desk):
    desk = open_desk(FakeProvider(words=("x",) * 50, step_s=0.01))
    begun = (await create(desk, background=True)).json()
    assert begun["status"] == "in_progress" and begun["background"] is True
    again = (await desk.http.get(f"/v1/responses/{begun['id']}")).json()
    assert again["status"] == "in_progress"
    ended = (await desk.http.post(f"/v1/responses/{begun['id']}/cancel")).json()
    assert ended["status"] == "cancelled" and desk.provider.running == 0
    assert (await desk.http.get(f"/v1/responses/{begun['id']}")).json()["status"] == "cancelled"
    quick = (await create(desk, background=True, max_output_tokens=2)).json()
    for _ in range(100):
        body = (await desk.http.get(f"/v1/responses/{quick['id']}")).json()
        if body["status"] != "in_progress":
            break
        await asyncio.sleep(0.01)
    assert body["status"] == "incomplete" and body["output"][0]["content"][0]["text"] == "xx"
    refused = await create(desk, background=True, store=False)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "background"
    unknown = await create(desk, background=True, model="nope")
    assert unknown.status_code == 404


async def test_what_a_dead_process_left_running_has_failed(open_desk, tmp_path):
    desk = open_desk(FakeProvider(words=("x",) * 50, step_s=0.05))
    begun = (await create(desk, background=True)).json()
    later = open_desk(FakeProvider())  # the same home, as after a restart
    body = (await later.http.get(f"/v1/responses/{begun['id']}")).json()
    assert body["status"] == "failed" and body["error"]["code"] == "server_error"
    await desk.http.post(f"/v1/responses/{begun['id']}/cancel")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input[0].content[0].type", "unsupported_parameter"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type", "unsupported_parameter"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"conversation": "c"}, "conversation", "unsupported_parameter"),
        ({"max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
        ({"max_output_tokens": 500}, "input", "context_length_exceeded"),
        ({"temperature": 3}, "temperature", "decimal_above_max_value"),
        ({"previous_response_id": "resp_none"}, "previous_response_id", "previous_response_not_found"),
    ],
)  # fmt: skip
async def test_refusals_speak_of_this_api(desk, fields, param, code):
    response = await create(desk, **fields)
    error = response.json()["error"]
    assert response.status_code == 400 and (error["param"], error["code"]) == (param, code), error


async def test_what_has_no_effect_is_named(desk):
    response = await create(desk, include=["reasoning.encrypted_content"], max_tool_calls=3, frobnicate=1)
    named = set(response.headers["x-galley-ignored-params"].split(", "))
    assert named == {"include[0]", "max_tool_calls", "frobnicate"}


async def test_logprobs_are_included_when_asked_for(desk):
    body = (await create(desk, include=["message.output_text.logprobs"], top_logprobs=2)).json()
    entries = body["output"][0]["content"][0]["logprobs"]
    assert len(entries) == 3 and len(entries[0]["top_logprobs"]) == 2


async def test_input_tokens_are_counted(desk):
    body = {"model": "fake-1b", "input": "x" * 500}
    response = await desk.http.post("/v1/responses/input_tokens", json=body)
    assert response.json() == {"object": "response.input_tokens", "input_tokens": 506}


async def test_stored_chat_completions(desk):
    made = [(await desk.chat(store=True, metadata={"n": str(i)})).json()["id"] for i in range(3)]
    await desk.chat()
    listed = (await desk.http.get("/v1/chat/completions?limit=2")).json()
    assert [c["id"] for c in listed["data"]] == made[:2] and listed["has_more"]
    found = (await desk.http.get("/v1/chat/completions", params={"metadata[n]": "2"})).json()
    assert [c["id"] for c in found["data"]] == made[2:]
    one = f"/v1/chat/completions/{made[0]}"
    assert (await desk.http.get(one)).json()["choices"][0]["message"]["content"] == "Hello wörld"
    assert (await desk.http.get(one + "/messages")).json()["data"][0]["content"] == "hi"
    changed = await desk.http.post(one, json={"metadata": {"new": "1"}})
    assert changed.json()["metadata"] == {"new": "1"}
    assert (await desk.http.delete(one)).json()["deleted"] is True
    assert (await desk.http.get(one)).status_code == 404
    text = (await desk.chat(store=True, stream=True)).text
    id = json.loads(text.splitlines()[0][6:])["id"]
    assert (await desk.http.get(f"/v1/chat/completions/{id}")).json()["usage"]["completion_tokens"] == 3
