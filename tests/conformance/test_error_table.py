"""Every kind of refusal, as the official client sees it: class, code, param, and how often it tries.

Kinds whose feature is elsewhere (limits, budgets, approvals, clouds) are raised by the provider: what is held
here is that such an error arrives as it should, whoever raises it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from galley.audit.receipts import ReceiptStore
from galley.endpoint.app import build_app
from galley.endpoint.state import State
from galley.errors import (
    DeadlineExceeded,
    EngineFault,
    GalleyError,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    TemplateError,
    Upstream,
)
from galley.router.router import Router
from tests.e2e.served import Served
from tests.unit.endpoint.fake import FakeProvider

HI = [{"role": "user", "content": "hi"}]


class Refusal(GalleyError):
    """An error of any kind."""

    def __init__(self, status: int, type: str, code: str, *, retryable: bool = False, **more: Any) -> None:
        super().__init__("no", code=code, **more)
        self.status, self.type, self.retryable = status, type, retryable


class Row(NamedTuple):
    case: str
    kind: type[openai.APIStatusError]
    status: int
    type: str
    code: str
    param: str | None = None
    fields: dict[str, Any] = {}  # noqa: RUF012  (a tuple row, never changed)
    fault: GalleyError | None = None
    tries: int = 1
    key: str = "sk-all"
    raw: bytes | None = None


BAD, REQUEST = openai.BadRequestError, "invalid_request_error"
ROWS = [
    Row("body not JSON", BAD, 400, REQUEST, "invalid_json", raw=b"{"),
    Row("body no object", BAD, 400, REQUEST, "invalid_type", raw=b"[]"),
    Row("required field missing", BAD, 400, REQUEST, "missing_required_parameter", "messages",
        {"messages": None}),
    Row("wrong type", BAD, 400, REQUEST, "invalid_type", "messages[0].content",
        {"messages": [{"role": "user", "content": 5}]}),
    Row("out of range", BAD, 400, REQUEST, "decimal_above_max_value", "temperature", {"temperature": 3}),
    Row("below the range", BAD, 400, REQUEST, "integer_below_min_value", "max_tokens", {"max_tokens": 0}),
    Row("bad enum", BAD, 400, REQUEST, "invalid_value", "service_tier", {"service_tier": "gold"}),
    Row("unsupported but meaningful", BAD, 400, REQUEST, "unsupported_parameter", "prediction",
        {"prediction": {"type": "content", "content": "x"}}),
    Row("too long for the context", BAD, 400, REQUEST, "context_length_exceeded", "messages",
        {"max_tokens": 5000}),
    Row("model unknown", openai.NotFoundError, 404, REQUEST, "model_not_found", "model", {"model": "nope"}),
    Row("wrong key", openai.AuthenticationError, 401, REQUEST, "invalid_api_key", key="sk-wrong"),
    Row("key without the scope", openai.PermissionDeniedError, 403, "permission_error", "scope_missing",
        key="reader"),
    Row("key not for this model", openai.PermissionDeniedError, 403, "permission_error", "model_not_allowed",
        "model", key="other"),
    Row("rate limit", openai.RateLimitError, 429, "requests", "rate_limit_exceeded",
        fault=Refusal(429, "requests", "rate_limit_exceeded", retryable=True, retry_after_s=0.01), tries=3),
    Row("budget exhausted", openai.RateLimitError, 429, "insufficient_quota", "insufficient_quota",
        fault=Refusal(429, "insufficient_quota", "insufficient_quota")),
    Row("queue full", openai.InternalServerError, 503, "server_error", "overloaded",
        fault=Overloaded("full", retry_after_s=0.01), tries=3),
    Row("loading", openai.InternalServerError, 503, "server_error", "model_loading",
        fault=Overloaded("loading", code="model_loading", retry_after_s=0.01), tries=3),
    Row("out of time", openai.InternalServerError, 503, "server_error", "deadline_exceeded",
        fault=DeadlineExceeded("late", retry_after_s=0.01), tries=3),
    Row("needs approval", openai.PermissionDeniedError, 403, "permission_error", "approval_required",
        fault=PermissionDenied("ask", code="approval_required", extra={"approval_id": "a1"})),
    Row("cloud forbidden by policy", openai.PermissionDeniedError, 403, "permission_error", "cloud_disabled",
        fault=PermissionDenied("no", code="cloud_disabled")),
    Row("schema not enforceable", BAD, 400, REQUEST, "invalid_json_schema",
        "response_format.json_schema.schema.properties.x",
        fault=InvalidRequest("no", code="invalid_json_schema",
                             param="response_format.json_schema.schema.properties.x")),
    Row("template refuses the messages", BAD, 400, REQUEST, "template_error", "messages",
        fault=TemplateError("roles", by_messages=True)),
    Row("template is at fault", openai.InternalServerError, 500, "server_error", "template_error",
        fault=TemplateError("bug", by_messages=False)),
    Row("engine fault", openai.InternalServerError, 500, "server_error", "engine_fault",
        fault=EngineFault("step"), tries=3),
    Row("upstream failed", openai.InternalServerError, 502, "api_error", "upstream_error",
        fault=Upstream("it answered 500", kind="server", provider="far", retry_after_s=0.01), tries=3),
    Row("tool named in tool_choice absent", BAD, 400, REQUEST, "invalid_value", "tool_choice",
        {"tools": [{"type": "function", "function": {"name": "f"}}],
         "tool_choice": {"type": "function", "function": {"name": "g"}}}),
    Row("fault without a type", openai.InternalServerError, 500, "server_error", "server_error",
        fault=GalleyError("for good")),
]  # fmt: skip


class Shop:
    """A served fake that knows three keys."""

    def __init__(self, path: Path) -> None:
        self.provider = FakeProvider()
        self.store = ReceiptStore(path / "receipts.db", batch_s=0.001)
        self.state = State(path / "home")
        _, reader = self.state.keys.create("reader", scopes=["receipts"])
        _, other = self.state.keys.create("other", models=["another-model"])
        self.keys = {"reader": reader, "other": other}
        router = Router([self.provider], self.store)
        self.served = Served(build_app(router, self.store, state=self.state, keys=["sk-all"]))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    made = Shop(tmp_path_factory.mktemp("shop"))
    with made.served:
        yield made
    made.store.close()
    made.state.close()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.case)
def test_a_refusal_arrives_as_it_should(shop: Shop, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.provider.fault = row.fault
    tried: list[httpx.Request] = []
    http = httpx.Client(event_hooks={"request": [tried.append]})
    # The client waits half a second and more between tries where it is not told how long.
    monkeypatch.setattr(openai._base_client.BaseClient, "_calculate_retry_timeout", lambda *_a, **_k: 0.0)
    body = {"model": "fake-1b", "messages": HI} | row.fields
    with (
        openai.OpenAI(
            base_url=f"{shop.served.url}/v1", api_key=shop.keys.get(row.key, row.key), http_client=http
        ) as client,
        pytest.raises(row.kind) as caught,
    ):
        if row.raw is not None:
            client.post("/chat/completions", cast_to=object, content=row.raw)
        else:
            client.post("/chat/completions", cast_to=object, body=body)
    error = caught.value
    assert type(error) is row.kind and error.status_code == row.status
    assert (error.type, error.code, error.param) == (row.type, row.code, row.param), error.body
    assert isinstance(error.body, dict) and {"message", "type", "param", "code"} <= set(error.body)
    assert error.request_id
    assert len(tried) == row.tries, f"tried {len(tried)} times"
    if row.status == 429 or row.status >= 500:
        assert error.response.headers["x-should-retry"] == ("true" if row.tries > 1 else "false")
    if row.status == 401:
        assert error.response.headers["www-authenticate"] == "Bearer"
    if row.code == "approval_required":
        assert error.body["approval_id"] == "a1"
    if row.code == "upstream_error":
        assert error.body["provider"] == "far" and "far" in error.message
    if row.code == "model_not_found":
        assert "Nearest: fake-1b" in error.message
        assert error.response.headers["x-galley-hint"]
    if row.code == "context_length_exceeded":
        assert error.body["n_ctx"] == 100 and error.body["max_tokens"] == 5000


def test_a_fault_in_the_middle_of_a_stream_is_raised(shop: Shop) -> None:
    """An event with ``error``, then the end without ``[DONE]``: the official client raises on it."""
    shop.provider.fault, shop.provider.fault_at = EngineFault("step"), 1
    try:
        with openai.OpenAI(base_url=f"{shop.served.url}/v1", api_key="sk-all") as client:
            stream = client.chat.completions.create(model="fake-1b", messages=HI, stream=True)
            said: list[str] = []
            with pytest.raises(openai.APIError) as caught:
                said.extend(chunk.choices[0].delta.content or "" for chunk in stream)
            assert type(caught.value) is openai.APIError and caught.value.code == "engine_fault"
            raw = httpx.post(
                f"{shop.served.url}/v1/chat/completions",
                headers={"authorization": "Bearer sk-all"},
                json={"model": "fake-1b", "messages": HI, "stream": True},
            )
            assert raw.status_code == 200 and "[DONE]" not in raw.text and '"error"' in raw.text
    finally:
        shop.provider.fault_at = 0
