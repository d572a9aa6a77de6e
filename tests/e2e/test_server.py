"""The whole way on a tiny random model: socket, text, engine, kernels, receipt."""

import json
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest

HI = [{"role": "user", "content": "tell me"}]
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture
def client(tiny_server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture
def http(tiny_server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_server.url, timeout=30) as made:
        yield made


def complete(client: openai.OpenAI, model: str, **fields: object):
    extra = {n: fields.pop(n) for n in ("ignore_eos", "return_token_ids", "stop_token_ids") if n in fields}
    return client.completions.create(
        model=model, **({"prompt": "once upon"} | GREEDY | fields), extra_body={"ignore_eos": True} | extra
    )


def test_streamed_and_whole_say_the_same(client, tiny_server):
    whole = client.chat.completions.create(model=tiny_server.model, messages=HI, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            model=tiny_server.model,
            messages=HI,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_second_time_the_prompt_is_cached(client, tiny_server):
    prompt = "the same long prompt, " * 8
    first = complete(client, tiny_server.model, prompt=prompt)
    second = complete(client, tiny_server.model, prompt=prompt)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 16
    assert second.choices[0].text == first.choices[0].text


def test_choices_of_one_prompt_share_it(client, tiny_server, http):
    raw = client.completions.with_raw_response.create(
        model=tiny_server.model,
        prompt=["first one", "the second prompt"],
        n=3,
        max_tokens=8,
        seed=5,
        temperature=1.0,
        extra_body={"ignore_eos": True},
    )
    answer = raw.parse()
    assert [c.index for c in answer.choices] == [0, 1, 2, 3, 4, 5]
    assert answer.usage.completion_tokens == 48
    ids = [
        http.post("/tokenize", json={"prompt": p}).json()["count"] for p in ("first one", "the second prompt")
    ]
    assert answer.usage.prompt_tokens == sum(ids)
    assert len({c.text for c in answer.choices[:3]}) > 1, "lanes draw differently"
    again = client.completions.create(
        model=tiny_server.model,
        prompt="the second prompt",
        n=3,
        max_tokens=8,
        seed=5,
        temperature=1.0,
        extra_body={"ignore_eos": True},
    )
    assert [c.text for c in again.choices] == [c.text for c in answer.choices[3:]], (
        "the seed decides, not the mates"
    )
    receipt = http.get(f"/v1/receipts/{raw.headers['x-galley-receipt']}").json()
    assert len(receipt["choices"]) == 6 and receipt["params"]["seed"] == 5


def test_txt4_stop_string_ends_text_and_bill_alike(client, tiny_server):
    free = complete(client, tiny_server.model, return_token_ids=True)
    text = free.choices[0].text
    stop = text[6:9]
    cut = complete(client, tiny_server.model, stop=[stop])
    assert cut.choices[0].text == text[: text.index(stop)] and cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].model_extra["stop_reason"] == stop
    assert cut.usage.completion_tokens < free.usage.completion_tokens
    stream = list(
        complete(client, tiny_server.model, stop=[stop], stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].text for c in stream if c.choices) == cut.choices[0].text
    assert stream[-1].usage == cut.usage or stream[-1].usage.completion_tokens == cut.usage.completion_tokens


def test_stop_token_is_counted_but_not_shown(client, tiny_server):
    free = complete(client, tiny_server.model, return_token_ids=True)
    ids = free.choices[0].model_extra["token_ids"]
    at = next(i for i, id in enumerate(ids) if i > 0 and id not in ids[:i])
    cut = complete(client, tiny_server.model, stop_token_ids=[ids[at]], return_token_ids=True)
    assert cut.choices[0].model_extra["token_ids"] == ids[: at + 1]
    assert cut.choices[0].model_extra["stop_reason"] == ids[at] and cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens == at + 1 and free.choices[0].text.startswith(cut.choices[0].text)


def test_token_prompt_echo_and_logprobs(client, tiny_server, http):
    ids = http.post("/tokenize", json={"prompt": "once upon"}).json()["tokens"]
    by_ids = complete(client, tiny_server.model, prompt=ids, logprobs=3)
    by_text = complete(client, tiny_server.model, prompt="once upon", logprobs=3)
    assert by_ids.choices[0].text == by_text.choices[0].text
    found = by_ids.choices[0].logprobs
    assert found == by_text.choices[0].logprobs
    assert len(found.tokens) == 24 and all(value <= 0 for value in found.token_logprobs)
    # Greedy: the token drawn is the likeliest.
    assert all(
        max(top.values()) == value
        for top, value in zip(found.top_logprobs, found.token_logprobs, strict=True)
    )
    echoed = complete(client, tiny_server.model, echo=True)
    assert echoed.choices[0].text == "once upon" + by_text.choices[0].text
    back = http.post("/detokenize", json={"tokens": ids}).json()
    assert back["prompt"] == "once upon"


def test_user_text_never_becomes_control_tokens(http, tiny_server):
    plain = http.post("/tokenize", json={"prompt": "<|im_end|>"}).json()["tokens"]
    assert len(plain) > 1
    body = {"messages": [{"role": "user", "content": "<|im_end|>"}]}
    assert http.post("/apply-template", json=body).json()["prompt"].count("<|im_end|>") >= 1
    ids = http.post("/tokenize", json=body).json()["tokens"]
    empty = http.post("/tokenize", json={"messages": [{"role": "user", "content": ""}]}).json()["tokens"]
    assert len(ids) == len(empty) + len(plain)


def test_prompt_over_context_is_refused_with_numbers(client, tiny_server):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, tiny_server.model, prompt="abc " * 2000, max_tokens=None)
    body = caught.value.body
    assert caught.value.code == "context_length_exceeded" and body["n_prompt_tokens"] > body["n_ctx"]
    assert body["n_ctx"] == client.models.retrieve(tiny_server.model).model_extra["max_model_len"]


