"""A response and its events, numbered in the order of the specification.

Per piece of text only the text itself is encoded; everything around it is made when its part opens.
"""

import time
from typing import Any

import msgspec

from galley.endpoint.pieces import Block, Blocks, Event
from galley.endpoint.reply import Options, finite, spelling
from galley.errors import GalleyError
from galley.router.router import Answer
from galley.types import Delta, TokenLogprob, Usage

__all__ = ["ResponseReply", "response_id", "usage_object"]

encode = msgspec.json.encode

KINDS = {"text": "message", "reasoning": "reasoning", "tool": "function_call"}
PREFIXES = {"text": "msg_", "reasoning": "rs_", "tool": "fc_"}


def response_id(receipt_id: str) -> str:
    """The response of a receipt."""
    return "resp_" + receipt_id.removeprefix("rcp_")


def usage_object(usage: Usage) -> dict[str, Any]:
    """Usage in this API's words; ``input_tokens`` includes cached ones."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


class ResponseReply:
    """One response being written down.

    Args:
        shown: the fields repeated from the request.
    """

    def __init__(self, answer: Answer, options: Options, *, shown: dict[str, Any]) -> None:
        self._answer = answer
        self.id = response_id(answer.receipt_id)
        self._tail = answer.receipt_id.removeprefix("rcp_")
        self._envelope = {
            "id": self.id,
            "object": "response",
            "created_at": int(answer.request.created),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": answer.card.id,
            "output": [],
            "usage": None,
            **shown,
        }
        self._streamed = options.stream
        self._blocks = Blocks()
        self._finish: str | None = None
        self._count = 0
        self._prefix = b""
        self._ended: dict[str, Any] | None = None

    def opening(self) -> bytes:
        return self._event("response.created", response=self._envelope) + self._event(
            "response.in_progress", response=self._envelope
        )

    def take(self, delta: Delta) -> None:
        """Gather, for an answer that is not streamed; a stream gathers by itself."""
        if not self._streamed:
            for _ in self._blocks.take(delta):
                pass
            self._finish = delta.finish or self._finish

    def chunks(self, delta: Delta) -> bytes:
        out = b"".join(self._written(event) for event in self._blocks.take(delta))
        if delta.finish is not None:
            self._finish = delta.finish
            out += b"".join(self._written(event) for event in self._blocks.end())
        return out

    def ending(self, usage: Usage) -> bytes:
        whole = self._whole(usage)
        return self._event(f"response.{whole['status']}", response=whole)

    def fault(self, error: GalleyError) -> bytes:
        """``error`` says what happened, ``response.failed`` ends the response."""
        body = error.body()["error"]
        out = self._event("error", code=body["code"], message=body["message"], param=body["param"])
        return out + self._event("response.failed", response=self.failed(error))

    def status(self, word: str) -> dict[str, Any]:
        """The response object as it is now: ``queued``, ``in_progress`` or ``cancelled``."""
        return {**self._envelope, "status": word, "output": self._output("incomplete")}

    def failed(self, error: GalleyError) -> dict[str, Any]:
        """The response object of a response that broke."""
        problem = {"code": error.code or "server_error", "message": error.body()["error"]["message"]}
        return {**self._envelope, "status": "failed", "error": problem, "output": self._output("incomplete")}

    def whole(self, usage: Usage) -> bytes:
        return encode(self._whole(usage))

    def _whole(self, usage: Usage) -> dict[str, Any]:
        if self._ended is None:
            for _ in self._blocks.end():
                pass
            cut = self._finish in ("length", "content_filter")
            why = {"length": "max_output_tokens"}.get(self._finish or "", self._finish)
            self._ended = {
                **self._envelope,
                "status": "incomplete" if cut else "completed",
                "completed_at": None if cut else int(time.time()),
                "incomplete_details": {"reason": why} if cut else None,
                "output": self._output("incomplete" if cut else "completed"),
            }
        return {**self._ended, "usage": usage_object(usage)}

    def _output(self, last: str) -> list[dict[str, Any]]:
        """All items; only the last one can be incomplete."""
        count = len(self._blocks.all)
        return [
            self._item(block, last if number == count - 1 else "completed")
            for number, block in enumerate(self._blocks.all)
        ]

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_id(block), "type": KINDS[block.kind]}
        opening = status == "in_progress"
        if block.kind == "tool":
            status = "incomplete" if block.retracted else status
            arguments = "" if opening else block.text
            return item | {
                "call_id": block.id,
                "name": block.name,
                "arguments": arguments,
                "status": status,
            }
        content = [] if opening else [self._part(block)]
        if block.kind == "reasoning":
            return item | {"summary": [], "content": content, "status": status}
        return item | {"role": "assistant", "content": content, "status": status}

    def _part(self, block: Block, *, opening: bool = False) -> dict[str, Any]:
        text = "" if opening else block.text
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = [] if opening else self._logprobs(block.logprobs)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _item_id(self, block: Block) -> str:
        return f"{PREFIXES[block.kind]}{self._tail}{block.number:02d}"

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._count = self._count, self._count + 1
        return b"event: %s\ndata: %s\n\n" % (
            kind.encode(),
            encode({"type": kind, "sequence_number": number, **fields}),
        )

    def _written(self, event: Event) -> bytes:
        block = event.block
        where = {"output_index": block.number, "item_id": self._item_id(block)}
        part = {**where, "content_index": 0}
        name = {"text": "output_text", "reasoning": "reasoning_text", "tool": "function_call_arguments"}[
            block.kind
        ]
        if event.what == "open":
            item = self._item(block, "in_progress")
            out = self._event("response.output_item.added", output_index=block.number, item=item)
            around = where if block.kind == "tool" else part
            kind = f"response.{name}.delta"
            head = encode({"type": kind, **around})[:-1]
            self._prefix = b"event: %s\ndata: %s" % (kind.encode(), head)
            if block.kind != "tool":
                shown = self._part(block, opening=True)
                out += self._event("response.content_part.added", **part, part=shown)
            return out
        if event.what == "add":
            number, self._count = self._count, self._count + 1
            out = self._prefix + b',"sequence_number":%d,"delta":' % number + encode(event.text)
            if block.kind == "text":
                out += b',"logprobs":' + encode(self._logprobs(event.logprobs or []))
            return out + b"}\n\n"
        cut = self._finish == "length"
        item = self._item(block, "incomplete" if cut else "completed")
        if block.kind == "tool":
            done = self._event(f"response.{name}.done", **where, name=block.name, arguments=block.text)
        else:
            more = {"logprobs": self._logprobs(block.logprobs)} if block.kind == "text" else {}
            done = self._event(f"response.{name}.done", **part, text=block.text, **more)
            done += self._event("response.content_part.done", **part, part=self._part(block))
        return done + self._event("response.output_item.done", output_index=block.number, item=item)

    def _logprobs(self, entries: list[TokenLogprob]) -> list[dict[str, Any]]:
        if not entries:
            return []

        def one(token: tuple[str, bytes], logprob: float) -> dict[str, Any]:
            return {"token": token[0], "logprob": finite(logprob), "bytes": list(token[1])}

        found = []
        for entry in entries:
            token, *others = spelling(entry, self._answer.provider.token)
            top = [one(other, value) for other, (_, value) in zip(others, entry.top, strict=True)]
            found.append({**one(token, entry.logprob), "top_logprobs": top})
        return found
