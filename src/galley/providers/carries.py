"""What a wire format can carry of a request. What cannot be carried is never dropped: it is refused."""

import json
from typing import Any

from galley.types import Request, StructuredOutputs

__all__ = ["EXTENDED", "call_input", "extended_used", "lacks", "schema_of"]

EXTENDED = ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "include_stop_str_in_output")
"""Sampling parameters beyond OpenAI's own; vLLM knows them by these names."""
MOST_TOP = 5
"""Alternatives beside a token that OpenAI's text completions give."""


def extended_used(request: Request) -> list[str]:
    """Which of EXTENDED differ from their defaults."""
    p = request.params
    used = [
        ("top_k", p.top_k > 0),
        ("min_p", p.min_p > 0),
        ("repetition_penalty", p.repetition_penalty != 1),
        ("min_tokens", p.min_tokens > 0),
        ("ignore_eos", p.ignore_eos),
        ("include_stop_str_in_output", p.include_stop_str_in_output),
    ]
    return [name for name, on in used if on]


def lacks(request: Request, format: str) -> str | None:
    """Why a wire format (``openai``, ``openai-extended``, ``anthropic``) cannot carry a request faithfully,
    or None."""
    p = request.params
    if request.embed is not None and format == "anthropic":
        return "embeddings"
    if p.logprobs is not None:
        if format == "anthropic":
            return "logprobs"
        if format == "openai" and request.messages is None and p.logprobs > MOST_TOP:
            return f"more than {MOST_TOP} logprobs of a text completion"
    if p.logit_bias or p.stop_token_ids:
        return "logit_bias and stop_token_ids name tokens of the local tokenizer"
    if request.prompts is not None and any(not isinstance(prompt, str) for prompt in request.prompts):
        return "the prompt is given as token ids of the local tokenizer"
    if request.echo and format != "anthropic" and request.messages is not None:
        return "echo"
    if request.template_kwargs or not request.add_generation_prompt:
        return "chat template options"
    if request.reasoning_effort is not None or request.thinking_budget is not None:
        return "how much to reason"
    if not p.skip_special_tokens:
        return "skip_special_tokens=false"
    if p.structured_outputs is not None and (why := form_lacks(p.structured_outputs, request, format)):
        return why
    if format != "openai-extended" and (used := extended_used(request)):
        return ", ".join(used)
    return anthropic_lacks(request) if format == "anthropic" else None


def form_lacks(wanted: StructuredOutputs, request: Request, format: str) -> str | None:
    """Why a form of output cannot be asked for; None when it can."""
    if format == "openai-extended":
        return None
    if wanted.regex is not None or wanted.choice is not None or wanted.grammar is not None:
        return "regex, choice and grammar"
    if wanted.whitespace_pattern is not None:
        return "whitespace_pattern"
    if request.messages is None:
        return "a form for a text completion"
    if not wanted.json_object and schema_of(wanted) is None:
        return "a schema that is no object"
    if format == "anthropic" and wanted.json_object:
        return "json_object (Anthropic Messages has schemas only)"
    if format == "anthropic" and not wanted.strict:
        return "a schema that is not strict"
    return None


def schema_of(wanted: StructuredOutputs) -> dict[str, Any] | None:
    """The JSON schema as an object; None where it is none."""
    schema: Any = wanted.json
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError:
            return None
    return schema if isinstance(schema, dict) else None


def anthropic_lacks(request: Request) -> str | None:
    p = request.params
    if request.messages is None:
        return "text completion (Anthropic Messages has chat only)"
    if p.n != 1:
        return "n > 1"
    if p.seed is not None:
        return "seed"
    if p.frequency_penalty or p.presence_penalty:
        return "frequency_penalty and presence_penalty"
    if p.temperature > 1:
        return "temperature above 1"
    for message in request.messages:
        if not request.tools and (message["role"] == "tool" or message.get("tool_calls")):
            return "earlier calls of tools that are no longer offered"
        if message["role"] not in ("system", "user", "assistant", "tool"):
            return "roles beside system, user, assistant and tool"
        if message["role"] == "tool" and not message.get("tool_call_id"):
            return "a tool's result without its tool_call_id"
        for call in message.get("tool_calls") or ():
            if not call.get("id") or call_input(call) is None:
                return "an earlier call without an id, or whose arguments are not a JSON object"
    return None


def call_input(call: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call as an object; None where they are none."""
    try:
        found = json.loads(call["function"]["arguments"] or "{}")
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
