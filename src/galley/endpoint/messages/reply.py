"""A message and its events in Anthropic's form."""

from typing import Any

import msgspec

from galley.endpoint.dialect import Anthropic
from galley.endpoint.pieces import Block, Blocks, Event
from galley.errors import GalleyError
from galley.router.router import Answer
from galley.types import Delta, Usage

__all__ = ["MessageReply", "usage_object"]

encode = msgspec.json.encode


def usage_object(usage: Usage) -> dict[str, Any]:
    """Anthropic's sums: ``input_tokens`` leaves out what was read from the cache or written to it."""
    written = min(usage.cache_write_tokens, usage.prompt_tokens - usage.cached_tokens)
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens - written,
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation": {"ephemeral_5m_input_tokens": written, "ephemeral_1h_input_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "server_tool_use": None,
        "inference_geo": None,
        "service_tier": "standard",
    }


class MessageReply:
    """One message being written down."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.id = "msg_" + answer.receipt_id.removeprefix("rcp_")
        self._blocks = Blocks()
        self._started = False
        self._prefix = b""
        self._finish: str | None = None
        self._stop: str | None = None

    def opening(self) -> bytes:
        """Nothing yet: ``message_start`` tells the cached tokens, which the first delta brings."""
        return b""

    def take(self, delta: Delta) -> None:
        for _ in self._events(delta):
            pass

    def chunks(self, delta: Delta) -> bytes:
        out = b""
        if not self._started:
            self._started = True
            message = self._message([], None, None, usage_object(self._opening(delta)))
            out = event("message_start", {"message": message})
        return out + b"".join(self._written(each) for each in self._events(delta))

    def ending(self, usage: Usage) -> bytes:
        delta = {"stop_reason": self._reason(), "stop_sequence": self._stop}
        return event("message_delta", {"delta": delta, "usage": usage_object(usage)}) + event(
            "message_stop", {}
        )

    def fault(self, error: GalleyError) -> bytes:
        """``message_stop`` does not follow."""
        return b"event: error\ndata: " + encode(Anthropic().body(error, self._answer.request.id)) + b"\n\n"

    def whole(self, usage: Usage) -> bytes:
        content = [self._content(block) for block in self._blocks.all if not block.retracted]
        return encode(self._message(content, self._reason(), self._stop, usage_object(usage)))

    def _opening(self, delta: Delta) -> Usage:
        """What is known when the first output is there."""
        prompt, cached = len(self._answer.prepared.prompts[0]), delta.cached_tokens or 0
        return Usage(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=len(delta.token_ids))

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, stop: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._answer.card.id,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "stop_details": None,
            "container": None,
            "usage": usage,
        }

    def _reason(self) -> str:
        if self._finish == "tool_calls":
            return "tool_use"
        if self._finish == "length":
            unbounded = self._answer.request.params.max_tokens is None
            return "model_context_window_exceeded" if unbounded else "max_tokens"
        if self._finish == "content_filter":
            return "refusal"
        return "end_turn" if self._stop is None else "stop_sequence"

    def _events(self, delta: Delta) -> list[Event]:
        events = list(self._blocks.take(delta))
        if delta.finish is not None:
            self._finish = delta.finish
            self._stop = delta.stop if isinstance(delta.stop, str) else None
            events += self._blocks.end()
        return events

    @staticmethod
    def _content(block: Block, *, opening: bool = False) -> dict[str, Any]:
        text = "" if opening else block.text
        if block.kind == "reasoning":
            # Nothing is signed here: the thought is in the open.
            return {"type": "thinking", "thinking": text, "signature": ""}
        if block.kind == "tool":
            call = {"type": "tool_use", "id": block.id, "name": block.name, "input": read_input(text)}
            return {**call, "caller": {"type": "direct"}}
        return {"type": "text", "text": text, "citations": None}

    def _written(self, each: Event) -> bytes:
        block = each.block
        if each.what == "open":
            kind, key = {
                "text": ("text_delta", "text"),
                "reasoning": ("thinking_delta", "thinking"),
                "tool": ("input_json_delta", "partial_json"),
            }[block.kind]
            head = (
                b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,' % block.number
            )
            self._prefix = head + b'"delta":{"type":"%s","%s":' % (kind.encode(), key.encode())
            opened = {"index": block.number, "content_block": self._content(block, opening=True)}
            return event("content_block_start", opened)
        if each.what == "add":
            return self._prefix + encode(each.text) + b"}}\n\n" if each.text else b""
        return event("content_block_stop", {"index": block.number})


def read_input(text: str) -> Any:
    """A call's arguments as the object they spell; cut-off JSON is shown as text under one key, not lost."""
    if not text:
        return {}
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return {"_incomplete_json": text}


def event(kind: str, fields: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), encode({"type": kind, **fields}))
