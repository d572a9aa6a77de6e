"""Ollama's paths: options, streams, calls, loading, the pages, and errors in its own form."""

import json

import httpx
import pytest

from galley.audit.receipts import ReceiptStore
from galley.endpoint.app import build_app
from galley.endpoint.keys import KeyStore
from galley.endpoint.ollama.facts import read_facts
from galley.endpoint.ollama.routes import ollama_routes
from galley.endpoint.state import State
from galley.router.router import Router
from galley.types import Delta, ToolCallDelta
from tests.tiny import CHATML, tiny_gguf
from tests.unit.endpoint.fake import FakeProvider

HI = [{"role": "user", "content": "hi"}]
CALLS = (
    Delta(index=0, reasoning="Hm.", token_ids=[1]),
    Delta(
        index=0,
        tool_calls=[ToolCallDelta(index=0, id="call_a", name="f", arguments='{"x"')],
        token_ids=[2],
    ),
    Delta(index=0, tool_calls=[ToolCallDelta(index=0, arguments=":1}")], token_ids=[3]),
    Delta(
        index=0,
        tool_calls=[ToolCallDelta(index=1, id="call_b", name="g", arguments="{}")],
        token_ids=[4],
        finish="tool_calls",
    ),
)


class Shim:
    """A server with Ollama's paths over a fake provider."""

    def __init__(self, folder, provider, keys=()):
        self.provider = provider
        self.store = ReceiptStore(folder / "r.db", batch_s=0.001)
        self.state = State(folder / "home")
        path = tiny_gguf(folder / "m.gguf", template=CHATML)
        facts = read_facts(path, "MIT")
        router = Router([provider], self.store, aliases={"short": "fake-1b"})
        app = build_app(
            router, self.store, state=self.state, keys=keys, ollama=ollama_routes(lambda name: facts, None)
        )
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")

    async def chat(self, **more):
        return await self.http.post("/api/chat", json={"model": "fake-1b", "messages": HI} | more)

    async def generate(self, **more):
        return await self.http.post("/api/generate", json={"model": "fake-1b", "prompt": "hi"} | more)


@pytest.fixture
async def shim(tmp_path):
    made = Shim(tmp_path, FakeProvider(context=4000))
    yield made
    await made.http.aclose()
    made.state.close()
    made.store.close()


def lines(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


async def test_chat_streams_lines_unless_told_otherwise(shim):
    found = lines(await shim.chat())
    assert [line["message"]["content"] for line in found] == ["Hel", "lo ", "wörld", ""]
    assert [line["done"] for line in found] == [False] * 3 + [True]
    last = found[-1]
    assert last["done_reason"] == "stop" and last["eval_count"] == 3 and last["prompt_eval_count"] == 8
    assert last["total_duration"] >= last["eval_duration"] >= 0 and "model" in last and "created_at" in last
    whole = (await shim.chat(stream=False)).json()
    assert whole["message"] == {"role": "assistant", "content": "Hello wörld"} and whole["done"]
    assert shim.store.flush(5)
    assert [r.api for r in shim.store.list(limit=9)] == ["ollama.chat"] * 2


async def test_generate_takes_the_template_or_leaves_it(shim):
    found = lines(await shim.generate(system="be kind"))
    assert "".join(line["response"] for line in found) == "Hello wörld"
    assert shim.provider.seen[-1].messages == [{"role": "system", "content": "be kind"}, *HI]
    assert (await shim.generate(raw=True, stream=False)).json()["response"] == "Hello wörld"
    assert shim.provider.seen[-1].prompts == ["hi"] and shim.provider.seen[-1].messages is None
    refused = await shim.generate(raw=True, system="x")
    assert refused.status_code == 400 and refused.json()["param"] == "system"


async def test_options_mean_what_they_say(shim):
    options = {
        "num_predict": 2,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 5,
        "stop": ["END"],
        "repeat_penalty": 1.2,
        "repeat_last_n": -1,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "num_ctx": 4000,
        "num_gpu": 1,
        "typical_p": 1.0,
        "mirostat": 0,
    }
    answer = await shim.chat(options=options)
    assert lines(answer)[-1]["done_reason"] == "length"
    params = shim.provider.seen[-1].params
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p, params.min_p) == (
        2,
        0.5,
        7,
        0.9,
        0.1,
    )
    assert (params.seed, params.stop, params.repetition_penalty) == (5, ["END"], 1.2)
    assert (params.presence_penalty, params.frequency_penalty) == (0.25, -0.5)
    assert answer.headers["x-galley-ignored-params"] == "options.num_gpu"
    free = await shim.chat(options={"num_predict": -1, "seed": -1})
    assert lines(free)[-1]["done_reason"] == "stop" and shim.provider.seen[-1].params.seed is None
    reach = await shim.chat(options={"repeat_penalty": 1.1})
    assert "options.repeat_penalty: over prompt and output" in reach.headers["x-galley-clamped"]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"options": {"mirostat": 2}}, "options.mirostat"),
        ({"options": {"typical_p": 0.5}}, "options.typical_p"),
        ({"options": {"tfs_z": 0.5}}, "options.tfs_z"),
        ({"options": {"no_such": 1}}, "options.no_such"),
        ({"options": {"num_ctx": 8000}}, "options.num_ctx"),
        ({"options": {"num_predict": 0}}, "options.num_predict"),
        ({"options": {"num_predict": 9000}}, "messages"),
        ({"options": {"temperature": 9}}, "options.temperature"),
        ({"options": {"temperature": "hot"}}, "options.temperature"),
        ({"options": {"seed": 1.5}}, "options.seed"),
        ({"options": {"stop": 5}}, "options.stop"),
        ({"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}, "options.repeat_last_n"),
        ({"options": {"repeat_penalty": "x"}}, "options.repeat_penalty"),
        ({"options": 5}, "options"),
        ({"format": "yaml"}, "format"),
        ({"format": 3}, "format"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"keep_alive": True}, "keep_alive"),
        ({"think": 5}, "think"),
        ({"think": "much"}, "think"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "messages[0].images"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [5]}, "messages[0]"),
        ({"tools": [{"type": "web"}]}, "tools[0].type"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
    ],
)
async def test_what_is_not_understood_is_a_400_in_ollamas_words(shim, more, param):
    answer = await shim.chat(**more)
    body = answer.json()
    assert (answer.status_code, body["param"]) == (400, param), body
    assert isinstance(body["error"], str) and body["code"]
    assert answer.headers["x-galley-receipt"]


