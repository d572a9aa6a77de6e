"""The OpenAI wire format, as spoken by clouds, vLLM, llama-server and Ollama."""

import math
from array import array
from typing import Any

import msgspec

from galley.errors import Upstream
from galley.providers.dialect import Heard
from galley.providers.refusal import reason
from galley.types import Delta, Request, Usage

__all__ = ["OpenAIDialect"]

EXTENDED = ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "include_stop_str_in_output")
"""Sampling parameters beyond OpenAI's own; vLLM knows them by these names."""


class OpenAIDialect:
    """Args:
    provider: for messages.
    extended: the server also takes EXTENDED (vLLM). Otherwise a request that uses one is not eligible.
    newer_limit: send ``max_completion_tokens``, which OpenAI's newer models insist on.
    """

    name = "openai"

    def __init__(self, provider: str, *, extended: bool = False, newer_limit: bool = False) -> None:
        self._provider = provider
        self._extended = extended
        self._limit = "max_completion_tokens" if newer_limit else "max_tokens"

    def lacks(self, request: Request) -> str | None:
        """See ``Dialect.lacks``."""
        return lacks(request, "openai-extended" if self._extended else "openai")

    def headers(self, key: str | None) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"} if key else {}

    def encode(self, request: Request, model: str) -> tuple[str, bytes]:
        """See ``Dialect.encode``. Usage is always asked for; the endpoint shows it only to who wants it."""
        if request.embed is not None:
            return "/embeddings", embeddings_body(request, model)
        p = request.params
        body: dict[str, Any] = {"model": model, "temperature": p.temperature, "top_p": p.top_p}
        if p.n != 1:
            body["n"] = p.n
        if p.max_tokens is not None:
            body[self._limit] = p.max_tokens
        if p.frequency_penalty:
            body["frequency_penalty"] = p.frequency_penalty
        if p.presence_penalty:
            body["presence_penalty"] = p.presence_penalty
        if p.seed is not None:
            body["seed"] = p.seed if p.seed < 2**63 else p.seed - 2**64
        if p.stops:
            body["stop"] = p.stops
        for name in extended_used(request):
            body[name] = getattr(p, name)
        if request.stream:
            body["stream"] = True
            body["stream_options"] = {"include_usage": True}
        if request.messages is not None:
            body["messages"] = request.messages
            return "/chat/completions", msgspec.json.encode(body)
        prompts = request.prompts or []
        body["prompt"] = prompts[0] if len(prompts) == 1 else prompts
        return "/completions", msgspec.json.encode(body)

    def reader(self, request: Request) -> "OpenAIReader":
        return OpenAIReader(self._provider, embeds=request.embed is not None)


class OpenAIReader:
    """Reads completions of both kinds, whole or streamed."""

    def __init__(self, provider: str, *, embeds: bool = False) -> None:
        self._provider = provider
        self._embeds = embeds

    def whole(self, payload: Any) -> Heard:
        """A reply's body. Raises Upstream (protocol, server)."""
        self._no_error(payload)
        deltas = []
        try:
            if self._embeds:
                deltas = [vector_of(item) for item in payload["data"]]
            for choice in () if self._embeds else payload["choices"]:
                text = choice["message"]["content"] if "message" in choice else choice["text"]
                deltas.append(
                    Delta(
                        index=int(choice["index"]),
                        text=self._text(text),
                        finish=reason(self._provider, choice["finish_reason"]),
                    )
                )
        except (KeyError, TypeError, ValueError) as error:
            raise self._senseless(error) from error
        return Heard(deltas, usage=self._usage(payload), done=True, model=payload.get("model"))

    def event(self, name: str, data: bytes) -> Heard:
        """An event. Raises Upstream (protocol, server)."""
        if data.strip() == b"[DONE]":
            return Heard(done=True)
        try:
            payload = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._senseless(error) from error
        self._no_error(payload)
        deltas = []
        try:
            for choice in payload["choices"]:
                text = (choice.get("delta") or {}).get("content") if "text" not in choice else choice["text"]
                ended = choice.get("finish_reason")
                finish = None if ended is None else reason(self._provider, ended)
                if text or finish:
                    deltas.append(Delta(index=int(choice["index"]), text=self._text(text), finish=finish))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._senseless(error) from error
        return Heard(deltas, usage=self._usage(payload), model=payload.get("model"))

    def _text(self, text: object) -> str:
        if text is None:
            return ""
        if not isinstance(text, str):
            raise ValueError(f"content is a {type(text).__name__}")
        return text

    def _usage(self, payload: dict[str, Any]) -> Usage | None:
        """``prompt_tokens`` here includes the cached ones, as ours does."""
        given = payload.get("usage")
        if not isinstance(given, dict):
            return None
        try:
            details = given.get("prompt_tokens_details") or {}
            output = given.get("completion_tokens_details") or {}
            return Usage(
                prompt_tokens=count(given.get("prompt_tokens")),
                cached_tokens=count(details.get("cached_tokens")),
                completion_tokens=count(given.get("completion_tokens")),
                reasoning_tokens=count(output.get("reasoning_tokens")),
            )
        except (ValueError, AttributeError) as error:
            raise self._senseless(error) from error

    def _no_error(self, payload: Any) -> None:
        """Some servers say 200 and put the error inside."""
        if not isinstance(payload, dict):
            raise self._senseless(ValueError(f"a {type(payload).__name__}, not an object"))
        if payload.get("error"):
            raise Upstream(
                f"error in a 200: {str(payload['error'])[:300]}", kind="server", provider=self._provider
            )

    def _senseless(self, error: Exception) -> Upstream:
        return Upstream(f"a reply that makes no sense: {error!r}", kind="protocol", provider=self._provider)


def embeddings_body(request: Request, model: str) -> bytes:
    """The body of a request for embeddings."""
    body: dict[str, Any] = {"model": model, "input": request.prompts, "encoding_format": "float"}
    if request.embed is not None and request.embed.dimensions is not None:
        body["dimensions"] = request.embed.dimensions
    return msgspec.json.encode(body)


def vector_of(item: dict[str, Any]) -> Delta:
    """One entry of ``data``. Raises KeyError, TypeError, ValueError, OverflowError for what is none."""
    values = array("f", item["embedding"])
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError("an embedding without values, or with one that is not finite")
    return Delta(index=int(item["index"]), vector=values.tobytes(), finish="stop")


def count(value: object) -> int:
    """A token count; None is 0. Raises ValueError for anything else that is no whole number >= 0."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"token count {value!r}")
    return value


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
    or None. What cannot be carried is never dropped."""
    p = request.params
    if request.embed is not None and format == "anthropic":
        return "embeddings"
    if p.logprobs is not None:
        return "logprobs: token ids of its tokenizer are not known here"
    if p.logit_bias or p.stop_token_ids:
        return "logit_bias and stop_token_ids name tokens of the local tokenizer"
    if request.prompts is not None and any(not isinstance(prompt, str) for prompt in request.prompts):
        return "the prompt is given as token ids of the local tokenizer"
    if request.echo and format != "anthropic" and request.messages is not None:
        return "echo"
    if request.template_kwargs or not request.add_generation_prompt:
        return "chat template options"
    if not p.skip_special_tokens:
        return "skip_special_tokens=false"
    if request.tools:
        return "tools"
    if format != "openai-extended" and (used := extended_used(request)):
        return ", ".join(used)
    if format == "anthropic":
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
        if not all(message["role"] in ("system", "user", "assistant") for message in request.messages):
            return "roles beside system, user and assistant"
    return None
