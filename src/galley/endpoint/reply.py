"""The shapes of an answer on the wire, streamed and whole, for both generation doors.

Chunks are preformatted: per chunk only the new text is encoded (0.13 µs against 4 µs for a full dump).
"""

import codecs
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import msgspec

from galley.errors import GalleyError
from galley.router.router import Answer
from galley.types import Delta, TokenLogprob, ToolCallDelta, Usage

__all__ = ["ChatReply", "CompletionReply", "Options", "Reply", "Whole", "spelling", "usage_object"]

encode = msgspec.json.encode


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How the client wants the answer shaped."""

    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    ndjson: bool = False
    """A stream of JSON lines instead of server-sent events, without keep-alives: those would be lines too."""
    keep: bool = False
    """Store the answer so that it can be asked for again."""
    names: dict[str, str] = {}
    """What the client calls the fields of a chat request, where its API has other words."""


class Whole(Protocol):
    """One answer being gathered, to be sent as a whole."""

    def take(self, delta: Delta) -> None:
        """Gather one delta for ``whole``."""
        ...

    def whole(self, usage: Usage) -> bytes:
        """The answer as one JSON object."""
        ...


@runtime_checkable
class Reply(Whole, Protocol):
    """One answer that may be streamed too."""

    def opening(self) -> bytes:
        """Events sent before any output; may be empty."""
        ...

    def chunks(self, delta: Delta) -> bytes:
        """Server-sent events for one delta; empty when it has nothing to show yet."""
        ...

    def ending(self, usage: Usage) -> bytes:
        """The last events of a stream that ended well."""
        ...

    def fault(self, error: GalleyError) -> bytes:
        """The last event of a stream that broke."""
        ...


def usage_object(usage: Usage) -> dict[str, Any]:
    """Usage in OpenAI's form; the details are always there."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": usage.drafted_tokens - usage.accepted_tokens,
        },
    }


class Gathered:
    """Everything of one choice."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: dict[int, list[ToolCallDelta]] = {}
        self.warnings: list[str] = []
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt: list[TokenLogprob] | None = None
        self.finish: str | None = None
        self.stop: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.reasoning.append(delta.reasoning)
        self.warnings += delta.warnings
        for piece in delta.tool_calls:
            self.calls.setdefault(piece.index, []).append(piece)
        self.ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs or ())
        self.prompt = delta.prompt_logprobs if self.prompt is None else self.prompt
        self.finish, self.stop = delta.finish, delta.stop

    def message(self) -> dict[str, Any]:
        """The assistant's message. Content is null where there are calls alone; a retracted call is none."""
        text, reasoning = "".join(self.text), "".join(self.reasoning)
        calls = [
            {
                "id": pieces[0].id,
                "type": "function",
                "function": {"name": pieces[0].name, "arguments": "".join(p.arguments for p in pieces)},
            }
            for pieces in self.calls.values()
            if not any(piece.retracted for piece in pieces)
        ]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text or (None if calls else ""),
            "refusal": None,
            "annotations": [],
        }
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message