async def test_other_refusals(shim, tmp_path):
    assert (await shim.chat(model="nope")).json()["error"].startswith("The model 'nope' does not exist")
    for name in ("template", "context", "images"):
        value = {"template": "x", "context": [1], "images": ["aGk="]}[name]
        answer = await shim.generate(**{name: value})
        assert (answer.status_code, answer.json()["param"]) == (400, name)
    answer = await shim.generate(options={"temperature": 5})
    assert answer.json()["param"] == "options.temperature"
    assert (await shim.http.post("/api/pull", json={"model": "x"})).status_code == 404
    broken = await shim.http.post("/api/chat", content=b"{")
    assert broken.status_code == 400 and broken.json()["code"] == "invalid_json"


async def test_format_is_a_schema_or_any_object(shim):
    await shim.chat(format="json")
    assert shim.provider.seen[-1].params.structured_outputs.json_object
    await shim.chat(format={"type": "object"})
    wanted = shim.provider.seen[-1]
    assert wanted.params.structured_outputs.json == {"type": "object"} and wanted.structured_path == "format"
    await shim.chat(format="")
    assert shim.provider.seen[-1].params.structured_outputs is None


async def test_calls_are_whole_and_their_arguments_an_object(tmp_path):
    shim = Shim(tmp_path, FakeProvider(script=CALLS, context=4000))
    found = lines(await shim.chat())
    assert found[0]["message"]["thinking"] == "Hm."
    calls = [call for line in found for call in line["message"].get("tool_calls", ())]
    assert [call["function"] for call in calls] == [
        {"name": "f", "arguments": {"x": 1}},
        {"name": "g", "arguments": {}},
    ]
    whole = (await shim.chat(stream=False)).json()["message"]
    assert [c["function"]["name"] for c in whole["tool_calls"]] == ["f", "g"] and whole["thinking"] == "Hm."
    turns = [
        *HI,
        {"role": "assistant", "thinking": "Hm.", "tool_calls": [{"function": calls[0]["function"]}]},
        {"role": "tool", "tool_name": "f", "content": "2"},
    ]
    assert (await shim.chat(messages=turns, stream=False)).status_code == 200
    seen = shim.provider.seen[-1].messages
    assert seen[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert seen[1]["reasoning_content"] == "Hm." and seen[2]["name"] == "f"
    await shim.http.aclose()
    shim.state.close()
    shim.store.close()


async def test_logprobs(shim):
    found = lines(await shim.chat(logprobs=True, top_logprobs=2))
    assert found[0]["logprobs"][0]["logprob"] == -0.25 and len(found[0]["logprobs"][0]["top_logprobs"]) == 2
    raw = (await shim.generate(logprobs=True, top_logprobs=1, raw=True, stream=False)).json()
    assert len(raw["logprobs"]) == 3 and len(raw["logprobs"][0]["top_logprobs"]) == 1


async def test_names_may_have_the_latest_tag(shim):
    answer = await shim.chat(model="fake-1b:latest", stream=False)
    assert answer.json()["model"] == "fake-1b"
    assert answer.headers["x-galley-clamped"] == "model: read as fake-1b"
    assert (await shim.chat(model="short", stream=False)).status_code == 200
    assert (await shim.chat(model="fake-1b:q8", stream=False)).status_code == 404


async def test_a_fault_in_the_middle_is_a_line(tmp_path):
    from tests.unit.endpoint.fake import FAULT

    shim = Shim(tmp_path, FakeProvider(fault=FAULT, fault_at=1))
    answer = await shim.chat()
    found = [json.loads(line) for line in answer.text.splitlines()]
    assert found[0]["message"]["content"] == "Hel"
    assert found[-1]["error"] == "the kernel fell over" and "done" not in found[-1]
    await shim.http.aclose()
    shim.state.close()
    shim.store.close()


async def test_pages(shim):
    assert (await shim.http.get("/api/version")).json()["version"]
    (listed,) = (await shim.http.get("/api/tags")).json()["models"]
    assert (
        listed["name"] == listed["model"] == "fake-1b"
        and listed["size"] > 1000
        and len(listed["digest"]) == 64
    )
    assert listed["details"]["format"] == "gguf" and listed["details"]["family"] == "llama"
    (awake,) = (await shim.http.get("/api/ps")).json()["models"]
    assert awake["context_length"] == 4000 and awake["expires_at"].startswith("9999")
    shown = (await shim.http.post("/api/show", json={"model": "short"})).json()
    assert shown["template"] == CHATML and shown["license"] == "MIT" and "tools" in shown["capabilities"]
    assert shown["model_info"]["general.architecture"] == "llama"
    assert "tokenizer.ggml.tokens" not in shown["model_info"]
    missing = await shim.http.post("/api/show", json={"model": "nope"})
    assert missing.status_code == 404 and isinstance(missing.json()["error"], str)
    assert (await shim.http.post("/api/show", json={})).json()["param"] == "model"


async def test_loading_is_no_generation(shim):
    (line,) = lines(await shim.http.post("/api/generate", json={"model": "fake-1b"}))
    assert line["done"] and line["done_reason"] == "load" and line["response"] == ""
    empty = await shim.http.post("/api/chat", json={"model": "fake-1b", "messages": [], "stream": False})
    assert empty.json()["done_reason"] == "load" and not shim.provider.seen
    assert (await shim.http.post("/api/generate", json={"model": "nope"})).status_code == 404


async def test_keys_hold_here_too(tmp_path):
    shim = Shim(tmp_path, FakeProvider(context=4000))
    keys: KeyStore = shim.state.keys
    _, good = keys.create("a")
    _, other = keys.create("b", models=["another"])
    _, reader = keys.create("c", scopes=["receipts"])

    async def ask(secret, path="/api/chat", **body):
        asked = {"model": "fake-1b", "messages": HI} | body
        return await shim.http.post(path, json=asked, headers={"authorization": f"Bearer {secret}"})

    assert (await shim.chat()).status_code == 401 and (await shim.http.get("/api/tags")).status_code == 401
    assert (await ask(good)).status_code == 200
    assert (await ask(other)).status_code == 403 and (await ask(reader)).status_code == 403
    assert (await ask(other, messages=[])).status_code == 403
    assert (await ask(other, "/api/show")).status_code == 403
    tags = await shim.http.get("/api/tags", headers={"authorization": f"Bearer {other}"})
    assert tags.json()["models"] == []
    await shim.http.aclose()
    shim.state.close()
    shim.store.close()


async def test_without_the_setting_there_are_no_such_paths(desk):
    answer = await desk.http.post("/api/chat", json={"model": "fake-1b", "messages": HI})
    assert answer.status_code == 404
