"""ModelSpec: everything a backend must know about a decoder, as numbers."""

import msgspec


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of one dense decoder-only transformer.

    Tensors are named as in GGUF (``token_embd.weight``, ``blk.{i}.attn_q.weight`` …) and shaped
    [rows = outputs, columns = inputs], columns contiguous.

    Attributes:
        arch: ``llama``, ``qwen2`` or ``qwen3``.
        rope_interleaved: True rotates pairs (2i, 2i+1) (GGUF llama), False pairs (i, i + rope_dim/2).
        rope_factors: optional per-frequency divisors (Llama-3 scaling; GGUF ``rope_freqs.weight``), length
            rope_dim/2; angle = position * base**(-2i/rope_dim) / factor / rope_scale.
        rope_scale: linear position scaling (1 = none).
        qkv_bias: attn_{q,k,v}.bias exist. qk_norm: per-head RMS norm on q and k before RoPE.
        tied: the LM head is ``token_embd.weight``.
    """

    arch: str
    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rms_eps: float
    rope_base: float
    rope_dim: int
    rope_interleaved: bool
    rope_scale: float = 1.0
    rope_factors: tuple[float, ...] | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False

    @property
    def q_rows(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linear_params(self) -> int:
        """Weights in the layers' matrices (no embedding, no head)."""
        per_layer = (
            self.hidden * (self.q_rows + 2 * self.kv_rows)
            + self.q_rows * self.hidden
            + 3 * self.hidden * self.ffn
        )
        return self.layers * per_layer
