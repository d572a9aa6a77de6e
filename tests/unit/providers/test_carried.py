"""Tools, forms of output and log-probabilities over remote providers: what is sent, and what comes back."""

import json
import random

import httpx
import msgspec
import pytest

from galley.audit.receipts import ReceiptStore
from galley.endpoint.app import build_app
from galley.errors import ConfigError, PolicyRefused, Upstream
from galley.providers.anthropic import AnthropicDialect
from galley.providers.base import Meter
from galley.providers.carries import lacks
from galley.providers.http import Pool
from galley.providers.openai import OpenAIDialect, OpenAIReader
from galley.providers.remote import RemoteProvider
from galley.router.catalog import Catalog, Document
from galley.router.outside import open_providers
from galley.router.router import Router
from galley.types import Request, SamplingParams, StructuredOutputs
from tests.unit.endpoint.fake import Ledger
from tests.upstream import WORDS, MockUpstream

TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}, "strict": True},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 and 1?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL, {**CALL, "id": "c2"}],
        "reasoning_content": "hm",
    },
    {"role": "tool", "content": "2", "tool_call_id": "c1"},
    {"role": "tool", "content": "3", "tool_call_id": "c2"},
    {"role": "user", "content": "and now?"},
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def request(**changes):
    fields = {
        "id": "req_1", "api": "chat.completions", "model": "big", "params": SamplingParams(), "created": 1.0,
        "messages": [{"role": "user", "content": "hi"}],
    }  # fmt: skip
    return Request(**(fields | changes))


def sent(dialect, **changes):
    return json.loads(dialect.encode(request(**changes), "m")[1])


async def ask(up, dialect, **changes):
    way = RemoteProvider("cloud", Pool(up.url), dialect, {"big": ("gpt-x", 8192)})
    prepared = await way.prepare(request(**changes))
    run = await way.start(prepared, Meter())
    try:
        return [delta async for delta in run.deltas()], prepared
    finally:
        await run.stop()
        way.close()


def calls_of(deltas):
    """(id, name, arguments) of each call, joined as a client joins them."""
    found = {}
    for delta in deltas:
        for piece in delta.tool_calls:
            if piece.index not in found:
                assert piece.id and piece.name, "the first piece names the call"
                found[piece.index] = [piece.id, piece.name, ""]
            else:
                assert piece.id is None
            found[piece.index][2] += piece.arguments
    return [tuple(call) for call in found.values()]


def test_tools_as_each_format_has_them():
    body = sent(OpenAIDialect("x"), tools=[TOOL], messages=TURNS, tool_choice="function:add")
    assert body["tools"] == [TOOL] and body["messages"][2]["tool_calls"][1]["id"] == "c2"
    assert body["tool_choice"] == {"type": "function", "function": {"name": "add"}}
    assert "parallel_tool_calls" not in body
    assert sent(OpenAIDialect("x"), tools=[TOOL], parallel_tool_calls=False)["parallel_tool_calls"] is False
    claude = AnthropicDialect("x")
    body = sent(claude, tools=[TOOL], messages=TURNS, parallel_tool_calls=False, tool_choice="required")
    assert body["tools"] == [
        {"name": "add", "description": "Adds.", "strict": True, "input_schema": {"type": "object"}}
    ]
    assert body["tool_choice"] == {"type": "any", "disable_parallel_tool_use": True}
    assert [turn["role"] for turn in body["messages"]] == ["user", "assistant", "user", "user"]
    assert body["messages"][1]["content"][0] == {
        "type": "tool_use",
        "id": "c1",
        "name": "add",
        "input": {"a": 1},
    }
    assert [block["tool_use_id"] for block in body["messages"][2]["content"]] == ["c1", "c2"]
    for choice, said in (("auto", "auto"), ("none", "none"), ("function:add", "tool")):
        assert sent(claude, tools=[TOOL], tool_choice=choice)["tool_choice"]["type"] == said


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_come_back(stream):
    async with MockUpstream() as up:
        deltas, _ = await ask(up, OpenAIDialect("cloud"), tools=[TOOL], stream=stream)
        assert calls_of(deltas) == [("call_1", "add", '{"a": 1}')] and deltas[-1].finish == "tool_calls"
        deltas, prepared = await ask(
            up, AnthropicDialect("cloud"), tools=[TOOL], messages=TURNS, stream=stream
        )
    first, second = calls_of(deltas)
    assert first[:2] == ("toolu_1", "add") and json.loads(first[2]) == {"a": 1}
    assert second == ("toolu_2", "add", "{}"), "a call without arguments has an empty object"
    assert "".join(delta.reasoning for delta in deltas) == "hm" and deltas[-1].finish == "tool_calls"
    assert list(prepared.request.clamped) == ["messages[2].reasoning_content"], "what is left out is told"


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_come_back_without_ids(stream):
    async with MockUpstream() as up:
        deltas, _ = await ask(up, OpenAIDialect("cloud"), params=SamplingParams(logprobs=2), stream=stream)
        assert up.bodies[-1][1]["logprobs"] is True and up.bodies[-1][1]["top_logprobs"] == 2
        entries = [entry for delta in deltas for entry in delta.logprobs or ()]
        assert [entry.spelt[0][0] for entry in entries] == WORDS
        assert entries[0].logprob == -0.1 and entries[0].rank == 1 and len(entries[0].top) == 2
        assert entries[0].spelt == [("The ", b"The "), ("The ", b"The "), ("~1", b"~1")]
        up.logprobs = None
        with pytest.raises(Upstream, match="none came"):
            await ask(up, OpenAIDialect("cloud"), params=SamplingParams(logprobs=2), stream=stream)


