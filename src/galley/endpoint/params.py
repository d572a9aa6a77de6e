"""What the two generation doors have in common: sampling parameters, identity, and the lists of what is
refused and what is merely noted."""

import time
from typing import Any

from galley.endpoint.caching import read_caching
from galley.endpoint.wire import Fields, invalid
from galley.errors import InvalidRequest
from galley.runtime.sampling.params import LIMITS, MAX_BIASES, MAX_STOP_IDS, MAX_STOP_LENGTH, MAX_STOPS
from galley.types import MODEL_CHOOSES, Request, SamplingParams, StructuredOutputs

__all__ = ["CHANGES_ANSWER", "common", "sampling"]

LONGEST_S = 604_800.0
"""A deadline beyond a week is taken for a mistake."""
FLEX = 6
"""Priority of ``service_tier: flex``: behind others, until a minute of waiting has lifted it to them."""
TIERS = {"flex": "flex", "priority": "priority", "fast": "priority"}
"""Service tiers asked for, and what they are served as; every other is ``default``."""

CHANGES_ANSWER = (
    # OpenAI
    "audio",
    "function_call",
    "functions",
    "moderation",
    "prediction",
    "verbosity",
    "web_search_options",
    # vLLM
    "allowed_token_ids",
    "bad_words",
    "chat_template",
    "continue_final_message",
    "documents",
    "logits_processors",
    "mm_processor_kwargs",
    "prompt_embeds",
    "prompt_logprobs",
    "structural_tag",
    "truncate_prompt_tokens",
    "use_beam_search",
    # llama.cpp and ollama
    "cfg_scale",
    "dry_multiplier",
    "grammar",
    "json_schema",
    "mirostat",
    "n_predict",
    "num_ctx",
    "num_predict",
    "options",
    "repeat_last_n",
    "repeat_penalty",
    "samplers",
    "tfs_z",
    "think",
    "typical_p",
    "xtc_probability",
)
"""Would change the answer and are not implemented: given with a meaning, 400 ``unsupported_parameter``."""