def test_token_id_outside_the_vocabulary(client, tiny_server):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, tiny_server.model, prompt=[1, 999_999])
    assert caught.value.param == "prompt[1]" and caught.value.code == "invalid_token_id"
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, tiny_server.model, logit_bias={"999999": 1})
    assert caught.value.param.startswith("logit_bias")


def test_omitted_max_tokens_is_the_rest_of_the_context(client, tiny_server):
    context = client.models.retrieve(tiny_server.model).model_extra["max_model_len"]
    answer = complete(client, tiny_server.model, max_tokens=None)
    assert answer.usage.total_tokens == context and answer.choices[0].finish_reason == "length"


def test_receipt_is_complete(client, tiny_server, http):
    raw = client.chat.completions.with_raw_response.create(model=tiny_server.model, messages=HI, **GREEDY)
    receipt = http.get(f"/v1/receipts/{raw.headers['x-galley-receipt']}").json()
    assert (
        receipt["status"] == "ok"
        and receipt["usage"]["completion_tokens"] == raw.parse().usage.completion_tokens
    )
    assert all(receipt["digests"][name] for name in ("weights", "tokenizer", "template", "engine"))
    times, used = receipt["times"], receipt["resources"]
    assert 0 < times["ttft_s"] <= times["total_s"] and times["decode_s"] > 0 and times["itl_mean_s"] > 0
    assert used["prefill_flop"] > 0 and used["decode_bytes"] > 0 and used["kv_byte_seconds"] > 0
    assert receipt["route"]["rule"] == "fixed" and receipt["route"]["provider"] == "local"
    assert raw.headers["x-galley-served-by"] == f"local:{tiny_server.model}@cpu"


def test_metrics_move(client, tiny_server, http):
    def read(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    before = read("vllm:generation_tokens_total"), read("vllm:prefix_cache_queries_total")
    complete(client, tiny_server.model, max_tokens=5)
    assert read("vllm:generation_tokens_total") == before[0] + 5
    assert read("vllm:prefix_cache_queries_total") > before[1]
    tiny_server.idle()
    assert read("vllm:num_requests_running") == 0 and read("vllm:kv_cache_usage_perc") == 0


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n"]
)
def test_bytes_that_are_no_http_get_the_error_object(tiny_server, data):
    with socket.create_connection(("127.0.0.1", tiny_server.port), timeout=20) as client:
        client.sendall(data)
        said = b""
        while piece := client.recv(4096):
            said += piece
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"application/json" in head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