def test_logprobs_of_text_completions():
    reader = OpenAIReader("x", logprobs=True)
    given = {
        "tokens": ["a", "b"], "token_logprobs": [None, -0.5], "top_logprobs": [None, {"c": -0.2, "b": -0.5}],
    }  # fmt: skip
    heard = reader.whole(
        {"choices": [{"index": 0, "text": "ab", "finish_reason": "stop", "logprobs": given}], "usage": None}
    )
    [entry] = heard.deltas[0].logprobs
    assert (entry.logprob, entry.rank) == (-0.5, 2) and [name for name, _ in entry.spelt] == ["b", "c", "b"]


def test_forms_of_output_as_each_format_has_them():
    form = StructuredOutputs(json=SCHEMA, strict=False)
    body = sent(OpenAIDialect("x"), params=SamplingParams(structured_outputs=form))
    assert body["response_format"]["json_schema"] == {"name": "answer", "schema": SCHEMA, "strict": False}
    text = SamplingParams(structured_outputs=StructuredOutputs(json=json.dumps(SCHEMA)))
    assert sent(OpenAIDialect("x"), params=text)["response_format"]["json_schema"]["schema"] == SCHEMA
    body = sent(AnthropicDialect("x"), params=text)
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": SCHEMA}}
    free = SamplingParams(structured_outputs=StructuredOutputs(json_object=True))
    assert sent(OpenAIDialect("x"), params=free)["response_format"] == {"type": "json_object"}
    regex = SamplingParams(structured_outputs=StructuredOutputs(regex="a+"))
    assert sent(OpenAIDialect("x", extended=True), params=regex)["structured_outputs"] == {"regex": "a+"}


@pytest.mark.parametrize(
    ("format", "changes", "word"),
    [
        ("openai", {"form": {"regex": "a"}}, "regex"),
        ("openai", {"form": {"choice": ["a"]}}, "choice"),
        ("openai", {"form": {"json": True}}, "no object"),
        ("openai", {"form": {"json": {}, "whitespace_pattern": " "}}, "whitespace"),
        ("openai", {"form": {"json": {}}, "messages": None, "prompts": ["x"]}, "text completion"),
        ("openai", {"logprobs": 6, "messages": None, "prompts": ["x"]}, "logprobs"),
        ("anthropic", {"form": {"json_object": True}}, "json_object"),
        ("anthropic", {"form": {"json": {}, "strict": False}}, "strict"),
        ("anthropic", {"logprobs": 0}, "logprobs"),
        ("anthropic", {"messages": TURNS}, "no longer offered"),
        ("anthropic", {"tools": [TOOL], "messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
        (
            "anthropic",
            {
                "tools": [TOOL],
                "messages": [
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "[1]"}}],
                    }
                ],
            },
            "not a JSON object",
        ),
    ],
)
def test_what_a_format_cannot_carry_is_refused_not_dropped(format, changes, word):
    changes = dict(changes)
    form, logprobs = changes.pop("form", None), changes.pop("logprobs", None)
    params = SamplingParams(
        logprobs=logprobs, structured_outputs=StructuredOutputs(**form) if form is not None else None
    )
    assert word in (lacks(request(params=params, **changes), format) or "")
    if form is not None:
        assert lacks(request(params=params, **changes), "openai-extended") is None


