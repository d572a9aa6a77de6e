"""``/v1/embeddings`` over a real engine: what is refused, what is answered, that batching changes nothing."""

import asyncio
import base64
from pathlib import Path

import httpx
import numpy as np
import pytest

from galley.errors import BadModelFile
from galley.llm import LLM
from galley.model.gguf import GGUF
from galley.model.model import Model
from galley.providers.opened import EngineOptions, Opened
from galley.runtime.backend.reference import ReferenceBackend
from galley.runtime.plan import Rows
from tests.tiny import IM_END, tiny_gguf
from tests.unit.endpoint.conftest import Desk

OPTIONS = EngineOptions(backend="reference", kv_memory=8 << 20)
TEXTS = ["the cat sat", "on the mat", "another text, a longer one than those before it: " * 3]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("embed")
    return {
        "plain": tiny_gguf(folder / "plain.gguf", "llama"),
        "last": tiny_gguf(folder / "last.gguf", "qwen3", pooling=3, matryoshka=(16, 32), add_eos=True),
        "cls": tiny_gguf(folder / "cls.gguf", "qwen2", pooling=2),
        "rank": tiny_gguf(folder / "rank.gguf", "qwen3", pooling=4),
    }


@pytest.fixture
def serve(models, tmp_path):
    made = []

    def make(name: str) -> Desk:
        opened = Opened(models[name], name, OPTIONS)
        desk = Desk(tmp_path, opened.provider)  # type: ignore[arg-type]
        made.append((opened, desk))
        return desk

    yield make
    for opened, desk in made:
        opened.close()
        desk.store.close()
        desk.state.close()


async def ask(desk: Desk, model: str, given, **more) -> httpx.Response:
    return await desk.http.post("/v1/embeddings", json={"model": model, "input": given, **more})


