"""The official ``openai`` client against a real socket: what it parses, raises and retries."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from galley.audit.receipts import ReceiptStore
from galley.endpoint.app import build_app
from galley.errors import EngineFault, GalleyError
from galley.router.router import Router
from tests.e2e.served import Served
from tests.unit.endpoint.fake import FAULT, FakeProvider

HI = [{"role": "user", "content": "hi"}]


class Shop:
    """A served fake and clients for it."""

    def __init__(self, path: Path) -> None:
        self.provider = FakeProvider()
        self.store = ReceiptStore(path / "receipts.db", batch_s=0.001)
        self.router = Router([self.provider], self.store)
        self.served = Served(build_app(self.router, self.store, keys=["sk-test"], keepalive_s=0.02))
        self.requests: list[httpx.Request] = []

    def client(self, **options: object) -> openai.OpenAI:
        http = httpx.Client(event_hooks={"request": [self.requests.append]})
        settings = {"base_url": f"{self.served.url}/v1", "api_key": "sk-test", "http_client": http} | options
        return openai.OpenAI(**settings)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = Shop(tmp_path)
    with made.served:
        yield made
    made.store.close()


@pytest.fixture
def client(shop: Shop) -> Iterator[openai.OpenAI]:
    with shop.client() as made:
        yield made


def test_chat_and_its_receipt(shop, client):
    raw = client.chat.completions.with_raw_response.create(model="fake-1b", messages=HI, user="u")
    answer = raw.parse()
    assert answer.choices[0].message.content == "Hello wörld" and answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 0 and answer.usage.completion_tokens == 3
    assert answer._request_id.startswith("req_") and answer.system_fingerprint == "fp_fake"
    receipt = client.get(f"/receipts/{raw.headers['x-galley-receipt']}", cast_to=dict)
    assert receipt["status"] == "ok" and receipt["key"].startswith("key_")


def test_chat_stream_through_keep_alives(shop, client):
    shop.provider.step_s = 0.05
    chunks = list(
        client.chat.completions.create(
            model="fake-1b", messages=HI, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello wörld"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 11


def test_stream_helper_assembles_the_answer(client):
    with client.chat.completions.stream(
        model="fake-1b", messages=HI, logprobs=True, top_logprobs=1
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello wörld"
    assert [e.token for e in final.choices[0].logprobs.content] == ["H", "l", "w"]


def test_completions(client):
    answer = client.completions.create(model="fake-1b", prompt=["ab", "cd"], n=2, logprobs=1, max_tokens=2)
    assert [c.text for c in answer.choices] == ["Hello "] * 4 and answer.choices[3].index == 3
    assert answer.choices[0].logprobs.tokens == ["H", "l"] and answer.choices[0].finish_reason == "length"
    text = "".join(
        c.choices[0].text for c in client.completions.create(model="fake-1b", prompt="x", stream=True)
    )
    assert text == "Hello wörld"


def test_models(client):
    assert [m.id for m in client.models.list()] == ["fake-1b"]
    assert client.models.retrieve("fake-1b").owned_by == "galley"


async def test_async_client(shop):
    async with openai.AsyncOpenAI(base_url=f"{shop.served.url}/v1", api_key="sk-test") as client:
        answer = await client.chat.completions.create(model="fake-1b", messages=HI)
        assert answer.choices[0].message.content == "Hello wörld"
        stream = await client.chat.completions.create(model="fake-1b", messages=HI, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "Hello wörld"
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="fake-1b", messages=HI, max_tokens=-1)


def test_error_classes(shop, client):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fake-1b", messages=HI, temperature=9)
    assert (bad.value.code, bad.value.param, bad.value.type) == (
        "decimal_above_max_value",
        "temperature",
        "invalid_request_error",
    )
    assert bad.value.request_id.startswith("req_")
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=HI)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="fake-1b", prompt="x" * 200)
    assert long.value.code == "context_length_exceeded" and long.value.body["n_ctx"] == 100
    with shop.client(api_key="sk-wrong") as stranger, pytest.raises(openai.AuthenticationError) as denied:
        stranger.models.list()
    assert denied.value.code == "invalid_api_key"
    with (
        shop.client(default_headers={"host": "evil.example"}) as rebound,
        pytest.raises(openai.PermissionDeniedError),
    ):
        rebound.models.list()
    assert len(shop.requests) == 5, "no permanent refusal was retried"


def test_retryable_faults_are_retried(shop):
    shop.provider.full = True
    with shop.client(max_retries=1) as client, pytest.raises(openai.InternalServerError) as full:
        # The fake's Retry-After of 2 s is honoured: the second try comes no sooner.
        client.chat.completions.create(model="fake-1b", messages=HI)
    assert full.value.code == "overloaded" and len(shop.requests) == 2


def test_permanent_faults_are_not_retried(shop, client):
    shop.provider.fault = GalleyError("for good")
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="fake-1b", messages=HI)
    assert len(shop.requests) == 1
    shop.requests.clear()
    shop.provider.fault = EngineFault("for now")
    with shop.client(max_retries=1) as patient, pytest.raises(openai.InternalServerError):
        patient.chat.completions.create(model="fake-1b", messages=HI)
    assert len(shop.requests) == 2


def test_fault_mid_stream_raises_after_the_text(shop, client):
    shop.provider.fault, shop.provider.fault_at = FAULT, 2
    stream = client.chat.completions.create(model="fake-1b", messages=HI, stream=True)
    seen = ""
    with pytest.raises(openai.APIError) as caught:
        for chunk in stream:
            seen += chunk.choices[0].delta.content or ""
    assert seen == "Hello " and caught.value.code == "engine_fault"


def test_client_that_closes_a_stream_leaves_a_disconnected_receipt(shop, client):
    shop.provider.words, shop.provider.step_s = ("x",) * 80, 0.01
    raw = client.chat.completions.with_raw_response.create(model="fake-1b", messages=HI, stream=True)
    id = raw.headers["x-galley-receipt"]
    stream = raw.parse()
    for _, chunk in zip(range(3), stream, strict=False):
        assert chunk.choices
    stream.close()
    with shop.client() as other:
        for _ in range(200):
            try:
                receipt = other.get(f"/receipts/{id}", cast_to=dict)
                break
            except openai.NotFoundError:
                pass
    assert receipt["status"] == "disconnected" and 2 <= receipt["usage"]["completion_tokens"] < 80
    assert shop.provider.running == 0


def test_an_oversize_body_is_a_bad_request(shop, client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake-1b", prompt="x" * (10 << 20))
    assert caught.value.code == "request_too_large"