class Common:
    """The envelope both doors share."""

    whole_object = ""
    chunk_object = ""
    id_prefix = ""

    def __init__(self, answer: Answer, options: Options) -> None:
        self.answer = answer
        self.options = options
        self.id = self.id_prefix + answer.receipt_id.removeprefix("rcp_")
        self.wants_logprobs = answer.prepared.params.logprobs is not None
        self.head = {
            "id": self.id,
            "object": self.chunk_object,
            "created": int(answer.request.created),
            "model": answer.card.id,
            "system_fingerprint": answer.provider.fingerprint,
            "service_tier": answer.request.service_tier,
        }
        self.prefix = b"data: " + encode(self.head)[:-1] + b',"choices":['
        self.tail = b'],"usage":null}\n\n' if options.include_usage else b"]}\n\n"
        self.gathered = {index: Gathered() for index in range(answer.prepared.count)}

    def take(self, delta: Delta) -> None:
        self.gathered[delta.index].add(delta)

    def opening(self) -> bytes:
        return b""

    def ending(self, usage: Usage) -> bytes:
        """The usage when it was asked for, and the end mark."""
        if not self.options.include_usage:
            return b"data: [DONE]\n\n"
        return self.prefix + b'],"usage":' + encode(usage_object(usage)) + b"}\n\ndata: [DONE]\n\n"

    def fault(self, error: GalleyError) -> bytes:
        """No end mark follows: the official clients raise on ``error``."""
        return b"data: " + encode(error.body()) + b"\n\n"

    def prompt_ids(self, index: int) -> list[int]:
        """The prompt of a choice."""
        return self.answer.prepared.prompts[index // self.answer.prepared.params.n]

    def envelope(self, choices: list[dict[str, Any]], usage: Usage, **more: object) -> bytes:
        head = {**self.head, "object": self.whole_object}
        return encode({**head, "choices": choices, "usage": usage_object(usage), **more})


class ChatReply(Common):
    """``chat.completion`` and its chunks."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, answer: Answer, options: Options) -> None:
        super().__init__(answer, options)
        self._opened: set[int] = set()
        self.warned: dict[int, list[str]] = {}

    def chunks(self, delta: Delta) -> bytes:
        out = b""
        lead = self.prefix + b'{"index":%d,"delta":' % delta.index
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            out = lead + b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
            if self.options.return_token_ids:
                out += b',"prompt_token_ids":' + encode(self.prompt_ids(delta.index))
            out += b"}" + self.tail
        said = delta.text or delta.reasoning or delta.tool_calls
        if said or delta.logprobs or (self.options.return_token_ids and delta.token_ids):
            logprobs = encode(self._logprobs(delta.logprobs)) if delta.logprobs else b"null"
            out += lead + delta_object(delta) + b',"logprobs":' + logprobs
            out += b',"finish_reason":null' + self._ids(delta) + b"}" + self.tail
        self.warned.setdefault(delta.index, []).extend(delta.warnings)
        if delta.finish is not None:
            out += lead + b'{},"logprobs":null,"finish_reason":' + encode(delta.finish)
            out += b',"stop_reason":' + encode(delta.stop)
            if self.warned[delta.index]:
                out += b',"x_parse_warnings":' + encode(self.warned[delta.index])
            out += b"}" + self.tail
        return out

    def _ids(self, delta: Delta) -> bytes:
        return b',"token_ids":' + encode(delta.token_ids) if self.options.return_token_ids else b""

    def whole(self, usage: Usage) -> bytes:
        choices: list[dict[str, Any]] = []
        for index, all_of in self.gathered.items():
            choice: dict[str, Any] = {
                "index": index,
                "message": all_of.message(),
                "logprobs": self._logprobs(all_of.logprobs) if self.wants_logprobs else None,
                "finish_reason": all_of.finish,
                "stop_reason": all_of.stop,
            }
            if all_of.warnings:
                choice["x_parse_warnings"] = all_of.warnings
            if self.options.return_token_ids:
                choice["token_ids"] = all_of.ids
            choices.append(choice)
        more = {"prompt_token_ids": self.prompt_ids(0)} if self.options.return_token_ids else {}
        return self.envelope(choices, usage, **more)

    def _logprobs(self, entries: list[TokenLogprob]) -> dict[str, Any]:
        def shown(token: tuple[str, bytes], logprob: float) -> dict[str, Any]:
            return {"token": token[0], "logprob": finite(logprob), "bytes": list(token[1]) or None}

        content = []
        for entry in entries:
            token, *others = spelling(entry, self.answer.provider.token)
            top = [shown(one, value) for one, (_, value) in zip(others, entry.top, strict=True)]
            content.append({**shown(token, entry.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}


def delta_object(delta: Delta) -> bytes:
    """``choices[].delta`` of a chunk: content, reasoning, calls, whatever there is."""
    if not delta.reasoning and not delta.tool_calls:
        return b'{"content":' + encode(delta.text) + b"}"
    found: dict[str, Any] = {}
    if delta.reasoning:
        found["reasoning_content"] = delta.reasoning
    if delta.text:
        found["content"] = delta.text
    calls = [call_object(piece) for piece in delta.tool_calls if not piece.retracted]
    if calls:
        found["tool_calls"] = calls
    return encode(found)


def call_object(piece: ToolCallDelta) -> dict[str, Any]:
    """A piece of a call in a chunk: the first has id, type and name."""
    if piece.id is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}


class CompletionReply(Common):
    """``text_completion``, streamed or whole (the same object name, as OpenAI has it)."""

    whole_object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, answer: Answer, options: Options) -> None:
        super().__init__(answer, options)
        self._opened: set[int] = set()
        self._offset: dict[int, int] = {}
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}

    def chunks(self, delta: Delta) -> bytes:
        text = delta.text
        first = delta.index not in self._opened
        if first:
            self._opened.add(delta.index)
            text = self._echo(delta.index) + text
        ids = self.options.return_token_ids and (delta.token_ids or first)
        scored = delta.prompt_logprobs is not None
        if not (text or delta.logprobs or ids or delta.finish or scored):
            return b""
        out = self.prefix + b'{"index":%d,"text":' % delta.index + encode(text) + b',"logprobs":'
        told = delta.logprobs or scored
        entries = delta.logprobs or []
        out += encode(self._logprobs(delta.index, entries, delta.prompt_logprobs)) if told else b"null"
        out += b',"finish_reason":' + encode(delta.finish)
        if delta.finish is not None:
            out += b',"stop_reason":' + encode(delta.stop)
        if self.options.return_token_ids:
            out += b',"token_ids":' + encode(delta.token_ids)
            if first:
                out += b',"prompt_token_ids":' + encode(self.prompt_ids(delta.index))
        return out + b"}" + self.tail

    def whole(self, usage: Usage) -> bytes:
        choices: list[dict[str, Any]] = []
        for index, all_of in self.gathered.items():
            choice: dict[str, Any] = {
                "index": index,
                "text": self._echo(index) + "".join(all_of.text),
                "logprobs": self._logprobs(index, all_of.logprobs, all_of.prompt)
                if self.wants_logprobs
                else None,
                "finish_reason": all_of.finish,
                "stop_reason": all_of.stop,
            }
            if self.options.return_token_ids:
                choice["token_ids"] = all_of.ids
                choice["prompt_token_ids"] = self.prompt_ids(index)
            choices.append(choice)
        return self.envelope(choices, usage)

    def _echo(self, index: int) -> str:
        echo = self.answer.prepared.echo
        return echo[index // self.answer.prepared.params.n] if echo else ""

    def _logprobs(
        self, index: int, entries: list[TokenLogprob], prompt: list[TokenLogprob] | None = None
    ) -> dict[str, Any]:
        """The legacy shape: parallel lists. Offsets count characters of the choice's text, echo included.

        A token that is part of a character is spelt ``bytes:\\xf0\\x9f``, as vLLM has it, and lies where its
        character begins. With ``prompt``, the scores of an echoed prompt's tokens but the first, these come
        before; nothing goes before a first token, so it has none (null).
        """
        decoder = self._decoders.setdefault(index, codecs.getincrementaldecoder("utf-8")("replace"))
        shows_special = not self.answer.prepared.params.skip_special_tokens
        tokens: list[str] = []
        offsets: list[int] = []
        tops: list[dict[str, float] | None] = []
        values: list[float | None] = [finite(entry.logprob) for entry in entries]
        place = self._offset.get(index, len(self._echo(index)))
        own = len(entries)
        if prompt is not None:
            first = TokenLogprob(self.prompt_ids(index)[0], 0.0, 0)
            entries = [first, *prompt, *entries]
            values = [None, *(finite(entry.logprob) for entry in prompt), *values]
            place = 0
        for number, entry in enumerate(entries):
            if number == len(entries) - own and prompt is not None:
                place = len(self._echo(index))  # a special token of the prompt may not be in its text
                decoder.reset()
            (text, raw), *others = spelling(entry, self.answer.provider.token)
            name = spelt(text, raw)
            tokens.append(name)
            offsets.append(place)
            if raw:
                place += len(decoder.decode(raw))
            elif shows_special:
                place += len(text)
            pairs = list(zip(others, entry.top, strict=True))
            top = {spelt(*one): finite(value) for one, (_, value) in reversed(pairs)}
            tops.append({**dict(reversed(top.items())), name: finite(entry.logprob)})
        if prompt is not None:
            tops[0] = None
        self._offset[index] = max(place, len(self._echo(index)))
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops if self.answer.prepared.params.logprobs else None,
            "text_offset": offsets,
        }


def spelling(entry: TokenLogprob, token: Callable[[int], tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Text and bytes of a token and of its alternatives, by their ids where they have any."""
    return entry.spelt or [token(id) for id in (entry.token_id, *(other for other, _ in entry.top))]


def spelt(text: str, raw: bytes) -> str:
    """A token's text, or its bytes where they are no text of their own."""
    try:
        raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return text


def finite(logprob: float) -> float:
    """JSON has no minus infinity; a banned token is shown as OpenAI's floor."""
    return max(logprob, -9999.0)
