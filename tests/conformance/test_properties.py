"""Every request property of the OpenAI specification is classified, and the server does what the class says.

The names come from the specification (docs/api/openai-properties.json), the classes from
docs/api/decisions.toml; docs/API.md shows both.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from galley.audit.receipts import ReceiptStore
from galley.endpoint.app import build_app
from galley.endpoint.state import State
from galley.router.router import Router
from tests.unit.endpoint.fake import FakeProvider

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("api_table", ROOT / "scripts/api_table.py")
assert spec is not None and spec.loader is not None
api_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(api_table)

NAMES, DECIDED = api_table.names(), api_table.decisions()
HI = [{"role": "user", "content": "hi"}]
BASES: dict[str, dict[str, Any]] = {
    "POST /v1/chat/completions": {"model": "fake-1b", "messages": HI},
    "POST /v1/completions": {"model": "fake-1b", "prompt": "hi"},
    "POST /v1/embeddings": {"model": "fake-1b", "input": "hi"},
    "POST /v1/responses": {"model": "fake-1b", "input": "hi", "store": False},
    "POST /v1/responses/input_tokens": {"model": "fake-1b", "input": "hi"},
}
VALUES: dict[str, Any] = {
    "background": True,
    "best_of": 2,
    "conversation.id": "conv_1",
    "context_management": [{"type": "compaction"}],
    "dimensions": 1,
    "echo": True,
    "encoding_format": "base64",
    "frequency_penalty": 1,
    "function_call.name": "f",
    "functions": [{"name": "f"}],
    "include": ["message.output_text.logprobs"],
    "input": "yo",
    "logit_bias": {"1": 2},
    "logprobs": True,
    "max_completion_tokens": 2,
    "max_output_tokens": 2,
    "max_tokens": 2,
    "max_tool_calls": 2,
    "messages": [{"role": "user", "content": "yo"}],
    "metadata": {"a": "b"},
    "modalities": ["text", "audio"],
    "model": "fake",
    "n": 2,
    "parallel_tool_calls": False,
    "presence_penalty": 1,
    "prompt": "yo",
    "prompt.id": "pmpt_1",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"ttl": "30m"},
    "prompt_cache_options.ttl": "30m",
    "prompt_cache_options.mode": "explicit",
    "reasoning_effort": "low",
    "reasoning.effort": "low",
    "reasoning": {"summary": "auto"},
    "response_format": {"type": "json_object"},
    "response_format.json_schema": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "response_format.type": {"type": "json_object"},
    "safety_identifier": "u",
    "seed": 3,
    "service_tier": "flex",
    "stop": ["x"],
    "store": True,
    "stream": True,
    "stream_options": {"include_usage": True},
    "stream_options.include_obfuscation": {"include_obfuscation": True},
    "stream_options.include_usage": {"include_usage": True},
    "temperature": 0.5,
    "text.format": {"format": {"type": "json_object"}},
    "text": {"format": {"type": "text"}},
    "tool_choice": "required",
    **{
        f"tool_choice.{name}": {"type": "function", "name": "f", "function": {"name": "f"}}
        for name in ("type", "name", "function")
    },
    **{
        f"tool_choice.{name}": {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "f"}],
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
        }
        for name in ("mode", "tools", "allowed_tools")
    },
    "tool_choice.custom": {"type": "custom", "custom": {"name": "f"}},
    "tool_choice.server_label": {"type": "mcp", "server_label": "s"},
    "tools": [{"type": "function", "name": "f", "function": {"name": "f"}}],
    "top_logprobs": 1,
    "top_p": 0.5,
    "truncation": "auto",
    "user": "u",
}
"""A value with a meaning. Others get ``"something"``, or an object that holds it."""
NEEDS = {
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
    "background": {"store": True},
    "tool_choice": {"tools": [{"type": "function", "name": "f", "function": {"name": "f"}}]},
    "parallel_tool_calls": {"tools": [{"type": "function", "name": "f", "function": {"name": "f"}}]},
}
EFFECTLESS = {"text"}
"""Supported at values that change nothing."""
TELLING = (
    "model", "params", "messages", "prompts", "echo", "metadata", "user", "service_tier", "template_kwargs",
    "tools", "tool_choice", "parallel_tool_calls", "cache_key", "cache_ttl_s", "embed", "reasoning_effort",
)  # fmt: skip


def test_no_property_is_left_out():
    assert set(DECIDED) == set(NAMES)
    for operation, properties in NAMES.items():
        rows = DECIDED[operation]
        if "*" not in rows:
            assert set(rows) == set(properties), f"{operation}: {sorted(set(rows) ^ set(properties))}"
        assert {word for word, _ in rows.values()} <= set(api_table.MEANINGS)


def test_the_document_shows_the_decisions():
    document = api_table.DOCUMENT.read_text(encoding="utf-8")
    assert api_table.written(document) == document, "run: python scripts/api_table.py table"


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


@pytest.fixture
def http(tmp_path, provider) -> Iterator[httpx.AsyncClient]:
    store = ReceiptStore(tmp_path / "receipts.db")
    state = State(tmp_path / "home")
    app = build_app(Router([provider], store, aliases={"fake": "fake-1b"}), store, state=state)
    yield httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
    store.close()
    state.close()


def probe(operation: str, name: str) -> dict[str, Any]:
    """A body that gives the property a meaning."""
    head, _, tail = name.partition(".")
    if operation == "POST /v1/completions" and name == "logprobs":
        return {"logprobs": 1}
    value = VALUES.get(name, VALUES.get(head) if not tail else None)
    if value is None:
        value = {tail: "something"} if tail else "something"
    elif tail and not isinstance(value, dict):
        value = {tail: value}
    if operation.startswith("POST /v1/responses") and name == "stream_options":
        value = {"include_obfuscation": True}
    needs = NEEDS.get(head, {})
    if operation == "POST /v1/responses":
        needs = {k: v for k, v in needs.items() if k != "logprobs"}
    return needs | {head: value}


QUESTIONS = [
    (operation, name, word)
    for operation in BASES
    for name, (word, _) in DECIDED[operation].items()
    if not (operation == "POST /v1/responses/input_tokens" and word == "supported")
]


@pytest.mark.parametrize(("operation", "name", "word"), QUESTIONS)
async def test_the_server_does_what_the_class_says(http, provider, operation, name, word):
    base, asked = BASES[operation], probe(operation, name)
    head = name.partition(".")[0]
    path = operation.partition(" ")[2]
    without = {k: v for k, v in asked.items() if k != head}
    if name == "previous_response_id":
        asked[name] = (await http.post(path, json=base | {"store": True})).json()["id"]
    plain = await http.post(path, json=base | without)
    assert plain.status_code == 200, plain.text
    answer = await http.post(path, json=base | asked)
    named = answer.headers.get("x-galley-ignored-params", "").split(", ")
    if word == "400":
        assert answer.status_code == 400, "it was not refused"
        error = answer.json()["error"]
        assert error["code"] in ("unsupported_parameter", "unsupported_value"), error
        assert error["param"].split(".")[0].split("[")[0] == head, error
    elif word == "named":
        assert answer.status_code == 200, answer.text
        parts = {each for path in named for each in (path, path.partition(".")[0])}
        assert {name, head} & parts, named
    else:
        assert answer.status_code == 200, answer.text
        assert not {name, head} & set(named), "it has no effect"
        if name in EFFECTLESS:
            return
        if name == "store":
            kept = await http.get(f"{path}/{answer.json()['id']}")
            assert kept.status_code == 200
            return
        if name == "model":  # the alias led to its model
            assert answer.json()["model"] == "fake-1b"
            return
        before, after = provider.seen[-2:]
        changed = any(getattr(before, field) != getattr(after, field) for field in TELLING)
        assert changed or answer.text.split(",")[3:] != plain.text.split(",")[3:], "it changed nothing"


async def test_the_small_operations_are_there(http):
    """Those without a body: there, or 404 with the reason for a missing object."""
    for operation, rows in DECIDED.items():
        method, _, path = operation.partition(" ")
        place = path.replace("{", "").replace("}", "").replace("completion_id", "x")
        if "*" in rows:
            response = await http.request(method, place, json={})
            assert response.status_code in (404, 405), operation
            continue
        if operation in BASES or method == "POST":
            continue
        response = await http.request(method, place)
        assert response.status_code in (200, 404), operation
        if response.status_code == 404:
            assert "There is no" in response.json()["error"]["message"] or "model" in path
            assert "GET" not in response.json()["error"]["message"]
        for name, (word, _) in rows.items():
            values = {"limit": "5", "order": "asc", "stream": "true", "metadata": "x"}
            bare = name[1:]
            key = "metadata[k]" if bare == "metadata" else bare
            answer = await http.request(method, place, params={key: values.get(bare, "x")})
            if word == "400":
                assert answer.status_code == 400 and answer.json()["error"]["param"] == bare
            else:
                assert answer.status_code in (200, 404), (operation, name, answer.text)
        unknown = await http.request(method, place, params={"frobnicate": "1"})
        if rows:
            assert unknown.status_code == 400 and unknown.json()["error"]["code"] == "unknown_parameter"
