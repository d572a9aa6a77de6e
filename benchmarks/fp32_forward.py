"""The yardstick of accuracy: a plain fp32 forward of a llama-family GGUF over whole chunks, by BLAS.

Shares no code with the engine: weights are read and dequantised by the public ``gguf`` package, the
arithmetic is numpy's float32. A chunk is a fresh context; all its positions are computed at once.
"""

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

__all__ = ["Forward"]

F32 = npt.NDArray[np.float32]


class Forward:
    """Whole-chunk forward of one model, float32 throughout.

    Source: Touvron et al. 2023, "LLaMA" (RMS norm, interleaved rotary embedding as stored in GGUF, SwiGLU),
    with grouped-query attention. Cost: 2 * parameters * tokens operations plus causal attention.
    """

    def __init__(self, path: Path) -> None:
        """Read and dequantise every tensor. Raises ValueError for anything but a plain llama model."""
        reader = gguf.GGUFReader(path)
        self._fields = {
            name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.")
        }
        arch = self._value("general.architecture")
        if arch != "llama":
            raise ValueError(f"{path}: the fp32 reference covers llama models, not {arch!r}")
        if any(name.startswith("llama.rope.scaling") for name in self._fields):
            raise ValueError(f"{path}: scaled rotary embeddings are not covered")
        self.layers = int(self._value("llama.block_count"))
        self.heads = int(self._value("llama.attention.head_count"))
        self.kv_heads = int(self._value("llama.attention.head_count_kv"))
        self.eps = np.float32(self._value("llama.attention.layer_norm_rms_epsilon"))
        self.rope_base = float(self._value("llama.rope.freq_base"))
        self.rope_dim = int(self._value("llama.rope.dimension_count"))
        self.weights: dict[str, F32] = {}
        for tensor in reader.tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            self.weights[tensor.name] = np.ascontiguousarray(values, dtype=np.float32).reshape(shape)
        unknown = [n for n in self.weights if n.endswith(".bias") or "rope_freqs" in n or "_exps" in n]
        if unknown:
            raise ValueError(f"{path}: tensors the fp32 reference does not cover: {unknown[:3]}")
        self.head_dim = self.weights["blk.0.attn_q.weight"].shape[0] // self.heads
        if self.rope_dim != self.head_dim:
            raise ValueError(f"{path}: partial rotary embeddings are not covered")
        self.vocab = self.weights["token_embd.weight"].shape[0]

    def _value(self, name: str) -> float | str:
        if name not in self._fields:
            raise ValueError(f"metadata {name} is missing")
        value: float | str = self._fields[name].contents()
        return value

    def logits(self, ids: npt.NDArray[np.int32]) -> F32:
        """float32 [len(ids), vocab]: row i is the distribution of token i + 1."""
        count = len(ids)
        cos, sin = self._angles(count)
        blocked = np.triu(np.full((count, count), -np.inf, dtype=np.float32), k=1)
        x = self.weights["token_embd.weight"][ids]
        for layer in range(self.layers):
            prefix = f"blk.{layer}."
            x = x + self._attend(prefix, self._norm(x, prefix + "attn_norm.weight"), cos, sin, blocked)
            x = x + self._feed(prefix, self._norm(x, prefix + "ffn_norm.weight"))
        head = self.weights.get("output.weight", self.weights["token_embd.weight"])
        out: F32 = self._norm(x, "output_norm.weight") @ head.T
        return out

    def _norm(self, x: F32, name: str) -> F32:
        mean = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
        out: F32 = (x / np.sqrt(mean + self.eps) * self.weights[name]).astype(np.float32, copy=False)
        return out

    def _angles(self, count: int) -> tuple[F32, F32]:
        """cos and sin [count, 1, rope_dim / 2]; angles in double: a large position loses bits in fp32."""
        frequency = self.rope_base ** (-np.arange(0, self.rope_dim, 2, dtype=np.float64) / self.rope_dim)
        angle = np.arange(count, dtype=np.float64)[:, None] * frequency[None, :]
        return np.cos(angle).astype(np.float32)[:, None, :], np.sin(angle).astype(np.float32)[:, None, :]

    @staticmethod
    def _rotate(x: F32, cos: F32, sin: F32) -> F32:
        """Turn the pairs (2i, 2i + 1) of [tokens, heads, dim]."""
        out = np.empty_like(x)
        even, odd = x[..., 0::2], x[..., 1::2]
        out[..., 0::2] = even * cos - odd * sin
        out[..., 1::2] = even * sin + odd * cos
        return out

    def _attend(self, prefix: str, x: F32, cos: F32, sin: F32, blocked: F32) -> F32:
        count = len(x)
        q = (x @ self.weights[prefix + "attn_q.weight"].T).reshape(count, self.heads, self.head_dim)
        k = (x @ self.weights[prefix + "attn_k.weight"].T).reshape(count, self.kv_heads, self.head_dim)
        v = (x @ self.weights[prefix + "attn_v.weight"].T).reshape(count, self.kv_heads, self.head_dim)
        q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        group = self.heads // self.kv_heads
        scale = np.float32(1.0 / np.sqrt(self.head_dim))
        out = np.empty_like(q)
        for head in range(self.heads):
            score = q[:, head] @ k[:, head // group].T * scale + blocked
            score -= score.max(axis=-1, keepdims=True)
            np.exp(score, out=score)
            score /= score.sum(axis=-1, keepdims=True)
            out[:, head] = score @ v[:, head // group]
        result: F32 = out.reshape(count, -1) @ self.weights[prefix + "attn_output.weight"].T
        return result

    def _feed(self, prefix: str, x: F32) -> F32:
        gate = x @ self.weights[prefix + "ffn_gate.weight"].T
        up = x @ self.weights[prefix + "ffn_up.weight"].T
        out: F32 = (gate / (1.0 + np.exp(-gate)) * up) @ self.weights[prefix + "ffn_down.weight"].T
        return out