def build(ups, kinds, lacking=(), capabilities=("chat", "completion", "tools", "json", "logprobs")):
    document = {
        "policy": {"location": "any", "hedge_share": 0.0},
        "model": [{"id": "big", "capabilities": list(capabilities), "context": 8192}],
        "provider": [
            {
                "name": up.name,
                "kind": kind,
                "url": up.url,
                "lacks": list(lacking),
                "offer": [{"model": "big", "price": [{"input": "1", "output": "2"}]}],
            }
            for up, kind in zip(ups, kinds, strict=True)
        ],
    }
    catalog = Catalog(None, msgspec.convert(document, Document))
    ledger = Ledger()
    return Router(
        open_providers(catalog, lambda _: None), ledger, catalog=catalog, rng=random.Random(1)
    ), ledger


async def test_eligibility_is_by_capability():
    async with MockUpstream("a") as a, MockUpstream("b") as b:
        router, _ = build([a, b], ["openai", "anthropic"])

        def may(**changes):
            return sorted(each.offer.provider for each in router.decide(request(**changes)).sequence)

        assert may() == may(tools=[TOOL]) == ["a", "b"]
        assert may(params=SamplingParams(logprobs=1)) == ["a"]
        strict, loose = (StructuredOutputs(json=SCHEMA, strict=strict) for strict in (True, False))
        assert may(params=SamplingParams(structured_outputs=strict)) == ["a", "b"]
        assert may(params=SamplingParams(structured_outputs=loose)) == ["a"]
        assert may(messages=TURNS) == ["a"] and may(messages=TURNS, tools=[TOOL]) == ["a", "b"]
        with pytest.raises(PolicyRefused, match="grammar"):
            may(params=SamplingParams(structured_outputs=StructuredOutputs(regex="a")))
        router, _ = build([a, b], ["openai", "anthropic"], lacking=["tools"])
        with pytest.raises(PolicyRefused, match="cannot carry tools"):
            may(tools=[TOOL])
        router, _ = build([a, b], ["openai", "anthropic"], capabilities=["chat"])
        for refused in ({"tools": [TOOL]}, {"params": SamplingParams(structured_outputs=strict)}):
            with pytest.raises(PolicyRefused, match="it lacks"):
                may(**refused)
        with pytest.raises(ConfigError, match="unknown capabilities"):
            build([a], ["openai"], lacking=["magic"])


async def test_through_the_endpoint(tmp_path):
    """The client of Galley sees calls and log-probabilities of another server as it sees our own."""
    async with MockUpstream("a") as a, MockUpstream("b") as b:
        store = ReceiptStore(tmp_path / "r.db", batch_s=0.001)
        for up, kind in ((a, "openai"), (b, "anthropic")):
            router, _ = build([up], [kind])
            router.receipts = store
            transport = httpx.ASGITransport(build_app(router, store))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                body = {"model": "big", "messages": [{"role": "user", "content": "hi"}], "tools": [TOOL]}
                answer = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
                call = answer["message"]["tool_calls"][0]
                assert answer["finish_reason"] == "tool_calls" and call["function"]["name"] == "add"
                assert json.loads(call["function"]["arguments"]) == {"a": 1}
                streamed = (await http.post("/v1/chat/completions", json=body | {"stream": True})).text
                assert streamed.endswith("data: [DONE]\n\n") and '"tool_calls"' in streamed
                if kind == "openai":
                    body = {**body, "tools": None, "logprobs": True, "top_logprobs": 1}
                    answer = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
                    content = answer["logprobs"]["content"]
                    assert [each["token"] for each in content] == WORDS
                    assert content[0]["top_logprobs"] == [
                        {"token": "The ", "logprob": -0.1, "bytes": list(b"The ")}
                    ]
        store.close()
