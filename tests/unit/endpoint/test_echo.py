"""``echo`` with ``logprobs``: a prompt's own tokens scored, alone (``max_tokens: 0``) or before an answer."""

import json

import numpy as np
import pytest

from galley.providers.opened import EngineOptions, Opened
from galley.runtime.backend.reference import ReferenceBackend
from galley.runtime.plan import Rows
from tests.tiny import tiny_gguf
from tests.unit.endpoint.conftest import Desk

TEXT = "the cat sat on the mät"


@pytest.fixture
def desk(tmp_path):
    options = EngineOptions(backend="reference", kv_memory=8 << 20)
    opened = Opened(tiny_gguf(tmp_path / "m.gguf", "llama"), "m", options)
    made = Desk(tmp_path, opened.provider)  # type: ignore[arg-type]
    yield made
    opened.close()
    made.store.close()
    made.state.close()


async def ask(desk, **more):
    answer = await desk.http.post(
        "/v1/completions", json={"model": "m", "prompt": TEXT, "echo": True, **more}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_prompt_alone_is_scored_and_nothing_is_drawn(desk):
    body = await ask(desk, max_tokens=0, logprobs=2)
    (choice,) = body["choices"]
    assert choice["text"] == TEXT and choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
    model = desk.provider.model
    ids = model.tokenizer.encode(TEXT)
    said = choice["logprobs"]
    assert len(said["tokens"]) == len(said["token_logprobs"]) == len(said["text_offset"]) == len(ids)
    backend = ReferenceBackend(model.gguf, model.spec, num_blocks=8)
    rows = Rows()
    rows.add(ids, 0, list(range(8)), len(ids))
    backend.run(rows)
    wide = backend.logits().astype(np.float64)
    norm = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1)) + wide.max(1)
    want = [wide[i, ids[i + 1]] - norm[i] for i in range(len(ids) - 1)]
    assert said["token_logprobs"][0] is None and said["top_logprobs"][0] is None
    assert np.allclose(said["token_logprobs"][1:], want, atol=1e-5)
    assert all(2 <= len(top) <= 3 for top in said["top_logprobs"][1:])
    assert said["text_offset"][0] == 0 and sorted(said["text_offset"]) == said["text_offset"]


async def test_before_an_answer_the_same_scores_streamed_or_whole(desk):
    alone = (await ask(desk, max_tokens=0, logprobs=1))["choices"][0]["logprobs"]
    plain = await desk.http.post(
        "/v1/completions", json={"model": "m", "prompt": TEXT, "max_tokens": 5, "seed": 1, "logprobs": 1}
    )
    after = plain.json()["choices"][0]
    both = (await ask(desk, max_tokens=5, seed=1, logprobs=1))["choices"][0]
    assert both["text"] == TEXT + after["text"]
    for name in ("tokens", "token_logprobs"):
        assert both["logprobs"][name] == alone[name] + after["logprobs"][name]
    shifted = [len(TEXT) + place for place in after["logprobs"]["text_offset"]]
    assert both["logprobs"]["text_offset"] == alone["text_offset"] + shifted
    body = {
        "model": "m",
        "prompt": TEXT,
        "echo": True,
        "max_tokens": 5,
        "seed": 1,
        "logprobs": 1,
        "stream": True,
    }
    raw = (await desk.http.post("/v1/completions", json=body)).text
    chunks = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: {")]
    pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert "".join(piece["text"] for piece in pieces) == both["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [one for piece in pieces if piece["logprobs"] for one in piece["logprobs"][name]]
        assert joined == both["logprobs"][name], name


async def test_nothing_asked_for_is_nothing_done(desk):
    body = await ask(desk, max_tokens=0)
    assert body["choices"][0]["text"] == TEXT and body["choices"][0]["logprobs"] is None
    chat = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0}
    refused = await desk.http.post("/v1/chat/completions", json=chat)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"
