"""Every kind of bad input: the right status, code and param, four keys, and a receipt."""

import json

import pytest

HI = [{"role": "user", "content": "hi"}]

CHAT_CASES = [
    ({"model": None}, "model", "missing_required_parameter"),
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "empty_array"),
    ({"messages": "hi"}, "messages", "invalid_type"),
    ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [*HI, {"role": "wizard", "content": "x"}]}, "messages[1].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "invalid_type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    ({"messages": [{"role": "user", "content": "a\x00b"}]}, "messages[0].content", "invalid_value"),
    (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "messages[0].tool_calls[0].function",
        "missing_required_parameter",
    ),
    ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
    ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
    ({"max_tokens": "5"}, "max_tokens", "invalid_type"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
    ({"max_tokens": True}, "max_tokens", "invalid_type"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens", "invalid_value"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "invalid_value"),
    ({"n": 0}, "n", "integer_below_min_value"),
    ({"n": 17}, "n", "integer_above_max_value"),
    ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
    ({"temperature": -0.1}, "temperature", "decimal_below_min_value"),
    ({"temperature": "hot"}, "temperature", "invalid_type"),
    ({"top_p": 1.01}, "top_p", "decimal_above_max_value"),
    ({"top_k": -2}, "top_k", "integer_below_min_value"),
    ({"min_p": 2}, "min_p", "decimal_above_max_value"),
    ({"frequency_penalty": 3}, "frequency_penalty", "decimal_above_max_value"),
    ({"stop": ["x"] * 1000}, "stop", "array_above_max_length"),
    ({"stop": ["a", ""]}, "stop[1]", "empty_string"),
    ({"stop": ["a", 3]}, "stop[1]", "invalid_type"),
    ({"stop": {}}, "stop", "invalid_type"),
    ({"stop": "a\x00"}, "stop", "invalid_value"),
    ({"stop": "x" * 2000}, "stop", "string_above_max_length"),
    ({"seed": 2**64}, "seed", "integer_above_max_value"),
    ({"seed": -(2**63) - 1}, "seed", "integer_below_min_value"),
    ({"logit_bias": {"five": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"0" * 5 + "99999999999": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"256": 1}}, "logit_bias.256", "integer_above_max_value"),
    ({"repetition_penalty": 11}, "repetition_penalty", "decimal_above_max_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "decimal_above_max_value"),
    ({"logit_bias": {"5": "x"}}, "logit_bias.5", "invalid_type"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
    ({"logprobs": 3}, "logprobs", "invalid_type"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"response_format": {"type": "poem"}}, "response_format.type", "invalid_value"),
    ({"response_format": {"type": "poem"}}, "response_format.type", "invalid_value"),
    ({"functions": [{}]}, "functions", "unsupported_parameter"),
    ({"function_call": "auto"}, "function_call", "unsupported_parameter"),
    ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
    ({"prediction": {"type": "content"}}, "prediction", "unsupported_parameter"),
    ({"web_search_options": {"a": 1}}, "web_search_options", "unsupported_parameter"),
    ({"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
    ({"thinking_token_budget": -1}, "thinking_token_budget", "integer_below_min_value"),
    ({"continue_final_message": True}, "continue_final_message", "unsupported_parameter"),
    ({"chat_template": "{{ x }}"}, "chat_template", "unsupported_parameter"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "invalid_value"),
    ({"metadata": {"k": 1}}, "metadata.k", "invalid_type"),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "object_above_max_properties"),
    ({"metadata": {"k": "x" * 513}}, "metadata.k", "string_above_max_length"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", "invalid_type"),
    ({"service_tier": "gold"}, "service_tier", "invalid_value"),
    ({"max_queue_s": 0}, "max_queue_s", "decimal_below_min_value"),
    ({"max_queue_s": "5"}, "max_queue_s", "invalid_type"),
    ({"max_total_s": -1.5}, "max_total_s", "decimal_below_min_value"),
    ({"max_total_s": 1e9}, "max_total_s", "decimal_above_max_value"),
    ({"prompt_logprobs": 0}, "prompt_logprobs", "unsupported_parameter"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "unsupported_parameter"),
    ({"use_beam_search": 0}, "use_beam_search", "unsupported_parameter"),
    ({"functions": False}, "functions", "unsupported_parameter"),
    ({"web_search_options": {}}, "web_search_options", "unsupported_parameter"),
    ({"chat_template_kwargs": {"a": ["\x00"]}}, "chat_template_kwargs.a[0]", "invalid_value"),
    ({"chat_template_kwargs": {"a\x00": 1}}, "chat_template_kwargs", "invalid_value"),
    ({"metadata": {"a\x00": "x"}}, "metadata", "invalid_value"),
    ({"fro\x00b": 1}, None, "invalid_value"),
    ({"metadata": {"k" * 65: "x"}}, "metadata", "string_above_max_length"),
]


@pytest.mark.parametrize(("fields", "param", "code"), CHAT_CASES, ids=lambda v: str(v)[:40])
async def test_chat_refuses_and_leaves_a_receipt(desk, fields, param, code):
    response = await desk.chat(**fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"].startswith("req_")
    receipt = await desk.receipt(response)
    assert receipt["status"] == "error" and receipt["error"]["code"] == code
    assert receipt["request_id"] == response.headers["x-request-id"]


COMPLETION_CASES = [
    ({"prompt": None}, "prompt", "missing_required_parameter"),
    ({"prompt": []}, "prompt", "empty_array"),
    ({"prompt": {}}, "prompt", "invalid_type"),
    ({"prompt": ["a", 3]}, "prompt[1]", "invalid_type"),
    ({"prompt": [3, "a"]}, "prompt[1]", "invalid_type"),
    ({"prompt": [[1], [True]]}, "prompt[1][0]", "invalid_type"),
    ({"prompt": ["ok", "\x00"]}, "prompt[1]", "invalid_value"),
    ({"prompt": ["x"] * 129}, "prompt", "array_above_max_length"),
    ({"prompt": ["x"] * 65, "n": 2}, "prompt", "array_above_max_length"),
    ({"suffix": "end"}, "suffix", "unsupported_parameter"),
    ({"best_of": 3}, "best_of", "unsupported_parameter"),
    ({"logprobs": 21}, "logprobs", "integer_above_max_value"),
    ({"logprobs": True}, "logprobs", "invalid_type"),
    ({"max_tokens": -5}, "max_tokens", "integer_below_min_value"),
]


@pytest.mark.parametrize(("fields", "param", "code"), COMPLETION_CASES, ids=lambda v: str(v)[:40])
async def test_completions_refuse(desk, fields, param, code):
    response = await desk.complete(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)


BODIES = [
    (b"", None, "invalid_json"),
    (b"{", None, "invalid_json"),
    (b"not json", None, "invalid_json"),
    (b"[1]", None, "invalid_type"),
    (b'{"model": NaN}', None, "invalid_json"),
    (b'{"model": "\xff"}', None, "invalid_json"),
    (b"[" * 50_000, None, "invalid_json"),
    (b'{"a":' * 50_000, None, "invalid_json"),
    (
        b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}',
        "messages[0].content",
        "invalid_value",
    ),
    (b'{"model":"m","prompt":"ok","stop":["a","\\udc00\\ud800"]}', "stop[1]", "invalid_value"),
    (b'{"\\ud800": 1}', None, "invalid_value"),
    (b'{"model":"m","max_tokens":' + b"9" * 5000 + b"}", "max_tokens", "integer_above_max_value"),
    (b'{"model":"m","stop":[{"a":-' + b"9" * 5000 + b"}]}", "stop[0].a", "integer_below_min_value"),
    (b'{"model":"m","n":1,"n":2}', "n", "duplicate_key"),
    (b'{"model":"m","metadata":{"a":"x","\\u0061":"y"}}', "a", "duplicate_key"),
]


@pytest.mark.parametrize(("body", "param", "code"), BODIES, ids=lambda v: str(v)[:30])
async def test_bodies_that_are_no_request(desk, body, param, code):
    response = await desk.http.post("/v1/chat/completions", content=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code)
    assert (await desk.receipt(response))["status"] == "error"


async def test_oversize_body_is_refused(open_desk):
    desk = open_desk(max_body=1000)
    response = await desk.complete(prompt="x" * 1001)
    assert response.status_code == 400 and response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["code"] == "request_too_large"
    assert (await desk.complete(prompt="x" * 50)).status_code == 200


async def test_error_messages_cannot_be_blown_up(desk):
    response = await desk.chat(model="x" * 100_000)
    assert response.status_code == 400 and len(response.content) < 3000
    long = await desk.http.post("/v1/completions", json={"model": "fake-1b", "prompt": "a", "y" * 99_999: 1})
    assert long.status_code == 200 and len(long.headers["x-galley-ignored-params"]) < 100


async def test_unknown_model_names_the_nearest(desk):
    response = await desk.chat(model="fake-2b")
    error = response.json()["error"]
    assert (
        response.status_code == 404 and error["code"] == "model_not_found" and "fake-1b" in error["message"]
    )
    receipt = await desk.receipt(response)
    assert receipt["route"] is None and receipt["model"] == "fake-2b" and receipt["status"] == "error"


async def test_context_overflow_has_the_three_numbers(desk):
    response = await desk.complete(prompt="x" * 90, max_tokens=20)
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "context_length_exceeded"
    assert (error["n_prompt_tokens"], error["n_ctx"], error["max_tokens"]) == (90, 100, 20)
    assert (await desk.receipt(response))["error"]["n_ctx"] == 100


async def test_unknown_fields_are_listed_never_swallowed(desk):
    body = {
        "model": "fake-1b",
        "messages": [{"role": "user", "content": "hi", "name": "bob"}],
        "frobnicate": 1,
        "evil\r\nname": 2,
        "harmless": None,
        "stream": True,
        "stream_options": {"include_usage": False, "continuous_usage_stats": True},
        "store": True,
    }
    response = await desk.http.post("/v1/chat/completions", content=json.dumps(body))
    listed = response.headers["x-galley-ignored-params"].split(", ")
    assert set(listed) == {
        "messages[0].name",
        "frobnicate",
        "evil??name",
        "stream_options.continuous_usage_stats",
    }
    assert "frobnicate" in (await desk.receipt(response))["ignored_params"]


async def test_developer_role_is_read_as_system_and_says_so(desk):
    response = await desk.chat(messages=[{"role": "developer", "content": "x"}])
    assert "developer read as system" in response.headers["x-galley-clamped"]
    assert desk.provider.seen[-1].messages[0]["role"] == "system"
    assert "messages[0].role" in (await desk.receipt(response))["clamped"]


async def test_paths_and_methods_that_are_not_there(desk):
    lost = await desk.http.get("/v1/nothing")
    assert lost.status_code == 404 and set(lost.json()["error"]) == {"message", "type", "param", "code"}
    wrong = await desk.http.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"


async def test_values_that_ask_for_nothing_are_taken(desk):
    response = await desk.chat(
        functions=[], use_beam_search=False, think=False, repeat_penalty=1.0, mirostat=0
    )
    assert response.status_code == 200 and "x-galley-ignored-params" not in response.headers


async def test_backslashes_before_u0000_are_text(desk):
    body = rb'{"model":"fake-1b","prompt":"a\\u0000"}'
    assert (await desk.http.post("/v1/completions", content=body)).status_code == 200


async def test_second_name_of_the_user_is_not_dropped_unseen(desk):
    response = await desk.chat(user="old", safety_identifier="new")
    assert response.headers["x-galley-ignored-params"] == "user"
    receipt = await desk.receipt(response)
    assert (receipt["user"], receipt["ignored_params"]) == ("new", ["user"])
    assert "x-galley-ignored-params" not in (await desk.chat(user="a", safety_identifier="a")).headers


async def test_encoded_body_is_told_by_its_header(desk):
    response = await desk.http.post(
        "/v1/completions", content=b"\x1f\x8b\x00", headers={"content-encoding": "gzip"}
    )
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unsupported_content_encoding")
    assert "'gzip'" in error["message"]
    assert (await desk.receipt(response))["error"]["code"] == error["code"]


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/chat/completions/"), ("GET", "/v1/models/"), ("GET", "/health/")]
)
async def test_path_with_a_slash_too_many_is_an_error_object(desk, method, path):
    response = await desk.http.request(method, path)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (404, "not_found")
    assert response.headers["x-galley-hint"] == f"try {path[:-1]}"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_request_turned_away_at_the_door_leaves_a_receipt(open_desk, path):
    desk = open_desk(keys=["sk-right"])
    for headers, status in (({}, 401), ({"host": "evil.example"}, 403)):
        response = await desk.http.post(path, json={}, headers=headers)
        assert response.status_code == status
        receipt = desk.store.get(response.headers["x-galley-receipt"])
        assert receipt is not None and receipt.error is not None
        assert (receipt.status, receipt.error["status"]) == ("error", status)
        assert receipt.request_id == response.headers["x-request-id"]
    assert "x-galley-receipt" not in (await desk.http.get("/v1/models")).headers
