"""The OpenAI wire format, as spoken by clouds, vLLM, llama-server and Ollama."""

import math
from array import array
from typing import Any

import msgspec

from galley.errors import Upstream
from galley.providers.carries import extended_used, lacks, schema_of
from galley.providers.dialect import Heard
from galley.providers.refusal import reason
from galley.types import Delta, Request, StructuredOutputs, TokenLogprob, ToolCallDelta, Usage

__all__ = ["OpenAIDialect"]


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
        if p.structured_outputs is not None:
            body |= form(p.structured_outputs, extended=self._extended)
        if request.messages is not None:
            body["messages"] = request.messages
            if request.tools:
                body |= tooling(request)
            if p.logprobs is not None:
                body |= {"logprobs": True, "top_logprobs": p.logprobs}
            return "/chat/completions", msgspec.json.encode(body)
        if p.logprobs is not None:
            body["logprobs"] = p.logprobs
        prompts = request.prompts or []
        body["prompt"] = prompts[0] if len(prompts) == 1 else prompts
        return "/completions", msgspec.json.encode(body)

    def reader(self, request: Request) -> "OpenAIReader":
        return OpenAIReader(
            self._provider, logprobs=request.params.logprobs is not None, embeds=request.embed is not None
        )

    def adjusted(self, request: Request) -> dict[str, str]:
        """See ``Dialect.adjusted``."""
        return {}


def form(wanted: StructuredOutputs, *, extended: bool) -> dict[str, Any]:
    """The fields that ask for a form of output: OpenAI's ``response_format``, or what vLLM calls it."""
    if wanted.json_object:
        return {"response_format": {"type": "json_object"}}
    schema = schema_of(wanted)
    if schema is not None and wanted.whitespace_pattern is None:
        named = {"name": "answer", "schema": schema, "strict": wanted.strict}
        return {"response_format": {"type": "json_schema", "json_schema": named}}
    assert extended, "the dialect lacks this"
    given = {
        name: value
        for name in ("json", "regex", "choice", "grammar", "whitespace_pattern")
        if (value := getattr(wanted, name)) is not None
    }
    return {"structured_outputs": given}


def tooling(request: Request) -> dict[str, Any]:
    """The fields that offer tools."""
    choice: Any = request.tool_choice
    if choice.startswith("function:"):
        choice = {"type": "function", "function": {"name": choice.removeprefix("function:")}}
    found = {"tools": request.tools, "tool_choice": choice}
    return found if request.parallel_tool_calls else {**found, "parallel_tool_calls": False}


class OpenAIReader:
    """Reads completions of both kinds, whole or streamed.

    Args:
        logprobs: they were asked for; an answer without them is none.
        embeds: the reply is one of embeddings.
    """

    def __init__(self, provider: str, *, logprobs: bool = False, embeds: bool = False) -> None:
        self._provider = provider
        self._logprobs = logprobs
        self._embeds = embeds
        self._called: set[tuple[int, int]] = set()

    def whole(self, payload: Any) -> Heard:
        """A reply's body. Raises Upstream (protocol, server)."""
        self._no_error(payload)
        deltas = []
        try:
            if self._embeds:
                deltas = [vector_of(item) for item in payload["data"]]
            for choice in () if self._embeds else payload["choices"]:
                said = choice["message"] if "message" in choice else {"content": choice["text"]}
                finish = reason(self._provider, choice["finish_reason"])
                deltas.append(self._delta(choice, said, finish))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
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
                said = {"content": choice["text"]} if "text" in choice else (choice.get("delta") or {})
                ended = choice.get("finish_reason")
                delta = self._delta(choice, said, None if ended is None else reason(self._provider, ended))
                if delta.text or delta.reasoning or delta.tool_calls or delta.finish or delta.logprobs:
                    deltas.append(delta)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._senseless(error) from error
        return Heard(deltas, usage=self._usage(payload), model=payload.get("model"))

    def _delta(self, choice: dict[str, Any], said: dict[str, Any], finish: Any) -> Delta:
        """One choice, or a piece of one. Raises ValueError, TypeError, KeyError for what makes no sense."""
        index = int(choice["index"])
        text = self._text(said.get("content"))
        refused = self._text(said.get("refusal"))
        logprobs = spelt_logprobs(choice.get("logprobs"), index) if self._logprobs else None
        if self._logprobs and text and not logprobs:
            raise ValueError("log-probabilities were asked for, and none came")
        return Delta(
            index=index,
            text=text + refused,
            reasoning=self._text(said.get("reasoning_content") or said.get("reasoning")),
            tool_calls=self._calls(index, said.get("tool_calls") or ()),
            logprobs=logprobs or None,
            finish=finish,
            warnings=["the model refused; its words are the text"] if refused else [],
        )

    def _calls(self, index: int, given: Any) -> list[ToolCallDelta]:
        """Pieces of calls; the first piece of each has id and name, further ones neither."""
        found = []
        for place, call in enumerate(given):
            number = int(call.get("index", place))
            function = call.get("function") or {}
            arguments = self._text(function.get("arguments"))
            if (index, number) in self._called:
                found.append(ToolCallDelta(index=number, arguments=arguments))
                continue
            id, name = call.get("id"), function.get("name")
            if not isinstance(id, str) or not isinstance(name, str) or not id or not name:
                raise ValueError(f"a call without id or name: {call!r}")
            self._called.add((index, number))
            found.append(ToolCallDelta(index=number, id=id, name=name, arguments=arguments))
        return found

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


def spelt_logprobs(given: Any, index: int) -> list[TokenLogprob]:
    """Log-probabilities of a chat choice (``content``) or a text completion's parallel lists; ids are not
    known, so every token is spelt. Raises KeyError, TypeError, ValueError for what makes no sense."""
    if not given:
        return []
    if "content" in given:
        return [
            spelt_one(
                (spelling(each), float(each["logprob"])),
                [(spelling(other), float(other["logprob"])) for other in each.get("top_logprobs") or ()],
            )
            for each in given["content"] or ()
        ]
    tops = given.get("top_logprobs") or [None] * len(given["tokens"])
    found = []
    for token, value, top in zip(given["tokens"], given["token_logprobs"], tops, strict=True):
        if value is not None:  # the first token of an echoed prompt has none
            others = [((name, name.encode()), float(other)) for name, other in (top or {}).items()]
            found.append(spelt_one(((token, token.encode()), float(value)), others))
    return found


def spelling(token: dict[str, Any]) -> tuple[str, bytes]:
    """Text and bytes of a token on the wire."""
    raw = token.get("bytes")
    return str(token["token"]), bytes(raw) if raw is not None else str(token["token"]).encode()


Spelt = tuple[tuple[str, bytes], float]


def spelt_one(drawn: Spelt, top: list[Spelt]) -> TokenLogprob:
    """One token without ids. Its rank is among the alternatives given: one more than all of them likelier."""
    ordered = sorted(top, key=lambda pair: -pair[1])
    rank = 1 + sum(value > drawn[1] for _, value in ordered)
    spelt = [drawn[0], *(name for name, _ in ordered)]
    return TokenLogprob(-1, drawn[1], rank, [(-1, value) for _, value in ordered], spelt)


def count(value: object) -> int:
    """A token count; None is 0. Raises ValueError for anything else that is no whole number >= 0."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"token count {value!r}")
    return value
