"""The reference backend: plain numpy in float32, written to be read.

It is the oracle of the native kernels, and serves where they cannot be built.

Every row's result is bit for bit the same whatever shares its step (SMP-6). BLAS does not promise that: which
kernel computes a row may depend on how many rows there are. So the number of rows of a product is fixed here
(``Linear``), and attention goes query by query.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from galley.errors import EngineFault
from galley.model.quant.blocks import dequantize
from galley.model.spec import ModelSpec
from galley.runtime.backend.rows import TILE, Linear
from galley.runtime.plan import Drawn, Draws, Rows
from galley.runtime.sampling.logits import draw

if TYPE_CHECKING:
    from galley.model.adapter import Adapter
    from galley.model.gguf import GGUF

__all__ = ["Linear", "ReferenceBackend"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

REVISION = 1
"""Raised whenever a change here changes the bits of a result."""


class _Layer:
    """Weights of one decoder layer."""

    def __init__(self, spec: ModelSpec, index: int, weights: "_Weights") -> None:
        def linear(name: str, *, bias: bool = False) -> Linear:
            return weights.linear(f"blk.{index}.{name}", bias=bias)

        def vector(name: str) -> Floats:
            return weights.take(f"blk.{index}.{name}.weight")

        self.attn_norm = vector("attn_norm")
        self.q = linear("attn_q", bias=spec.qkv_bias)
        self.k = linear("attn_k", bias=spec.qkv_bias)
        self.v = linear("attn_v", bias=spec.qkv_bias)
        self.o = linear("attn_output")
        self.q_norm = vector("attn_q_norm") if spec.qk_norm else None
        self.k_norm = vector("attn_k_norm") if spec.qk_norm else None
        self.ffn_norm = vector("ffn_norm")
        self.gate = linear("ffn_gate")
        self.up = linear("ffn_up")
        self.down = linear("ffn_down")


class _Weights:
    """Dequantised tensors by GGUF name; counts the bytes handed out for linears and norms."""

    def __init__(self, gguf: "GGUF", given: Mapping[str, Floats]) -> None:
        self._gguf = gguf
        self._given = given
        self._proven: dict[tuple[int, ...], bool] = {}
        self.nbytes = 0

    def take(self, name: str) -> Floats:
        """float32, contiguous. Raises KeyError for a tensor that is nowhere."""
        if name in self._given:
            tensor = np.ascontiguousarray(self._given[name], dtype=np.float32)
        else:
            info = self._gguf.tensors[name]
            tensor = np.ascontiguousarray(dequantize(self._gguf.raw(name), info.type, info.shape))
        self.nbytes += tensor.nbytes
        return tensor

    def linear(self, name: str, *, bias: bool = False) -> Linear:
        return Linear(self.take(name + ".weight"), self.take(name + ".bias") if bias else None, self._proven)

    def head(self, embedding: Floats) -> Linear:
        """The embedding as LM head."""
        self.nbytes += embedding.nbytes
        return Linear(embedding, None, self._proven)

    @property
    def tiled(self) -> bool:
        return all(self._proven.values())


class _Sequence:
    """One sequence of a step: where its tokens lie in the step, in its text and in the KV arena."""

    def __init__(self, rows: Rows, index: int, block_size: int) -> None:
        self.start, self.end = rows.seq_start[index], rows.seq_start[index + 1]
        self.context = rows.context[index]
        self.length = self.context + self.end - self.start
        table = np.array(rows.blocks[rows.block_start[index] : rows.block_start[index + 1]], dtype=np.int64)
        if self.context < 0 or self.end <= self.start or len(table) * block_size < self.length:
            raise EngineFault(
                f"Sequence {index} of the step has {self.end - self.start} tokens at {self.context}, "
                f"which {len(table)} blocks of {block_size} do not hold."
            )
        places = np.arange(self.length)
        self.slots: Ints = table[places // block_size] * block_size + places % block_size
        """Arena slot of every position up to ``length``."""


class _Adapted:
    """The rows of a step that have adapters, each with its adapter's pairs."""

    def __init__(self, rows: dict[int, Mapping[str, tuple[Floats, Floats]]]) -> None:
        self.rows = rows

    def add(self, y: Floats, name: str, x: Floats) -> Floats:
        """``y += B (A x)`` row by row, so that no row depends on another; ``y`` itself, changed."""
        for row, pairs in self.rows.items():
            if name in pairs:
                a, b = pairs[name]
                y[row] += b @ (a @ np.ascontiguousarray(x[row]))
        return y


