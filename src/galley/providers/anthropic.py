"""The Anthropic Messages wire format."""

from typing import Any

import msgspec

from galley.errors import Upstream
from galley.providers.carries import call_input, lacks, schema_of
from galley.providers.dialect import Heard
from galley.providers.openai import count
from galley.providers.refusal import reason
from galley.types import Delta, Request, ToolCallDelta, Usage

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
            "messages": turns(messages),
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
        if request.tools:
            body |= tooling(request)
        if p.structured_outputs is not None:
            schema = schema_of(p.structured_outputs)
            body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
        return "/messages", msgspec.json.encode(body)

    def adjusted(self, request: Request) -> dict[str, str]:
        """See ``Dialect.adjusted``. Reasoning of earlier turns needs a signature there, which other models'
        has not."""
        why = "left out: reasoning goes there only with its signature"
        return {
            f"messages[{i}].reasoning_content": why
            for i, message in enumerate(request.messages or ())
            if message.get("reasoning_content")
        }

    def reader(self, request: Request) -> "AnthropicReader":
        return AnthropicReader(self._provider)


def turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as blocks: calls become ``tool_use``, results of tools ``tool_result`` in one user turn."""
    found: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            continue
        if role == "tool":
            block = {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": content}
            if found and found[-1]["role"] == "user" and isinstance(found[-1]["content"], list):
                found[-1]["content"].append(block)
            else:
                found.append({"role": "user", "content": [block]})
            continue
        calls = message.get("tool_calls")
        if calls:
            blocks: list[dict[str, Any]] = [{"type": "text", "text": content}] if content else []
            for call in calls:
                name = call["function"]["name"]
                blocks.append({"type": "tool_use", "id": call["id"], "name": name, "input": call_input(call)})
            content = blocks
        found.append({"role": role, "content": content})
    return found


def tooling(request: Request) -> dict[str, Any]:
    """The fields that offer tools."""
    tools = []
    for tool in request.tools or ():
        function = tool["function"]
        known = {"name": function["name"], "input_schema": function.get("parameters") or {"type": "object"}}
        known |= {key: function[key] for key in ("description", "strict") if function.get(key)}
        tools.append(known)
    choice: dict[str, Any] = {"type": {"required": "any"}.get(request.tool_choice, request.tool_choice)}
    if request.tool_choice.startswith("function:"):
        choice = {"type": "tool", "name": request.tool_choice.removeprefix("function:")}
    if not request.parallel_tool_calls and choice["type"] != "none":
        choice["disable_parallel_tool_use"] = True
    return {"tools": tools, "tool_choice": choice}


class AnthropicReader:
    """Reads messages, whole or as named events."""

    def __init__(self, provider: str) -> None:
        self._provider = provider
        self._input = Usage()
        self._finished = False
        self._calls: dict[int, int] = {}
        """Number of the call by number of its block."""
        self._empty: set[int] = set()
        """Blocks of calls that have no arguments yet."""

    def whole(self, payload: Any) -> Heard:
        """A reply's body. Raises Upstream (protocol, server)."""
        try:
            if payload.get("type") == "error":
                raise self._error(payload)
            blocks = payload["content"]
            text = "".join(block["text"] for block in blocks if block["type"] == "text")
            thought = "".join(block["thinking"] for block in blocks if block["type"] == "thinking")
            used = [block for block in blocks if block["type"] == "tool_use"]
            calls = [
                ToolCallDelta(
                    index=number,
                    id=str(block["id"]),
                    name=str(block["name"]),
                    arguments=msgspec.json.encode(block["input"]).decode(),
                )
                for number, block in enumerate(used)
            ]
            finish = reason(self._provider, payload["stop_reason"])
            usage = self._usage(payload["usage"], payload["usage"].get("output_tokens"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._senseless(error) from error
        stop = payload.get("stop_sequence")
        delta = Delta(
            index=0,
            text=text,
            reasoning=thought,
            tool_calls=calls,
            finish=finish,
            stop=stop if isinstance(stop, str) else None,
        )
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
            if kind.startswith("content_block"):
                return self._block(kind, payload)
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

    def _block(self, kind: str, payload: dict[str, Any]) -> Heard:
        """An event of one block: text, thinking, or a call. Arguments come as pieces of JSON; a call without
        any has an empty object."""
        number = int(payload.get("index", 0))
        if kind == "content_block_start":
            block = payload["content_block"]
            if block["type"] != "tool_use":
                return Heard()
            self._calls[number] = len(self._calls)
            self._empty.add(number)
            call = ToolCallDelta(index=self._calls[number], id=str(block["id"]), name=str(block["name"]))
            return Heard([Delta(index=0, tool_calls=[call])])
        if kind == "content_block_stop":
            if number not in self._empty:
                return Heard()
            return Heard(
                [Delta(index=0, tool_calls=[ToolCallDelta(index=self._calls[number], arguments="{}")])]
            )
        piece = payload["delta"]
        if piece["type"] == "text_delta":
            return Heard([Delta(index=0, text=piece["text"])])
        if piece["type"] == "thinking_delta":
            return Heard([Delta(index=0, reasoning=piece["thinking"])])
        if piece["type"] == "input_json_delta" and piece["partial_json"]:
            self._empty.discard(number)
            call = ToolCallDelta(index=self._calls[number], arguments=piece["partial_json"])
            return Heard([Delta(index=0, tool_calls=[call])])
        return Heard()

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