def sampling(
    fields: Fields,
    *,
    logprobs: int | None,
    structure: StructuredOutputs | None = None,
    least: int = 1,
) -> SamplingParams:
    """Sampling parameters of either door, in OpenAI's ranges. Omitted ``max_tokens`` is the rest of the
    context on both doors (OpenAI's 16 for completions is a hidden cap); ``least`` is the fewest that may be
    asked for."""

    def whole(name: str, limits: str = "") -> int | None:
        low, high = LIMITS[limits or name]
        return fields.integer(name, max(int(low), least) if limits else int(low), int(high))

    older = whole("max_tokens", "max_tokens")
    newer = whole("max_completion_tokens", "max_tokens")
    if older is not None and newer is not None and older != newer:
        raise invalid(
            f"'max_tokens' ({older}) and 'max_completion_tokens' ({newer}) disagree; give one.",
            "max_completion_tokens",
            "invalid_value",
        )
    most = newer if newer is not None else older
    fewest = whole("min_tokens") or 0
    if most is not None and fewest > most:
        raise invalid(
            f"'min_tokens' ({fewest}) is above 'max_tokens' ({most}).", "min_tokens", "invalid_value"
        )
    given: dict[str, Any] = {
        "n": whole("n"),
        "temperature": fields.number("temperature", *LIMITS["temperature"]),
        "top_p": fields.number("top_p", *LIMITS["top_p"]),
        "top_k": whole("top_k"),
        "min_p": fields.number("min_p", *LIMITS["min_p"]),
        "repetition_penalty": fields.number("repetition_penalty", *LIMITS["repetition_penalty"]),
        "frequency_penalty": fields.number("frequency_penalty", *LIMITS["frequency_penalty"]),
        "presence_penalty": fields.number("presence_penalty", *LIMITS["presence_penalty"]),
        "logit_bias": read_bias(fields),
        "seed": whole("seed"),
        "stop": read_stops(fields),
        "stop_token_ids": fields.integers("stop_token_ids", MAX_STOP_IDS),
        "max_tokens": most,
        "min_tokens": fewest,
        "logprobs": logprobs,
        "include_stop_str_in_output": fields.boolean("include_stop_str_in_output"),
        "ignore_eos": fields.boolean("ignore_eos"),
        "skip_special_tokens": fields.boolean("skip_special_tokens", True),
        "structured_outputs": structure,
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def read_stops(fields: Fields) -> list[str] | None:
    """``stop``: a string or up to 16 non-empty strings of up to 1,024 characters."""
    value = fields.raw("stop")
    if value is None:
        return None
    if isinstance(value, str):
        stops = [fields.checked(value, "stop", MAX_STOP_LENGTH)]
    elif isinstance(value, list):
        stops = [
            fields.checked(item, f"stop[{i}]", MAX_STOP_LENGTH)
            for i, item in enumerate(fields.array("stop", MAX_STOPS) or ())
        ]
    else:
        raise fields.wrong("stop", "a string or an array of strings", value)
    if not all(stops):
        path = "stop" if isinstance(value, str) else f"stop[{stops.index('')}]"
        raise invalid("A stop string must not be empty.", path, "empty_string")
    return stops or None


def read_bias(fields: Fields) -> dict[int, float] | None:
    """``logit_bias``: token id (a decimal string, as JSON has it) to -100..100."""
    inner = fields.object("logit_bias")
    if inner is None or not inner.body:
        return None
    if len(inner.body) > MAX_BIASES:
        message = f"'logit_bias' has {len(inner.body)} entries; at most {MAX_BIASES} are allowed."
        raise invalid(message, "logit_bias", "array_above_max_length")
    found: dict[int, float] = {}
    for key in inner.body:
        if not (key.isascii() and key.isdigit()):
            message = f"Invalid key in 'logit_bias': {key[:64]!r} is no token id."
            raise invalid(message, "logit_bias", "invalid_value")
        if len(key.lstrip("0")) > 9:  # more digits than any vocabulary has ids, before they are read as one
            message = f"Invalid key in 'logit_bias': no vocabulary reaches {key[:64]!r}."
            raise invalid(message, "logit_bias", "invalid_value")
        value = inner.number(key, -100, 100)
        if value is None:
            raise inner.wrong(key, "a number", None)
        if int(key) in found:
            raise invalid(f"Token {int(key)} appears twice in 'logit_bias'.", "logit_bias", "invalid_value")
        found[int(key)] = value
    return found


def read_metadata(fields: Fields) -> dict[str, str]:
    """``metadata``: up to 16 pairs of strings, keys up to 64 and values up to 512 characters."""
    inner = fields.object("metadata")
    if inner is None:
        return {}
    if len(inner.body) > 16:
        message = f"'metadata' has {len(inner.body)} pairs; at most 16 are allowed."
        raise invalid(message, "metadata", "object_above_max_properties")
    found: dict[str, str] = {}
    for key in inner.body:
        if len(key) > 64:
            message = "A key of 'metadata' is longer than 64 characters."
            raise invalid(message, "metadata", "string_above_max_length")
        value = inner.text(key, 512)
        if value is None:
            raise inner.wrong(key, "a string", None)
        found[key] = value
    return found


def read_stream(fields: Fields) -> tuple[bool, bool]:
    """``stream`` and ``stream_options.include_usage``; unread options are listed by the caller."""
    stream = fields.boolean("stream")
    options = fields.object("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise InvalidRequest(
            "'stream_options' is only allowed when 'stream' is true.", param="stream_options"
        )
    include = options.boolean("include_usage")
    fields.body = {**fields.body, **{f"stream_options.{name}": True for name in options.rest_names()}}
    return stream, include


def common(fields: Fields, *, request_id: str, api: str, capture: bool, key: str | None) -> dict[str, Any]:
    """The fields of a Request that both doors fill alike, by name."""
    fields.refuse(CHANGES_ANSWER)
    modalities = fields.array("modalities")
    if modalities not in (None, ["text"]):
        raise unsupported("modalities", "['text']")
    tier = fields.choice("service_tier", ("auto", "default", "flex", "scale", "priority", "fast"))
    # The tier is echoed as it was used: ``scale`` is not to be had here, runs as default, and that is said.
    used = TIERS.get(tier or "", "default")
    priority = fields.integer("priority", -(2**31), 2**31 - 1)
    if priority is None:
        priority = FLEX if used == "flex" else 0
    noted = ["service_tier"] if tier == "scale" else []
    refused_store = fields.raw("store") is False
    caching = read_caching(fields)
    noted += caching.pop("ignored")
    user = fields.text("user", 512)
    salt = fields.text("cache_salt", 512)
    identifier = fields.text("safety_identifier", 512)
    if identifier is not None and user is not None and user != identifier:
        noted.append("user")
    return {
        "id": request_id,
        "api": api,
        "created": time.time(),
        "user": identifier if identifier is not None else user,
        "left_open": [name for name in MODEL_CHOOSES if fields.raw(name) is None],
        "key": key,
        "metadata": read_metadata(fields),
        "priority": priority,
        "service_tier": used,
        "max_queue_s": fields.number("max_queue_s", 0.001, LONGEST_S),
        "max_total_s": fields.number("max_total_s", 0.001, LONGEST_S),
        "cache_salt": salt,
        **caching,
        "capture": capture and not refused_store,
        "ignored_params": noted,
    }


def unsupported(name: str, only: str) -> InvalidRequest:
    """A parameter of which one value alone is supported."""
    return InvalidRequest(
        f"{name!r} other than {only} is not supported.", param=name, code="unsupported_parameter"
    )


def stub(body: dict[str, Any], *, request_id: str, api: str, key: str | None) -> Request:
    """What can be said of a request that did not pass its checks, for its receipt."""
    model = body.get("model")
    return Request(
        id=request_id,
        api=api,
        model=model[:200] if isinstance(model, str) else "",
        params=SamplingParams(),
        created=time.time(),
        stream=body.get("stream") is True,
        key=key,
    )