class ReferenceBackend:
    """Satisfies ``Backend`` in numpy.

    KV is float32 [layers, blocks, block_size, kv_heads, head_dim], one array for keys, one for values. A step
    costs what its arithmetic costs plus some tens of microseconds of Python per layer and row.

    Args:
        gguf: where tensors come from; dequantised to float32 at construction (4 bytes a weight).
        num_blocks: KV blocks.
        weights: float32 arrays that replace the file's tensors of the same name (tests, adapters' merges).

    Raises KeyError for a missing tensor, ValueError for one of another shape than ``spec`` says.
    """

    name = "reference"
    isa = "numpy"
    kv_dtype = "f32"

    def __init__(
        self,
        gguf: "GGUF",
        spec: ModelSpec,
        *,
        num_blocks: int,
        block_size: int = 16,
        weights: Mapping[str, Floats] | None = None,
    ) -> None:
        self.spec = spec
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.threads = _processors()
        """Upper bound: numpy's BLAS decides how many it uses."""
        source = _Weights(gguf, weights or {})
        self._embedding = source.take("token_embd.weight")
        source.nbytes = 0  # the embedding is read one row at a time
        if self._embedding.shape != (spec.vocab, spec.hidden):
            raise ValueError(f"token_embd.weight has shape {self._embedding.shape}, not that of the model")
        self._layers = [_Layer(spec, index, source) for index in range(spec.layers)]
        self._norm = source.take("output_norm.weight")
        self._head = source.head(self._embedding) if spec.tied else source.linear("output")
        self.weight_bytes = source.nbytes
        self.kv_bytes_per_token = 2 * spec.layers * spec.kv_rows * self._embedding.itemsize
        self.block_bytes = self.kv_bytes_per_token * block_size
        shape = (spec.layers, num_blocks, block_size, spec.kv_heads, spec.head_dim)
        self._keys: Floats = np.zeros(shape, dtype=np.float32)
        self._values: Floats = np.zeros(shape, dtype=np.float32)
        self._cos, self._sin = _rope_table(spec)
        self._logits: Floats = np.empty((0, spec.vocab), dtype=np.float32)
        self._states: Floats = np.empty((0, spec.hidden), dtype=np.float32)
        self._adapters: dict[int, Mapping[str, tuple[Floats, Floats]]] = {}
        self._closed = False
        self.fingerprint = _fingerprint(source.tiled)

    def run(self, rows: Rows) -> None:
        """See ``Backend.run``. Raises EngineFault for arrays that do not fit the model or the arena."""
        if self._closed:
            raise EngineFault("The backend is closed.")
        tokens = np.array(rows.tokens, dtype=np.int64)
        sequences = [_Sequence(rows, index, self.block_size) for index in range(len(rows))]
        out = np.array(rows.out, dtype=np.int64)
        states = np.array(rows.states, dtype=np.int64)
        self._check(tokens, sequences, out)
        self._check(tokens, sequences, states)
        positions = np.concatenate([np.arange(s.context, s.length) for s in sequences])
        turn = self._cos[positions][:, None, :], self._sin[positions][:, None, :]
        x = self._embedding[tokens]
        adapted = self._adapted(rows, sequences)
        for index, layer in enumerate(self._layers):
            blk = f"blk.{index}."
            inner = rms_norm(x, layer.attn_norm, self._eps)
            mixed = self._attend(index, inner, turn, sequences, adapted)
            x = x + adapted.add(layer.o(mixed), blk + "attn_output", mixed)
            inner = rms_norm(x, layer.ffn_norm, self._eps)
            gate = adapted.add(layer.gate(inner), blk + "ffn_gate", inner)
            inner = silu(gate) * adapted.add(layer.up(inner), blk + "ffn_up", inner)
            x = x + adapted.add(layer.down(inner), blk + "ffn_down", inner)
        self._logits = self._head(rms_norm(x[out], self._norm, self._eps))
        self._states = rms_norm(x[states], self._norm, self._eps)

    def sample(self, draws: Draws) -> Drawn:
        """See ``Backend.sample`` and ``sampling.logits.draw``."""
        return draw(self._logits, draws)

    def logits(self) -> Floats:
        """See ``Backend.logits``."""
        return self._logits.copy()

    def place_adapter(self, slot: int, adapter: "Adapter | None") -> None:
        """See ``Backend.place_adapter``."""
        if adapter is None:
            self._adapters.pop(slot, None)
        else:
            self._adapters[slot] = adapter.pairs

    def states(self) -> Floats:
        """See ``Backend.states``."""
        return self._states.copy()

    def read_block(self, block: int) -> bytes:
        """See ``Backend.read_block``: keys [layers, block_size, kv_heads, head_dim], then values, float32."""
        self._known(block)
        return self._keys[:, block].tobytes() + self._values[:, block].tobytes()

    def write_block(self, block: int, data: bytes | memoryview) -> None:
        """See ``Backend.write_block``."""
        self._known(block)
        if len(data) != self.block_bytes:
            raise EngineFault(f"A KV block has {self.block_bytes} bytes, not {len(data)}.")
        keys, values = np.frombuffer(data, np.float32).reshape(2, *self._keys[:, block].shape)
        self._keys[:, block] = keys
        self._values[:, block] = values

    def close(self) -> None:
        """See ``Backend.close``."""
        self._closed = True
        self._layers = []
        self._keys = self._values = np.zeros((0, 0, 0, 0, 0), dtype=np.float32)
        self._embedding = self._logits = np.zeros((0, self.spec.vocab), dtype=np.float32)
        self._states = np.zeros((0, self.spec.hidden), dtype=np.float32)
        self._head = Linear(self._embedding, None, {self._embedding.shape: False})

    def _known(self, block: int) -> None:
        if self._closed or not 0 <= block < self.num_blocks:
            raise EngineFault(f"There is no KV block {block}.")

    def _adapted(self, rows: Rows, sequences: list[_Sequence]) -> _Adapted:
        """Raises EngineFault for a slot that is empty."""
        found: dict[int, Mapping[str, tuple[Floats, Floats]]] = {}
        for slot, sequence in zip(rows.adapters, sequences, strict=False):
            if slot < 0:
                continue
            if slot not in self._adapters:
                raise EngineFault(f"The adapter slot {slot} is empty.")
            found |= dict.fromkeys(range(sequence.start, sequence.end), self._adapters[slot])
        return _Adapted(found)

    @property
    def _eps(self) -> np.float32:
        return np.float32(self.spec.rms_eps)

    def _check(self, tokens: Ints, sequences: list[_Sequence], out: Ints) -> None:
        if not sequences:
            raise EngineFault("The step has no sequence.")
        if tokens.min() < 0 or tokens.max() >= self.spec.vocab:
            raise EngineFault(f"A token id lies outside 0..{self.spec.vocab - 1}.")
        if len(out) and (out.min() < 0 or out.max() >= len(tokens)):
            raise EngineFault("An output row lies outside the step.")
        slots = self.num_blocks * self.block_size
        for sequence in sequences:
            if sequence.length > len(self._cos):
                raise EngineFault(
                    f"Position {sequence.length - 1} lies beyond the context of {len(self._cos)}."
                )
            if sequence.slots.min() < 0 or sequence.slots.max() >= slots:
                raise EngineFault(f"A block id lies outside 0..{self.num_blocks - 1}.")

    def _attend(
        self,
        index: int,
        x: Floats,
        turn: tuple[Floats, Floats],
        sequences: list[_Sequence],
        adapted: "_Adapted",
    ) -> Floats:
        """Attention of one layer, [rows, hidden] -> [rows, q_rows]; writes the rows' keys and values."""
        spec, layer, (cos, sin) = self.spec, self._layers[index], turn
        blk = f"blk.{index}."
        q = adapted.add(layer.q(x), blk + "attn_q", x).reshape(-1, spec.heads, spec.head_dim)
        k = adapted.add(layer.k(x), blk + "attn_k", x).reshape(-1, spec.kv_heads, spec.head_dim)
        v = adapted.add(layer.v(x), blk + "attn_v", x).reshape(-1, spec.kv_heads, spec.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, self._eps), rms_norm(k, layer.k_norm, self._eps)
        q = rotate(q, cos, sin, spec.rope_interleaved) * np.float32(spec.head_dim**-0.5)
        k = rotate(k, cos, sin, spec.rope_interleaved)
        keys = self._keys[index].reshape(-1, spec.kv_heads, spec.head_dim)
        values = self._values[index].reshape(-1, spec.kv_heads, spec.head_dim)
        for s in sequences:
            keys[s.slots[s.context :]] = k[s.start : s.end]
            values[s.slots[s.context :]] = v[s.start : s.end]
        mixed = np.empty(
            (len(x), spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim), dtype=np.float32
        )
        for s in sequences:
            # Gathered into [kv_heads, length, head_dim], so that where the blocks lie is forgotten.
            near = np.ascontiguousarray(keys[s.slots].swapaxes(0, 1))
            far = np.ascontiguousarray(values[s.slots].swapaxes(0, 1))
            for row in range(s.start, s.end):
                seen = s.context + row - s.start + 1
                # Query head h belongs to KV head h // (heads / kv_heads).
                query = np.ascontiguousarray(q[row]).reshape(spec.kv_heads, -1, spec.head_dim)
                score = query @ near[:, :seen].swapaxes(1, 2)
                weight = np.exp(score - score.max(axis=2, keepdims=True))
                weight /= weight.sum(axis=2, keepdims=True)
                mixed[row] = weight @ far[:, :seen]
        return mixed.reshape(len(x), spec.q_rows)


