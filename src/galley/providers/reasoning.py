"""How much a request wants a model to reason, put into what its template and the engine can do."""

import re
from typing import Any

import msgspec

from galley.errors import InvalidRequest, UnsupportedParameter
from galley.runtime.text.formats import ChatFormat
from galley.types import Request

__all__ = ["BUDGETS", "EFFORTS", "Reasoning", "reasoning_of"]

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""How hard a model is asked to reason."""
BUDGETS = {"minimal": 256, "low": 1024, "medium": 4096, "high": 16_384}
"""Most reasoning tokens by effort; above ``high`` there is no bound but the context."""
LEVELS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
"""What templates with levels of their own know (gpt-oss)."""
SWITCHES = ("enable_thinking", "thinking")
"""Variables of templates that switch reasoning on and off, by family: Qwen and others; DeepSeek, Granite."""


class Reasoning(msgspec.Struct, frozen=True, kw_only=True):
    """What comes of it.

    Attributes:
        kwargs: for the template. budget: most reasoning tokens, or None.
        told: what was made of the wish, in words by parameter.
    """

    kwargs: dict[str, Any] = {}
    budget: int | None = None
    told: dict[str, str] = {}


def reasoning_of(record: ChatFormat, source: str, request: Request) -> Reasoning:
    """Read the wish. ``source`` is the template's text.

    Raises UnsupportedParameter when the model does not reason, or cannot be kept from it; InvalidRequest when
    the template variable is given too.
    """
    effort, budget = request.reasoning_effort, request.thinking_budget
    if effort is None and budget is None:
        return Reasoning()
    param = "thinking_token_budget" if effort is None else "reasoning_effort"
    off = effort == "none" or budget == 0
    harmony = record.style == "harmony"
    if record.think is None and not harmony:
        if off:
            return Reasoning()  # there is nothing to switch off
        raise UnsupportedParameter(f"{param!r}: this model does not reason.", param=param)
    kwargs: dict[str, Any] = {}
    switch = next((name for name in SWITCHES if known(source, name)), None)
    if switch is not None:
        kwargs[switch] = not off
    elif known(source, "reasoning_effort") and effort is not None:
        if off:
            raise UnsupportedParameter(
                f"{param!r}: this model cannot be kept from reasoning.", param=param, code="unsupported_value"
            )
        kwargs["reasoning_effort"] = LEVELS[effort]
    clash = next((name for name in kwargs if name in request.template_kwargs), None)
    if clash is not None:
        raise InvalidRequest(f"{param!r} and 'chat_template_kwargs.{clash}' exclude each other.", param=param)
    if harmony:
        if budget is not None:
            raise UnsupportedParameter(
                "'thinking_token_budget' cannot be kept with this model; use reasoning_effort.",
                param="thinking_token_budget",
            )
        most = None
    else:
        bounds = [each for each in (budget, BUDGETS.get(effort or "")) if each is not None]
        most = 0 if off else min(bounds, default=None)
    parts = [f"{name}={str(value).lower()}" for name, value in kwargs.items()]
    parts += [] if most is None else [f"at most {most} reasoning tokens"]
    return Reasoning(kwargs=kwargs, budget=most, told={param: "read as " + ", ".join(parts)} if parts else {})


def known(source: str, name: str) -> bool:
    """Whether a template asks for a variable: it is named within a tag or an expression."""
    return re.search(r"\{[%{][^%}]*\b" + name + r"\b[^%}]*[%}]\}", source) is not None
