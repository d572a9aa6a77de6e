"""The Anthropic Messages wire format."""

from typing import Any

import msgspec

from galley.errors import Upstream
from galley.providers.dialect import Heard
from galley.providers.openai import count, lacks
from galley.providers.refusal import reason
from galley.types import Delta, Request, Usage

__all__ = ["AnthropicDialect"]

VERSION = "2023-06-01"


class AnthropicDialect:
    """Args:
    provider: for messages.
    default_max_tokens: sent when the request has none, because the format demands one.
    """

    name = "anthropic"

    def __init__(self, provider: str, *, default_max_tokens: int = 4096) -> None:
        self._provider = provider
        self._default = default_max_tokens

    def lacks(self, request: Request) -> str | None:
        """See ``Dialect.lacks``."""
        return lacks(request, "anthropic")

    def headers(self, key: str | None) -> dict[str, str]:
        return {"anthropic-version": VERSION, **({"x-api-key": key} if key else {})}

    def encode(self, request: Request, model: str) -> tuple[str, bytes]:
        """See ``Dialect.encode``. System messages are joined into ``system``."""
        p = request.params
        messages = request.messages or []
        system = "\n\n".join(str(m["content"]) for m in messages if m["role"] == "system")
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": p.max_tokens or self._default,
            "messages": [
                {"role": m["role"], "content": m["content"]} for m in messages if m["role"] != "system"
            ],
            "temperature": p.temperature,
        }
        # The format's newer models refuse temperature and top_p together; the default is not worth sending.
        if p.top_p != 1:
            body["top_p"] = p.top_p
        if system:
            body["system"] = system
        if p.stops:
            body["stop_sequences"] = p.stops
        if request.stream:
            body["stream"] = True
        return "/messages", msgspec.json.encode(body)

    def reader(self, request: Request) -> "AnthropicReader":
        return AnthropicReader(self._provider)


class AnthropicReader:
    """Reads messages, whole or as named events."""

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._input = Usage()
        self._finished = False

    def whole(self, payload: Any) -> Heard:
        """A reply's body. Raises Upstream (protocol, server)."""
        try:
            if payload.get("type") == "error":
                raise self._error(payload)
            text = "".join(block["text"] for block in payload["content"] if block["type"] == "text")
            finish = reason(self._provider, payload["stop_reason"])
            usage = self._usage(payload["usage"], payload["usage"].get("output_tokens"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._senseless(error) from error
        stop = payload.get("stop_sequence")
        delta = Delta(index=0, text=text, finish=finish, stop=stop if isinstance(stop, str) else None)
        return Heard([delta], usage=usage, done=True, model=payload.get("model"))

    def event(self, name: str, data: bytes) -> Heard:
        """An event. Raises Upstream (protocol, server)."""
        try:
            payload = msgspec.json.decode(data)
            kind = payload["type"]
            if kind == "error":
                raise self._error(payload)
            if kind == "message_start":
                message = payload["message"]
                self._input = self._usage(message["usage"], 0)
                return Heard(model=message.get("model"))
            if kind == "content_block_delta" and payload["delta"]["type"] == "text_delta":
                return Heard([Delta(index=0, text=payload["delta"]["text"])])
            if kind == "message_delta":
                ended = payload["delta"].get("stop_reason")
                stop = payload["delta"].get("stop_sequence")
                usage = msgspec.structs.replace(
                    self._input, completion_tokens=count(payload["usage"].get("output_tokens"))
                )
                if ended is None:
                    return Heard(usage=usage)
                self._finished = True
                finish = reason(self._provider, ended)
                stop = stop if isinstance(stop, str) else None
                return Heard([Delta(index=0, finish=finish, stop=stop)], usage=usage)
            return Heard(done=kind == "message_stop")
        except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._senseless(error) from error

    def _usage(self, given: dict[str, Any], output: object) -> Usage:
        """Here ``input_tokens`` excludes what was read from and written to the cache; ours includes it."""
        read = count(given.get("cache_read_input_tokens"))
        written = count(given.get("cache_creation_input_tokens"))
        return Usage(
            prompt_tokens=count(given.get("input_tokens")) + read + written,
            cached_tokens=read,
            cache_write_tokens=written,
            completion_tokens=count(output),
        )

    def _error(self, payload: dict[str, Any]) -> Upstream:
        error = payload.get("error") or {}
        kind = error.get("type", "")
        return Upstream(
            f"{kind}: {str(error.get('message'))[:300]}",
            kind="rate" if kind == "rate_limit_error" else "server",
            provider=self._provider,
        )

    def _senseless(self, error: Exception) -> Upstream:
        return Upstream(f"a reply that makes no sense: {error!r}", kind="protocol", provider=self._provider)