def rms_norm(x: Floats, weight: Floats, eps: np.float32) -> Floats:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (Zhang and Sennrich, 2019)."""
    power = np.mean(np.square(x), axis=-1, keepdims=True)
    normed: Floats = x / np.sqrt(power + eps) * weight
    return normed


def silu(x: Floats) -> Floats:
    """``x * sigmoid(x)``, by way of exp(-|x|), which cannot overflow."""
    one = np.ones((), dtype=np.float32)
    small: Floats = np.exp(-np.abs(x))
    above = np.where(x >= 0, one, small)
    value: Floats = np.divide(x * above, one + small, dtype=np.float32)
    return value


def rotate(x: Floats, cos: Floats, sin: Floats, interleaved: bool) -> Floats:
    """Rotary position embedding (Su et al., 2021) of [rows, heads, head_dim]; cos, sin [rows, 1, rope_dim/2].

    Rotates the pairs (2i, 2i+1) when interleaved, else (i, i + rope_dim/2). Dimensions past rope_dim stay.
    """
    half = cos.shape[-1]
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def _rope_table(spec: ModelSpec) -> tuple[Floats, Floats]:
    """cos and sin of every position, float32 [context, rope_dim/2], from angles in float64."""
    pairs = spec.rope_dim // 2
    frequency = spec.rope_base ** (-2.0 * np.arange(pairs) / spec.rope_dim) / spec.rope_scale
    if spec.rope_factors is not None:
        frequency = frequency / np.array(spec.rope_factors, dtype=np.float64)
    angle = np.outer(np.arange(spec.context, dtype=np.float64), frequency)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fingerprint(tiled: bool) -> str:
    """Everything that may change the bits: this file, numpy, its BLAS and SIMD, the product's shape."""
    build = np.show_config(mode="dicts")
    parts = (REVISION, np.__version__, build, _processors(), TILE if tiled else 1)
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return f"reference-{REVISION}-{digest[:12]}"
