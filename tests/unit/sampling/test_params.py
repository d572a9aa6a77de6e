"""Every range of SamplingParams, both borders."""

from typing import Any

import pytest

from galley.errors import InvalidRequest
from galley.runtime.sampling.params import check
from galley.types import SamplingParams

NAN, INF = float("nan"), float("inf")

GOOD: list[dict[str, Any]] = [
    {},
    {"n": 1},
    {"n": 16},
    {"temperature": 0},
    {"temperature": 2.0},
    {"top_p": 0.0},
    {"top_p": 1},
    {"top_k": -1},
    {"top_k": 10**6},
    {"min_p": 1.0},
    {"repetition_penalty": 0.5},
    {"frequency_penalty": -2.0, "presence_penalty": 2.0},
    {"logit_bias": {0: -100, 99: 100.0}},
    {"seed": -(2**63)},
    {"seed": 2**64 - 1},
    {"stop": "x"},
    {"stop": ["x"] * 16},
    {"stop_token_ids": [0, 99]},
    {"max_tokens": 5, "min_tokens": 5},
    {"min_tokens": 7},
    {"logprobs": 0},
    {"logprobs": 20},
]

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"n": 0}, "n", "integer_below_min_value"),
    ({"n": 17}, "n", "integer_above_max_value"),
    ({"n": True}, "n", "invalid_type"),
    ({"n": 1.0}, "n", "invalid_type"),
    ({"temperature": -0.01}, "temperature", "decimal_below_min_value"),
    ({"temperature": 2.01}, "temperature", "decimal_above_max_value"),
    ({"temperature": NAN}, "temperature", "invalid_value"),
    ({"temperature": INF}, "temperature", "invalid_value"),
    ({"temperature": 10**400}, "temperature", "decimal_above_max_value"),
    ({"temperature": "1"}, "temperature", "invalid_type"),
    ({"top_p": -0.1}, "top_p", "decimal_below_min_value"),
    ({"top_p": 1.1}, "top_p", "decimal_above_max_value"),
    ({"top_k": -2}, "top_k", "integer_below_min_value"),
    ({"top_k": 2**31}, "top_k", "integer_above_max_value"),
    ({"min_p": -0.1}, "min_p", "decimal_below_min_value"),
    ({"min_p": 1.5}, "min_p", "decimal_above_max_value"),
    ({"repetition_penalty": 0.0}, "repetition_penalty", "decimal_below_min_value"),
    ({"repetition_penalty": -1.0}, "repetition_penalty", "decimal_below_min_value"),
    ({"repetition_penalty": 10.5}, "repetition_penalty", "decimal_above_max_value"),
    ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias", "array_above_max_length"),
    ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids", "array_above_max_length"),
    ({"stop": "a\x00"}, "stop", "invalid_value"),
    ({"stop": "x" * 1025}, "stop", "string_above_max_length"),
    ({"repetition_penalty": NAN}, "repetition_penalty", "invalid_value"),
    ({"frequency_penalty": 2.1}, "frequency_penalty", "decimal_above_max_value"),
    ({"presence_penalty": -2.1}, "presence_penalty", "decimal_below_min_value"),
    ({"logit_bias": {100: 1.0}}, "logit_bias.100", "integer_above_max_value"),
    ({"logit_bias": {-1: 1.0}}, "logit_bias.-1", "integer_below_min_value"),
    ({"logit_bias": {3: 101.0}}, "logit_bias.3", "decimal_above_max_value"),
    ({"logit_bias": {3: NAN}}, "logit_bias.3", "invalid_value"),
    ({"seed": 2**64}, "seed", "integer_above_max_value"),
    ({"seed": -(2**63) - 1}, "seed", "integer_below_min_value"),
    ({"seed": 1.5}, "seed", "invalid_type"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
    ({"stop": ["a"] * 17}, "stop", "array_above_max_length"),
    ({"stop": ["a"] * 1000}, "stop", "array_above_max_length"),
    ({"stop": [1]}, "stop[0]", "invalid_type"),
    ({"stop": 1}, "stop", "invalid_type"),
    ({"stop": "x" * 5000}, "stop", "string_above_max_length"),
    ({"stop": "\ud800"}, "stop", "invalid_value"),
    ({"stop_token_ids": [100]}, "stop_token_ids[0]", "integer_above_max_value"),
    ({"max_tokens": -1}, "max_tokens", "integer_below_min_value"),
    ({"min_tokens": -1}, "min_tokens", "integer_below_min_value"),
    ({"max_tokens": 4, "min_tokens": 5}, "min_tokens", "integer_above_max_value"),
    ({"logprobs": -1}, "logprobs", "integer_below_min_value"),
    ({"logprobs": 21}, "logprobs", "integer_above_max_value"),
    ({"ignore_eos": 1}, "ignore_eos", "invalid_type"),
]


@pytest.mark.parametrize("fields", GOOD, ids=str)
def test_in_range_is_accepted(fields: dict[str, Any]) -> None:
    check(SamplingParams(**fields), 100)


@pytest.mark.parametrize(("fields", "param", "code"), BAD, ids=lambda value: str(value)[:40])
def test_out_of_range_is_refused_by_name(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(SamplingParams(**fields), 100)
    assert (caught.value.param, caught.value.code, caught.value.status) == (param, code, 400)
