"""``POST /v1/embeddings``: the request, checked, and its answer."""

import base64
import sys
from array import array
from typing import Any, Literal

import msgspec

from galley.endpoint.params import common
from galley.endpoint.reply import Options
from galley.endpoint.wire import Fields, invalid
from galley.router.router import Answer
from galley.types import Delta, Embed, Request, SamplingParams, Usage

__all__ = ["EmbeddingsDoor", "EmbeddingsReply"]

MAX_INPUTS = 2048
"""OpenAI's limit."""
CHANGES_VECTOR = (
    "add_special_tokens",
    "embed_dtype",
    "embedding_type",
    "embedding_types",
    "endianness",
    "input_type",
    "messages",
    "mm_processor_kwargs",
    "normalize",
    "pooling",
    "softmax",
    "task",
    "truncate",
    "use_activation",
)
"""Parameters of other servers that would change the vectors, and are not implemented: 400."""


class EmbeddingOptions(Options, frozen=True, kw_only=True):
    """How the vectors are written."""

    format: Literal["float", "base64"] = "float"


class EmbeddingsDoor:
    """Reads requests for embeddings: texts or token ids, one or several."""

    api = "embeddings"

    def parse(
        self, body: dict[str, Any], *, request_id: str, capture: bool, key: str | None
    ) -> tuple[Request, Options]:
        """A Request, or InvalidRequest naming the field at fault."""
        fields = Fields(body)
        model = fields.checked(fields.need("model"), "model", 512)
        inputs = read_inputs(fields)
        fields.refuse(CHANGES_VECTOR)
        form = fields.choice("encoding_format", ("float", "base64"))
        dimensions = fields.integer("dimensions", 1)
        if fields.boolean("stream"):
            raise invalid("Embeddings are not streamed.", "stream", "unsupported_parameter")
        shared = common(fields, request_id=request_id, api=self.api, capture=capture, key=key)
        shared["ignored_params"] += (["store"] if fields.boolean("store") else []) + fields.rest()
        request = Request(
            **{**shared, "left_open": []},
            model=model,
            params=SamplingParams(max_tokens=0, temperature=0.0, seed=0),
            prompts=inputs,
            embed=Embed(dimensions=dimensions),
        )
        return request, EmbeddingOptions(format="base64" if form == "base64" else "float")

    def reply(self, answer: Answer, options: Options) -> "EmbeddingsReply":
        """An answer in OpenAI's form."""
        assert isinstance(options, EmbeddingOptions)
        return EmbeddingsReply(answer, options)


def read_inputs(fields: Fields) -> list[str | list[int]]:
    """``input`` as a list of texts and lists of ids. Ids are checked against the vocabulary later."""
    value = fields.need("input")
    if isinstance(value, str):
        return [_text(fields, value, "input")]
    if not isinstance(value, list):
        raise fields.wrong("input", "a string, an array of strings, of integers, or of arrays", value)
    if not value:
        raise invalid("'input' must not be empty.", "input", "empty_array")
    if isinstance(value[0], int) and not isinstance(value[0], bool):
        return [fields.integers("input") or []]
    found: list[str | list[int]] = []
    for i, item in enumerate(fields.array("input", MAX_INPUTS) or ()):
        path = f"input[{i}]"
        if isinstance(item, str):
            found.append(_text(fields, item, path))
        elif isinstance(item, list):
            ids = Fields({path: item}).integers(path)
            if not ids:
                raise invalid(f"{path!r} must not be empty.", path, "empty_array")
            found.append(ids)
        else:
            raise fields.wrong(path, "a string or an array of integers", item)
    return found


def _text(fields: Fields, value: str, path: str) -> str:
    text = fields.checked(value, path)
    if not text:
        raise invalid(f"{path!r} must not be empty.", path, "empty_string")
    return text


class EmbeddingsReply:
    """``list`` of ``embedding`` objects, in the order of the inputs. Never streamed."""

    def __init__(self, answer: Answer, options: EmbeddingOptions) -> None:
        self._answer = answer
        self._format = options.format
        self._vectors: dict[int, bytes] = {}

    def take(self, delta: Delta) -> None:
        """Gather one vector."""
        if delta.vector is not None:
            self._vectors[delta.index] = delta.vector

    def whole(self, usage: Usage) -> bytes:
        """The answer as one JSON object."""
        data = [
            {"object": "embedding", "index": index, "embedding": self._written(vector)}
            for index, vector in sorted(self._vectors.items())
        ]
        return msgspec.json.encode(
            {
                "object": "list",
                "data": data,
                "model": self._answer.card.id,
                "usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens},
            }
        )

    def _written(self, vector: bytes) -> list[float] | str:
        values = array("f", vector)
        if self._format == "float":
            return values.tolist()
        if sys.byteorder == "big":  # the wire has little-endian float32
            values.byteswap()
        return base64.b64encode(values.tobytes()).decode()
