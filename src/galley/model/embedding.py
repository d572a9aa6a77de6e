"""How a model wants its texts embedded, as its file says."""

import msgspec
import numpy as np

from galley.errors import BadModelFile
from galley.model.gguf import GGUF
from galley.types import Pooling

__all__ = ["EmbeddingSpec"]

KINDS: dict[int, Pooling | None] = {0: None, 1: "mean", 2: "cls", 3: "last"}
"""``<arch>.pooling_type`` (llama.cpp's enum); 0 is none said, 4 a reranker's score."""
RANK = 4


class EmbeddingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Read from GGUF metadata.

    Attributes:
        pooling: the file's own, or ``mean``; None for a reranker, whose states are no embedding.
        stated: the file says so.
        dimensions: sizes to which its vectors may be cut (``<arch>.matryoshka_dimensions``), ascending; empty
            when the file does not say that it was trained for that.
        end: the token that closes a text (``tokenizer.ggml.add_eos_token``), or None.
    """

    pooling: Pooling | None
    stated: bool = False
    dimensions: tuple[int, ...] = ()
    end: int | None = None

    @classmethod
    def from_gguf(cls, gguf: GGUF, arch: str, *, hidden: int, vocab: int) -> "EmbeddingSpec":
        """Raises BadModelFile for a value that means nothing."""
        key = f"{arch}.pooling_type"
        kind = gguf.metadata.get(key, 0)
        if kind != RANK and (isinstance(kind, bool) or kind not in KINDS):
            raise BadModelFile(gguf.path, f"metadata[{key}]", f"{kind!r} is none of {[*KINDS, RANK]}")
        stated = kind != RANK and KINDS[kind] is not None
        end = None
        if gguf.metadata.get("tokenizer.ggml.add_eos_token") is True:
            end = gguf.metadata.get("tokenizer.ggml.eos_token_id")
            if not isinstance(end, int) or not 0 <= end < vocab:
                field = "metadata[tokenizer.ggml.eos_token_id]"
                raise BadModelFile(gguf.path, field, f"{end!r} is no token, but texts are to end with it")
        return cls(
            pooling=None if kind == RANK else KINDS[kind] or "mean",
            stated=stated,
            dimensions=_sizes(gguf, f"{arch}.matryoshka_dimensions", hidden),
            end=end,
        )

    def note(self, pooling: Pooling) -> str:
        """The pooling with where it is said."""
        if pooling != self.pooling:
            return f"{pooling} (asked for)"
        return f"{pooling} ({'model file' if self.stated else 'default: the model file names none'})"


def _sizes(gguf: GGUF, key: str, hidden: int) -> tuple[int, ...]:
    value = gguf.metadata.get(key)
    if value is None:
        return ()
    given = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(given, list) or not all(isinstance(one, int) and 1 <= one <= hidden for one in given):
        raise BadModelFile(gguf.path, f"metadata[{key}]", f"is not a list of sizes from 1 to {hidden}")
    return tuple(sorted(set(given)))