def states(path: Path, ids: list[int]) -> np.ndarray:
    """The oracle: every state of a text, out of one step of the float32 reference."""
    model = Model.open(path, "m")
    backend = ReferenceBackend(model.gguf, model.spec, num_blocks=40)
    rows = Rows()
    rows.add(ids, 0, list(range(-(-len(ids) // 16))), 0)
    rows.read(0, len(ids), states=True)
    backend.run(rows)
    model.close()
    return backend.states().astype(np.float64)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


async def test_one_text_several_texts_and_ids_give_the_same_unit_vectors(serve, models):
    desk = serve("plain")
    answer = await ask(desk, "plain", TEXTS)
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "list" and body["model"] == "plain"
    assert [item["index"] for item in body["data"]] == [0, 1, 2]
    tokenizer = desk.provider.model.tokenizer
    ids = [tokenizer.encode(text) for text in TEXTS]
    total = sum(map(len, ids))
    assert body["usage"] == {"prompt_tokens": total, "total_tokens": total}
    for text, one, item in zip(TEXTS, ids, body["data"], strict=True):
        want = unit(states(models["plain"], one).mean(0))
        assert np.allclose(item["embedding"], want, atol=1e-6)
        assert (await ask(desk, "plain", text)).json()["data"][0]["embedding"] == item["embedding"]
    by_id = (await ask(desk, "plain", ids)).json()["data"]
    assert [item["embedding"] for item in by_id] == [item["embedding"] for item in body["data"]]
    packed = (await ask(desk, "plain", TEXTS, encoding_format="base64")).json()["data"]
    for item, text in zip(body["data"], packed, strict=True):
        raw = np.frombuffer(base64.b64decode(text["embedding"]), "<f4")
        assert raw.tolist() == item["embedding"]


async def test_the_pooling_is_the_files_and_is_named_in_header_and_receipt(serve, models):
    for name, pool in (("plain", "mean"), ("last", "last"), ("cls", "cls")):
        desk = serve(name)
        answer = await ask(desk, name, TEXTS[0])
        said = answer.headers["x-galley-pooling"]
        assert said.startswith(pool) and ("default" in said) == (name == "plain")
        receipt = await desk.receipt(answer)
        assert receipt["pooling"] == said and receipt["api"] == "embeddings"
        assert receipt["usage"]["completion_tokens"] == 0
        ids = desk.provider.model.tokenizer.encode(TEXTS[0]) + ([IM_END] if name == "last" else [])
        assert answer.json()["usage"]["prompt_tokens"] == len(ids)
        all_of = states(models[name], ids)
        want = {"mean": all_of.mean(0), "last": all_of[-1], "cls": all_of[0]}[pool]
        assert np.allclose(answer.json()["data"][0]["embedding"], unit(want), atol=1e-6)


async def test_dimensions_where_the_file_says_it_was_trained_for_that(serve, models):
    desk = serve("last")
    whole = np.array((await ask(desk, "last", "a b")).json()["data"][0]["embedding"])
    for size in (16, 32, 64):
        cut = np.array((await ask(desk, "last", "a b", dimensions=size)).json()["data"][0]["embedding"])
        assert len(cut) == size and np.allclose(cut, unit(whole[:size]), atol=1e-6)
    refused = await ask(desk, "last", "a b", dimensions=17)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "dimensions"
    assert "16, 32, 64" in refused.json()["error"]["message"]
    plain = serve("plain")
    assert (await ask(plain, "plain", "a", dimensions=64)).status_code == 200
    refused = (await ask(plain, "plain", "a", dimensions=32)).json()["error"]
    assert (refused["param"], refused["code"]) == ("dimensions", "unsupported_parameter")


async def test_a_reranker_gives_no_embeddings_and_says_so(serve):
    desk = serve("rank")
    refused = await ask(desk, "rank", "a")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "model_not_supported"
    listed = (await desk.http.get("/v1/models")).json()["data"][0]
    assert "embedding" not in listed["capabilities"]
    listed = (await serve("plain").http.get("/v1/models")).json()["data"][0]
    assert "embedding" in listed["capabilities"]


BAD = [
    ({}, "input", "missing_required_parameter"),
    ({"input": ""}, "input", "empty_string"),
    ({"input": []}, "input", "empty_array"),
    ({"input": ["a", ""]}, "input[1]", "empty_string"),
    ({"input": [[]]}, "input[0]", "empty_array"),
    ({"input": 5}, "input", "invalid_type"),
    ({"input": ["a", 5]}, "input[1]", "invalid_type"),
    ({"input": [1, "a"]}, "input[1]", "invalid_type"),
    ({"input": [999_999]}, "input[0]", "invalid_token_id"),
    ({"input": [[1], [-4]]}, "input[1][0]", "invalid_token_id"),
    ({"input": ["a"] * 2049}, "input", "array_above_max_length"),
    ({"input": "x" * 5000}, "input", "context_length_exceeded"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
    ({"input": "a", "dimensions": 0}, "dimensions", "integer_below_min_value"),
    ({"input": "a", "stream": True}, "stream", "unsupported_parameter"),
    ({"input": "a", "input_type": "query"}, "input_type", "unsupported_parameter"),
    ({"input": "a", "truncate_prompt_tokens": 4}, "truncate_prompt_tokens", "unsupported_parameter"),
]


async def test_what_cannot_be_done_is_refused_with_its_name(serve):
    desk = serve("plain")
    for body, param, code in BAD:
        refused = await desk.http.post("/v1/embeddings", json={"model": "plain", **body})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["code"]) == (400, param, code), body
        assert (await desk.receipt(refused))["status"] == "error"
    ignored = await ask(desk, "plain", "a", wishes=3)
    assert ignored.headers["x-galley-ignored-params"] == "wishes"


async def test_many_texts_share_the_engine_with_generation(serve):
    """More texts than are let into the engine at once, beside a stream of tokens: one step plan for all."""
    desk = serve("plain")
    texts = [f"text number {i}" for i in range(200)]
    plain = {"model": "plain", "prompt": "once", "max_tokens": 20, "seed": 3}
    alone = (await desk.http.post("/v1/completions", json=plain)).json()["choices"][0]["text"]
    many, beside = await asyncio.gather(
        ask(desk, "plain", texts), desk.http.post("/v1/completions", json=plain)
    )
    assert beside.json()["choices"][0]["text"] == alone
    found = {item["index"]: item["embedding"] for item in many.json()["data"]}
    assert len(found) == 200
    for index in (0, 150, 199):
        one = (await ask(desk, "plain", texts[index])).json()["data"][0]["embedding"]
        assert found[index] == one
    assert not desk.provider.engine.scheduler.jobs


def test_the_library_embeds_as_the_server_does(models, tmp_path):
    with LLM(str(models["plain"]), backend="reference", kv_memory=8 << 20, home=tmp_path) as llm:
        first, second = llm.embed(TEXTS[:2])
        ids = llm.model.tokenizer.encode(TEXTS[0])
        assert np.allclose(first.embedding, unit(states(models["plain"], ids).mean(0)), atol=1e-6)
        assert first.pooling == "mean" and first.receipt.pooling.startswith("mean (default")
        assert first.usage.prompt_tokens == len(ids) and first.usage.completion_tokens == 0
        assert llm.embed(ids)[0].embedding == first.embedding
        raw = llm.embed(TEXTS[1], normalise=False, pooling="last")[0]
        want = states(models["plain"], second.prompt_token_ids)[-1]
        assert np.allclose(raw.embedding, want, atol=1e-4) and raw.receipt.pooling == "last (asked for)"


def test_a_file_that_says_nonsense_of_pooling_is_refused(tmp_path):
    for name, options, field in (
        ("kind", {"pooling": 9}, "pooling_type"),
        ("size", {"matryoshka": (4096,)}, "matryoshka_dimensions"),
        ("both", {"causal": False}, "attention.causal"),
    ):
        path = tiny_gguf(tmp_path / f"{name}.gguf", "llama", **options)
        with pytest.raises(BadModelFile, match=field):
            Model.open(path, name)
    GGUF.open(tiny_gguf(tmp_path / "yes.gguf", "llama", causal=True)).close()
    Model.open(tmp_path / "yes.gguf", "yes").close()
