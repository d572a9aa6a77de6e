"""No body makes the endpoint fall over: whatever comes, an answer or a four-key 4xx."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from galley.endpoint.params import CHANGES_ANSWER
from tests.unit.endpoint.conftest import Desk
from tests.unit.endpoint.fake import FakeProvider

NAMES = [
    "model", "messages", "prompt", "stream", "stream_options", "n", "stop", "logit_bias", "logprobs",
    "top_logprobs", "temperature", "top_p", "top_k", "seed", "max_tokens", "max_completion_tokens",
    "metadata", "user", "store", "service_tier", "response_format", "modalities", "tool_choice", "echo",
    "chat_template_kwargs", "stop_token_ids", "priority", "cache_salt", "max_queue_s", "max_total_s",
    "add_generation_prompt", *CHANGES_ANSWER,
]  # fmt: skip
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["fake-1b", "text", "user", "system", "role", "content", "type", "\x00", "1"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "include_usage", "1", "é"]), inner
        )
    ),
    max_leaves=8,
)
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)
GOOD = {"model": "fake-1b", "messages": [{"role": "user", "content": "hi"}], "prompt": "hi"}


def acceptable(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404), response.text
    assert response.headers["x-galley-receipt"]
    if response.status_code != 200:
        error = response.json()["error"]
        assert {"message", "type", "param", "code"} <= set(error) and isinstance(error["code"], str)
        assert len(response.content) < 4000


async def probe(contents: list[bytes]) -> None:
    with TemporaryDirectory() as folder:
        desk = Desk(Path(folder), FakeProvider())
        try:
            for content in contents:
                for door in ("/v1/chat/completions", "/v1/completions"):
                    acceptable(await desk.http.post(door, content=content))
        finally:
            desk.store.close()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(BODIES, min_size=5, max_size=10), st.booleans())
async def test_any_object_is_answered_or_refused(bodies, complete):
    await probe([json.dumps((GOOD if complete else {}) | body).encode() for body in bodies])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 80), st.binary(max_size=4)), min_size=5, max_size=10))
async def test_any_damage_to_a_body_is_answered_or_refused(cuts):
    whole = json.dumps(GOOD).encode()
    await probe([whole[:at] + junk + whole[at + len(junk) :] for at, junk in cuts])
