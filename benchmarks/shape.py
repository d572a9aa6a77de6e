"""Bytes and operations of a model, read from its file: the numerators of every achieved rate."""

from pathlib import Path
from typing import Literal

import gguf
import msgspec

__all__ = ["Shape"]


class Shape(msgspec.Struct, frozen=True):
    """What one step must touch and compute, whatever the engine."""

    weight_bytes: int
    """Bytes in the file of all matrices a decode step reads, the layers' and the head's.

    The embedding is only looked up, unless it is the head.
    """
    layer_weights: int
    head_weights: int

    @classmethod
    def read(cls, path: Path) -> "Shape":
        tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
        head = tensors.get("output.weight", tensors["token_embd.weight"])
        layers = [t for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) == 2]
        return cls(
            weight_bytes=int(sum(t.n_bytes for t in layers) + head.n_bytes),
            layer_weights=int(sum(t.n_elements for t in layers)),
            head_weights=int(head.n_elements),
        )

    def operations(self, kind: Literal["decode", "prefill"], prompt: int, rate: float) -> float:
        """Operations a second at ``rate`` tokens a second; prefill needs the head for its last token only."""
        heads = self.head_weights if kind == "decode" else self.head_weights / prompt
        return 2.0 * (self.layer_weights + heads) * rate
