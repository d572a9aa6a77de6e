"""Ranges of SamplingParams: every value is accepted as it is or refused with its name, never adjusted."""

import math
from collections.abc import Sequence, Sized
from typing import Any

from galley.errors import InvalidRequest
from galley.types import SamplingParams, StructuredOutputs

__all__ = ["LIMITS", "MAX_BIASES", "MAX_STOPS", "MAX_STOP_IDS", "MAX_STOP_LENGTH", "check", "check_guided"]

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
"""Characters of one stop string; bounds the time to build its matcher."""
MAX_STOP_IDS = 128
MAX_BIASES = 1024

_INT32 = 2**31 - 1

LIMITS: dict[str, tuple[float, float]] = {
    "n": (1, 16),
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, _INT32),
    "min_p": (0, 1),
    # Zero and below have no meaning as a divisor.
    "repetition_penalty": (0.01, 10),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    # int64 as in the specification, and uint64 as others have it: both name one of 2**64 noise keys.
    "seed": (-(2**63), 2**64 - 1),
    "max_tokens": (0, _INT32),
    "min_tokens": (0, _INT32),
    "logprobs": (0, 20),
    "logit_bias": (-100, 100),
}
"""Least and most of every number, both allowed; the one table for HTTP, the command line and Python."""


def _refuse(param: str, code: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid '{param}': {message}", param=param, code=code)


def _integer(param: str, value: Any, least: float, most: float) -> None:
    # bool is an int to Python, but `n: true` is a mistake.
    if not isinstance(value, int) or isinstance(value, bool):
        raise _refuse(param, "invalid_type", f"expected an integer, got {type(value).__name__}.")
    if value < least:
        raise _refuse(param, "integer_below_min_value", f"expected a value >= {least}, got {value}.")
    if value > most:
        raise _refuse(param, "integer_above_max_value", f"expected a value <= {most}, got {value}.")


def _decimal(param: str, value: Any, least: float, most: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _refuse(param, "invalid_type", f"expected a number, got {type(value).__name__}.")
    # Compared before any conversion: an int may be too large for a float.
    if isinstance(value, float) and not math.isfinite(value):
        raise _refuse(param, "invalid_value", f"expected a finite number, got {value}.")
    if value < least:
        raise _refuse(param, "decimal_below_min_value", f"expected a value >= {least:g}, got {value}.")
    if value > most:
        raise _refuse(param, "decimal_above_max_value", f"expected a value <= {most:g}, got {value}.")


def _flag(param: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise _refuse(param, "invalid_type", f"expected a boolean, got {type(value).__name__}.")


def _most(param: str, value: Any, most: int, kind: type[Sized]) -> None:
    if value is None:
        return
    if not isinstance(value, kind):
        raise _refuse(param, "invalid_type", f"expected a {kind.__name__}, got {type(value).__name__}.")
    if len(value) > most:
        raise _refuse(param, "array_above_max_length", f"expected at most {most} entries, got {len(value)}.")


def _stops(stop: Any) -> None:
    if stop is None:
        return
    if not isinstance(stop, str | list | tuple):
        raise _refuse("stop", "invalid_type", f"expected a string or a list, got {type(stop).__name__}.")
    strings: Sequence[Any] = [stop] if isinstance(stop, str) else stop
    if len(strings) > MAX_STOPS:
        raise _refuse(
            "stop", "array_above_max_length", f"expected at most {MAX_STOPS} strings, got {len(strings)}."
        )
    for index, text in enumerate(strings):
        param = "stop" if isinstance(stop, str) else f"stop[{index}]"
        if not isinstance(text, str):
            raise _refuse(param, "invalid_type", f"expected a string, got {type(text).__name__}.")
        if not text:
            raise _refuse(param, "invalid_value", "an empty stop string would end every answer at once.")
        if len(text) > MAX_STOP_LENGTH:
            raise _refuse(
                param,
                "string_above_max_length",
                f"expected at most {MAX_STOP_LENGTH} characters, got {len(text)}.",
            )
        if "\x00" in text or any("\ud800" <= char <= "\udfff" for char in text):
            raise _refuse(param, "invalid_value", "NUL and lone surrogates are not text.")


def _structured(wanted: StructuredOutputs) -> None:
    param = "structured_outputs"
    given = [name for name in ("json", "regex", "choice", "grammar") if getattr(wanted, name) is not None]
    given += ["json_object"] if wanted.json_object else []
    if len(given) != 1:
        raise _refuse(param, "invalid_value", f"expected exactly one form, got {', '.join(given) or 'none'}.")
    if wanted.choice is not None and (not wanted.choice or not all(wanted.choice)):
        raise _refuse(f"{param}.choice", "invalid_value", "expected texts to choose from.")


def check_guided(params: SamplingParams) -> None:
    """Refuse what an output that is kept to a grammar cannot have: it ends where the grammar ends.

    Raises InvalidRequest for ``ignore_eos`` and ``min_tokens``.
    """
    if params.ignore_eos:
        raise _refuse("ignore_eos", "invalid_value", "a structured output ends where its grammar ends.")
    if params.min_tokens:
        raise _refuse("min_tokens", "invalid_value", "a structured output ends where its grammar ends.")


def check(params: SamplingParams, vocab: int) -> None:
    """Refuse what cannot be honoured.

    Args:
        vocab: number of ids of the model; ids in ``logit_bias`` and ``stop_token_ids`` lie below it.

    Raises InvalidRequest with ``param`` and one of the codes invalid_type, invalid_value,
    {integer,decimal}_{below_min,above_max}_value, array_above_max_length, string_above_max_length.
    """
    for name in ("n", "top_k", "min_tokens"):
        _integer(name, getattr(params, name), *LIMITS[name])
    for name in ("seed", "max_tokens", "logprobs"):
        if getattr(params, name) is not None:
            _integer(name, getattr(params, name), *LIMITS[name])
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
    ):
        _decimal(name, getattr(params, name), *LIMITS[name])
    _most("logit_bias", params.logit_bias, MAX_BIASES, dict)
    for token, value in (params.logit_bias or {}).items():
        where = f"logit_bias.{token}"
        _integer(where, token, 0, vocab - 1)
        _decimal(where, value, *LIMITS["logit_bias"])
    _stops(params.stop)
    _most("stop_token_ids", params.stop_token_ids, MAX_STOP_IDS, list)
    for index, token in enumerate(params.stop_token_ids or ()):
        _integer(f"stop_token_ids[{index}]", token, 0, vocab - 1)
    for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
        _flag(name, getattr(params, name))
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise _refuse(
            "min_tokens",
            "integer_above_max_value",
            f"{params.min_tokens} is more than max_tokens, which is {params.max_tokens}.",
        )
    if params.structured_outputs is not None:
        _structured(params.structured_outputs)
        check_guided(params)
