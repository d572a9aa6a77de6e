"""Block formats of GGUF tensors: bytes to float32, and back for the formats Galley writes.

Layouts follow ggml's ``ggml-common.h``; the decoded values are bit-exact with ggml's own reference decoder
(FMT-a), and the encoded bytes equal those of its reference encoder (FMT-b). A block never crosses a row.
"""

from collections.abc import Callable
from enum import IntEnum
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class GGMLType(IntEnum):
    """Tensor types, with ggml's ids. Ids that ggml withdrew (4, 5, 31–33, 36–38) are absent."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41


class BlockFormat(NamedTuple):
    """``block`` values are stored in ``nbytes`` bytes."""

    block: int
    nbytes: int


BLOCKS: dict[GGMLType, BlockFormat] = {
    GGMLType.F32: BlockFormat(1, 4),
    GGMLType.F16: BlockFormat(1, 2),
    GGMLType.BF16: BlockFormat(1, 2),
    GGMLType.F64: BlockFormat(1, 8),
    GGMLType.I8: BlockFormat(1, 1),
    GGMLType.I16: BlockFormat(1, 2),
    GGMLType.I32: BlockFormat(1, 4),
    GGMLType.I64: BlockFormat(1, 8),
    GGMLType.Q4_0: BlockFormat(32, 18),
    GGMLType.Q4_1: BlockFormat(32, 20),
    GGMLType.Q5_0: BlockFormat(32, 22),
    GGMLType.Q5_1: BlockFormat(32, 24),
    GGMLType.Q8_0: BlockFormat(32, 34),
    GGMLType.Q2_K: BlockFormat(256, 84),
    GGMLType.Q3_K: BlockFormat(256, 110),
    GGMLType.Q4_K: BlockFormat(256, 144),
    GGMLType.Q5_K: BlockFormat(256, 176),
    GGMLType.Q6_K: BlockFormat(256, 210),
    GGMLType.IQ2_XXS: BlockFormat(256, 66),
    GGMLType.IQ2_XS: BlockFormat(256, 74),
    GGMLType.IQ2_S: BlockFormat(256, 82),
    GGMLType.IQ3_XXS: BlockFormat(256, 98),
    GGMLType.IQ3_S: BlockFormat(256, 110),
    GGMLType.IQ1_S: BlockFormat(256, 50),
    GGMLType.IQ1_M: BlockFormat(256, 56),
    GGMLType.IQ4_NL: BlockFormat(32, 18),
    GGMLType.IQ4_XS: BlockFormat(256, 136),
    GGMLType.TQ1_0: BlockFormat(256, 54),
    GGMLType.TQ2_0: BlockFormat(256, 66),
    GGMLType.MXFP4: BlockFormat(32, 17),
    GGMLType.NVFP4: BlockFormat(64, 36),
    GGMLType.Q1_0: BlockFormat(128, 18),
}
"""Every type a file may hold; ``DECODABLE`` is the part Galley computes with."""

_CHUNK = 1 << 14
"""Blocks decoded at a time, so that temporaries stay in cache and small beside the result."""


def _half(raw: Bytes) -> Floats:
    """Little-endian f16 columns [n, 2k] -> float32 [n, k]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes, group: int) -> Bytes:
    """[n, b] -> [n, 2b]: within each ``group`` bytes, all low nibbles come first, then all high ones."""
    n, b = packed.shape
    pairs = packed.reshape(n, b // group, 1, group)
    return np.concatenate([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=2).reshape(n, 2 * b)


def _bits32(raw: Bytes) -> Bytes:
    """A little-endian u32 per row [n, 4] -> its bits, lowest first [n, 32]."""
    return np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little")


def _f32(raw: Bytes) -> Floats:
    return raw.view("<f4").astype(np.float32, copy=False)


def _bf16(raw: Bytes) -> Floats:
    wide = np.ascontiguousarray(raw).view("<u2").astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


def _q4_0(raw: Bytes) -> Floats:
    return _half(raw[:, :2]) * (_nibbles(raw[:, 2:], 16).astype(np.float32) - np.float32(8))


def _q4_1(raw: Bytes) -> Floats:
    return _half(raw[:, :2]) * _nibbles(raw[:, 4:], 16).astype(np.float32) + _half(raw[:, 2:4])


def _q5_0(raw: Bytes) -> Floats:
    level = _nibbles(raw[:, 6:], 16) | (_bits32(raw[:, 2:6]) << np.uint8(4))
    return _half(raw[:, :2]) * (level.astype(np.float32) - np.float32(16))


def _q5_1(raw: Bytes) -> Floats:
    level = _nibbles(raw[:, 8:], 16) | (_bits32(raw[:, 4:8]) << np.uint8(4))
    return _half(raw[:, :2]) * level.astype(np.float32) + _half(raw[:, 2:4])


def _q8_0(raw: Bytes) -> Floats:
    return raw[:, 2:].view(np.int8).astype(np.float32) * _half(raw[:, :2])


def _k_scales(packed: Bytes) -> tuple[Floats, Floats]:
    """The 12 bytes of eight 6-bit scales and eight 6-bit minima -> two float32 [n, 8]."""
    low, mid, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    minimum = np.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _k_affine(raw: Bytes, level: Bytes) -> Floats:
    """Q4_K and Q5_K: eight sub-blocks of 32 levels under one f16 pair (d, dmin)."""
    scale, minimum = _k_scales(raw[:, 4:16])
    step = (_half(raw[:, 0:2]) * scale)[:, :, None]
    floor = (_half(raw[:, 2:4]) * minimum)[:, :, None]
    values: Floats = step * level.reshape(-1, 8, 32).astype(np.float32) - floor
    return values.reshape(-1, 256)


def _q4_k(raw: Bytes) -> Floats:
    return _k_affine(raw, _nibbles(raw[:, 16:], 32))


def _q5_k(raw: Bytes) -> Floats:
    # Bit j of high byte l is the fifth bit of value l of sub-block j.
    bits = np.unpackbits(raw[:, 16:48][:, :, None], axis=2, bitorder="little").transpose(0, 2, 1)
    high = bits.reshape(-1, 256) << np.uint8(4)
    return _k_affine(raw, _nibbles(raw[:, 48:], 32) | high)


def _q6_k(raw: Bytes) -> Floats:
    n = raw.shape[0]
    low = _nibbles(raw[:, :128], 64)
    pairs = raw[:, 128:192].reshape(n, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    high = ((pairs >> shifts) & np.uint8(3)).reshape(n, 256) << np.uint8(4)
    level = (low | high).astype(np.float32) - np.float32(32)
    step = _half(raw[:, 208:210]) * raw[:, 192:208].view(np.int8).astype(np.float32)
    values: Floats = step[:, :, None] * level.reshape(n, 16, 16)
    return values.reshape(n, 256)


_DECODERS: dict[GGMLType, Callable[[Bytes], Floats]] = {
    GGMLType.F32: _f32,
    GGMLType.F16: _half,
    GGMLType.BF16: _bf16,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
}

DECODABLE: frozenset[GGMLType] = frozenset(_DECODERS)


def tensor_nbytes(kind: GGMLType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of ``shape`` (columns last). ValueError if a row is not a whole number of blocks."""
    block, nbytes = BLOCKS[kind]
    if not shape or shape[-1] % block:
        raise ValueError(
            f"rows of {shape[-1] if shape else 0} values are no multiple of the {kind.name} block {block}"
        )
    return prod(shape) // block * nbytes


def dequantize(raw: Bytes, kind: GGMLType, shape: tuple[int, ...]) -> Floats:
    """Decode a tensor: uint8 1-D ``raw`` -> float32 array of ``shape``, a fresh array.

    Bit-exact with ggml's reference decoder (FMT-a). Temporaries are bounded by a chunk of blocks.
    Raises ValueError for a type outside ``DECODABLE`` or when ``raw`` and ``shape`` disagree.
    """
    decode = _DECODERS.get(kind)
    if decode is None:
        raise ValueError(f"no decoder for tensor type {kind.name}")
    expected = tensor_nbytes(kind, shape)
    if raw.dtype != np.uint8 or raw.size != expected:
        raise ValueError(
            f"{kind.name} of shape {shape} takes {expected} bytes, got {raw.size} of {raw.dtype}"
        )
    block, nbytes = BLOCKS[kind]
    rows = np.ascontiguousarray(raw).reshape(-1, nbytes)
    out = np.empty((rows.shape[0], block), dtype=np.float32)
    step = max(1, _CHUNK * 32 // block)
    # A damaged scale may be an infinity or a NaN: the decoder passes it on, the caller judges.
    with np.errstate(all="ignore"):
        for start in range(0, rows.shape[0], step):
            out[start : start + step] = decode(rows[start : start + step])
    return out.reshape(shape)


def _pack_nibbles(level: Bytes) -> Bytes:
    return level[:, :16] | (level[:, 16:] << np.uint8(4))


def _inverse(step: Floats) -> Floats:
    return np.where(step == 0, np.float32(0), np.float32(1) / step)


def _half_bytes(values: Floats) -> Bytes:
    return values.astype("<f2").view(np.uint8)


def _to_q4_0(x: Floats) -> Bytes:
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    step = peak / np.float32(-8)  # signed, so that the largest magnitude lands on level 0 exactly
    level = np.trunc(x * _inverse(step) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([_half_bytes(step), _pack_nibbles(level)], axis=1)


def _to_q4_1(x: Floats) -> Bytes:
    low = x.min(axis=1, keepdims=True)
    step = (x.max(axis=1, keepdims=True) - low) / np.float32(15)
    level = np.trunc((x - low) * _inverse(step) + np.float32(0.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([_half_bytes(step), _half_bytes(low), _pack_nibbles(level)], axis=1)


def _to_q8_0(x: Floats) -> Bytes:
    step = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(step)
    size = np.abs(scaled)
    whole = np.floor(size)
    # Halves round away from zero, as C's roundf does.
    level = np.sign(scaled) * (whole + np.floor(np.float32(2) * (size - whole)))
    return np.concatenate([_half_bytes(step), level.astype(np.int8).view(np.uint8)], axis=1)


def _to_f16(x: Floats) -> Bytes:
    return x.astype("<f2").view(np.uint8)


def _to_bf16(x: Floats) -> Bytes:
    bits = x.view(np.uint32)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    quiet = (bits & np.uint32(0xFFFF0000)) | np.uint32(64 << 16)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))  # to nearest even
    return (np.where(nan, quiet, rounded) >> np.uint32(16)).astype("<u2").view(np.uint8)


_ENCODERS: dict[GGMLType, Callable[[Floats], Bytes]] = {
    GGMLType.F16: _to_f16,
    GGMLType.BF16: _to_bf16,
    GGMLType.Q4_0: _to_q4_0,
    GGMLType.Q4_1: _to_q4_1,
    GGMLType.Q8_0: _to_q8_0,
}

ENCODABLE: frozenset[GGMLType] = frozenset(_ENCODERS)


def quantize(x: Floats, kind: GGMLType) -> Bytes:
    """Encode float32 ``x`` [..., columns] -> uint8 [..., bytes per row]; finite input.

    Round to nearest within each block, the same bytes as ggml's reference encoder (FMT-b).
    Raises ValueError for a type outside ``ENCODABLE`` or rows that are no whole number of blocks.
    """
    encode = _ENCODERS.get(kind)
    if encode is None:
        raise ValueError(f"no encoder for tensor type {kind.name}")
    values = np.ascontiguousarray(x, dtype=np.float32)
    tensor_nbytes(kind, values.shape)
    block, nbytes = BLOCKS[kind]
    rows = values.reshape(-1, block)
    out = np.empty((rows.shape[0], nbytes), dtype=np.uint8)
    step = max(1, _CHUNK * 32 // block)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        for start in range(0, rows.shape[0], step):
            out[start : start + step] = encode(rows[start : start + step])
    return out.reshape(*values.shape[:-1], values.shape[-1] // block * nbytes)
