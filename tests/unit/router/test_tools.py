"""Calls and reasoning on their way out: scripted ids through the provider, the endpoint and the receipt."""

import json

import httpx
import pytest

from galley.audit.receipts import ReceiptStore
from galley.endpoint.app import build_app
from galley.model.model import Model
from galley.providers.local import LocalProvider
from galley.router.router import Router
from tests.tiny import CHATML, tiny_gguf
from tests.unit.router.test_local import ScriptedEngine

TEMPLATE = CHATML + "{# tools <tool_call> <think> #}"
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}}
]
GOOD = '<think>\nhm\n</think>\n\nI look.\n<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>'
BAD = '<tool_call>\n{"name": "f", "arguments": {"x": é}}\n</tool_call>'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    opened = Model.open(
        tiny_gguf(tmp_path_factory.mktemp("m") / "m.gguf", template=TEMPLATE, context=2048), "tiny"
    )
    yield opened
    opened.close()


@pytest.fixture
def say(model, tmp_path):
    """Ask with an answer that is written down; gives response and receipt."""
    stores = []

    async def ask(text: str, **fields):
        ids = [*model.tokenizer.encode(text), 2]
        engine = ScriptedEngine([ids], 2)
        engine.context = 2048
        store = ReceiptStore(tmp_path / f"{len(stores)}.db", batch_s=0.001)
        stores.append(store)
        app = build_app(Router([LocalProvider(model, engine)], store), store)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS} | fields
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as http:
            answer = await http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            receipt = await http.get(f"/v1/receipts/{answer.headers['x-galley-receipt']}")
        return answer, receipt.json(), engine

    yield ask
    for store in stores:
        store.close()


def chunks(answer) -> list:
    blocks = [block[6:] for block in answer.text.split("\n\n") if block.startswith("data: {")]
    return [json.loads(block)["choices"][0] for block in blocks if json.loads(block)["choices"]]


async def test_a_whole_answer_has_reasoning_text_and_call(say, model):
    answer, receipt, _ = await say(GOOD)
    (choice,) = answer.json()["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["reasoning_content"], message["content"]) == ("hm", "I look.")
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"x": "é"}'} and call["type"] == "function"
    thought = len(model.tokenizer.encode("<think>\nhm\n</think>"))
    assert abs(answer.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] - thought) <= 8
    assert receipt["usage"]["reasoning_tokens"] > 0 and receipt["warnings"] == []
    assert "x-galley-parse-warning" not in answer.headers


async def test_a_stream_says_the_same_in_pieces(say):
    answer, _, _ = await say(GOOD, stream=True)
    told = chunks(answer)
    deltas = [choice["delta"] for choice in told]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "hm"
    assert "".join(d.get("content") or "" for d in deltas) == "I look."
    pieces = [piece for d in deltas for piece in d.get("tool_calls", ())]
    assert pieces[0]["id"] and pieces[0]["function"]["name"] == "f"
    assert "".join(piece["function"]["arguments"] for piece in pieces) == '{"x": "é"}'
    assert told[-1]["finish_reason"] == "tool_calls"
    order = [next(iter(d)) for d in deltas if d and "role" not in d]
    assert order.index("content") > order.index("reasoning_content")
    assert order.index("tool_calls") > order.index("content")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_malformed_call_is_text_with_a_warning(say, stream):
    answer, receipt, _ = await say(BAD, stream=stream)
    if stream:
        told = chunks(answer)
        text = "".join(choice["delta"].get("content") or "" for choice in told)
        last = told[-1]
    else:
        (last,) = answer.json()["choices"]
        text = last["message"]["content"]
        assert "tool_calls" not in last["message"]
        assert "malformed" in answer.headers["x-galley-parse-warning"]
    assert text == BAD and last["finish_reason"] == "stop"
    assert "malformed" in last["x_parse_warnings"][0] and "malformed" in receipt["warnings"][0]


async def test_without_tools_nothing_is_read_as_a_call(say):
    for more in ({"tools": None}, {"tool_choice": "none"}):
        answer, _, engine = await say(GOOD, **more)
        message = answer.json()["choices"][0]["message"]
        assert "tool_calls" not in message and message["content"].endswith("</tool_call>")
        # with tools in the template, `none` masks what opens a call
        assert (engine.asked[0]["guide"] is None) == ("tools" in more)


async def test_a_stop_string_ends_a_call_too(say):
    answer, _, _ = await say(GOOD, stop=['{"x"'])
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == '{"x"'
    assert choice["message"]["content"] == 'I look.\n<tool_call>\n{"name": "f", "arguments": '
