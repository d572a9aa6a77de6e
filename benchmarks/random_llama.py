"""A Llama of a given shape with random weights: the same values whichever file they are written to."""

import zlib
from collections.abc import Iterator

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "RandomLlama"]

Floats = npt.NDArray[np.float32]


class RandomLlama(msgspec.Struct, frozen=True):
    """Shape and seed of a model. Defaults: that of Llama 3.2 1B, with SmolLM2's vocabulary.

    Weights are normal with deviation 0.02 and rounded to bfloat16, so that a bfloat16 file holds them exactly
    and a quantised file is rounded once. Norms are ones. Input and output embedding are the same tensor.
    """

    name: str = "random-llama-1b"
    layers: int = 16
    hidden: int = 2048
    ffn: int = 8192
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    vocab: int = 49152
    context: int = 8192
    rope_theta: float = 500_000.0
    norm_epsilon: float = 1e-5
    seed: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """GGUF tensor names and shapes (rows first), in the order of the file."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab, self.hidden)}
        for i in range(self.layers):
            at = f"blk.{i}."
            shapes |= {
                at + "attn_norm.weight": (self.hidden,),
                at + "attn_q.weight": (query, self.hidden),
                at + "attn_k.weight": (key, self.hidden),
                at + "attn_v.weight": (key, self.hidden),
                at + "attn_output.weight": (self.hidden, query),
                at + "ffn_norm.weight": (self.hidden,),
                at + "ffn_gate.weight": (self.ffn, self.hidden),
                at + "ffn_up.weight": (self.ffn, self.hidden),
                at + "ffn_down.weight": (self.hidden, self.ffn),
            }
        return shapes | {"output_norm.weight": (self.hidden,)}

    def tensors(self) -> Iterator[tuple[str, Floats]]:
        """Names and float32 values, one at a time. Rows of q and k in GGUF's order for Llama."""
        for name, shape in self.shapes().items():
            yield name, self._tensor(name, shape)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Floats:
        if len(shape) == 1:
            return np.ones(shape, dtype=np.float32)
        # keyed by name: a tensor's values do not depend on which others were made before it
        noise = np.random.Generator(np.random.Philox(key=[self.seed, zlib.crc32(name.encode())]))
        values = noise.standard_normal(shape, dtype=np.float32)
        values *= np.float32(0.02)
        bits = values.view(np.uint32)
        bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to nearest even
        bits &= np.uint32(0xFFFF0000)
        return values
