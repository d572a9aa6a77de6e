"""Every request property the official client knows is supported, refused by name, or listed in a header.

The names come from the installed client's own types, so a new version with new names fails here first.
"""

from collections.abc import Iterator

import httpx
import pytest
from openai.types import completion_create_params as legacy
from openai.types.chat import completion_create_params as chat

from galley.audit.receipts import ReceiptStore
from galley.endpoint.app import build_app
from galley.router.router import Router
from tests.unit.endpoint.fake import FakeProvider

CHAT = sorted({*chat.CompletionCreateParamsBase.__annotations__, "stream"})
LEGACY = sorted({*legacy.CompletionCreateParamsBase.__annotations__, "stream"})
BASE = {
    "chat/completions": {"model": "fake-1b", "messages": [{"role": "user", "content": "hi"}]},
    "completions": {"model": "fake-1b", "prompt": "hi"},
}
SUPPORTED = {
    "model": "fake",
    "messages": [{"role": "user", "content": "yo"}],
    "prompt": "yo",
    "echo": True,
    "frequency_penalty": 1,
    "presence_penalty": 1,
    "logit_bias": {"1": 2},
    "logprobs": True,
    "max_tokens": 2,
    "max_completion_tokens": 2,
    "metadata": {"a": "b"},
    "n": 2,
    "seed": 3,
    "stop": ["x"],
    "stream": True,
    "service_tier": "flex",
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "top_logprobs": 1,
    "top_p": 0.5,
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "user": "u",
    "safety_identifier": "u",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"ttl": "30m"},
    "reasoning_effort": "low",
}
"""Name and a value that must have an effect: the request the provider sees, or the answer, differs."""
PROBES = {
    "audio": {"voice": "alloy", "format": "wav"},
    "best_of": 2,
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "x"},
    "store": True,
    "suffix": "s",
    "verbosity": "low",
    "web_search_options": {"search_context_size": "low"},
}
READ = (
    *("model", "params", "messages", "prompts", "echo", "metadata", "user", "cache_key", "cache_ttl_s"),
    *("tools", "tool_choice", "parallel_tool_calls", "service_tier", "reasoning_effort"),
)
NEEDS = {
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
    "tool_choice": {"tools": SUPPORTED["tools"]},
    "parallel_tool_calls": {"tools": SUPPORTED["tools"]},
}


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


@pytest.fixture
def store(tmp_path) -> Iterator[ReceiptStore]:
    made = ReceiptStore(tmp_path / "receipts.db")
    yield made
    made.close()


@pytest.mark.parametrize(
    ("path", "name"),
    [("chat/completions", name) for name in CHAT] + [("completions", name) for name in LEGACY],
)
async def test_no_property_is_swallowed(path, name, provider, store):
    app = build_app(Router([provider], store, aliases={"fake": "fake-1b"}), store)
    base = BASE[path] | NEEDS.get(name, {})
    value = SUPPORTED.get(name, PROBES.get(name, "something"))
    if path == "completions" and name == "logprobs":
        value = 1
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        plain = await http.post(f"/v1/{path}", json=base)
        answer = await http.post(f"/v1/{path}", json=base | {name: value})
    assert plain.status_code == 200
    if name in SUPPORTED:
        assert answer.status_code == 200 and "x-galley-ignored-params" not in answer.headers, answer.text
        if name == "model":
            assert answer.json()["model"] == "fake-1b"  # the alias led to its model
        elif name not in ("stream", "stream_options"):
            before, after = provider.seen
            changed = [field for field in READ if getattr(before, field) != getattr(after, field)]
            assert changed, f"{name} was accepted and changed nothing"
        else:
            assert answer.text != plain.text
    elif answer.status_code == 400:
        assert answer.json()["error"]["param"].startswith(name)
        assert answer.json()["error"]["code"] == "unsupported_parameter"
    else:
        assert answer.status_code == 200
        assert name in answer.headers["x-galley-ignored-params"].split(", ")
