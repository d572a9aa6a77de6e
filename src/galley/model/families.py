"""Families of decoders: what differs between architectures, as data, and GGUF metadata -> ModelSpec.

A model is accepted only when every tensor its family needs is there, in the right shape, in a type
Galley computes with, and nothing in its metadata asks for arithmetic Galley does not do.
"""

import math
from typing import Any

import msgspec
import numpy as np

from galley.errors import BadModelFile
from galley.model.gguf import GGUF, TensorInfo
from galley.model.quant.blocks import DECODABLE, dequantize
from galley.model.spec import ModelSpec


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """How one architecture departs from the common decoder.

    Attributes:
        rope_interleaved: RoPE rotates pairs (2i, 2i+1); else (i, i + rope_dim/2).
        qkv_bias: attn_{q,k,v}.bias are required (else they are refused).
        qk_norm: attn_{q,k}_norm.weight of head_dim are required (else they are refused).
        refused: metadata keys (without the ``arch.`` prefix) that ask for other arithmetic when they are
            set to something other than the given neutral value.
    """

    rope_interleaved: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    refused: dict[str, Any] = {}


_COMMON_REFUSED: dict[str, Any] = {
    "expert_count": 0,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 0.0,
    "embedding_scale": 0.0,
    "residual_scale": 0.0,
    "use_parallel_residual": False,
    "attention.causal": True,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(rope_interleaved=True, refused=_COMMON_REFUSED),
    "qwen2": Family(rope_interleaved=False, qkv_bias=True, refused=_COMMON_REFUSED),
    "qwen3": Family(rope_interleaved=False, qk_norm=True, refused=_COMMON_REFUSED),
}

_LIMITS: dict[str, int] = {
    "block_count": 1 << 10,
    "embedding_length": 1 << 17,
    "feed_forward_length": 1 << 19,
    "attention.head_count": 1 << 10,
    "attention.head_count_kv": 1 << 10,
    "attention.key_length": 1 << 12,
    "attention.value_length": 1 << 12,
    "context_length": 1 << 24,
    "rope.dimension_count": 1 << 12,
}


class _Metadata:
    """Typed reads of one architecture's keys; every fault names the key."""

    def __init__(self, gguf: GGUF, arch: str) -> None:
        self.gguf = gguf
        self.arch = arch

    def fault(self, key: str, problem: str, hint: str | None = None) -> BadModelFile:
        return BadModelFile(self.gguf.path, f"metadata[{self.arch}.{key}]", problem, hint=hint)

    def get(self, key: str) -> Any:
        return self.gguf.metadata.get(f"{self.arch}.{key}")

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.fault(key, "is missing")
            return default
        if isinstance(value, np.ndarray):
            # Some converters write one number per layer; equal ones mean the same as a single number.
            if (
                value.ndim != 1
                or value.size == 0
                or value.dtype.kind not in "iu"
                or (value != value[0]).any()
            ):
                raise self.fault(key, "differs from layer to layer, which Galley does not support")
            value = int(value[0])
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fault(key, f"is not an integer but {type(value).__name__}")
        if not 1 <= value <= _LIMITS[key]:
            raise self.fault(key, f"{value} is not within 1..{_LIMITS[key]}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.fault(key, "is missing")
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.fault(key, f"is not a number but {type(value).__name__}")
        if not (math.isfinite(value) and value > 0):
            raise self.fault(key, f"{value} is not a positive finite number")
        return float(value)


def spec_from_gguf(gguf: GGUF) -> ModelSpec:
    """Read and check the shape of a model. Raises BadModelFile naming the key or the tensor at fault.

    Checked: the architecture, every number, RoPE scaling (none, linear, or per-frequency factors in
    ``rope_freqs.weight``; others are refused), presence, shape and type of every tensor.
    """
    arch = gguf.metadata.get("general.architecture")
    family = FAMILIES.get(arch) if isinstance(arch, str) else None
    if family is None or not isinstance(arch, str):
        raise BadModelFile(
            gguf.path,
            "metadata[general.architecture]",
            f"{arch!r} is not supported; Galley runs {', '.join(sorted(FAMILIES))}",
        )
    meta = _Metadata(gguf, arch)
    for key, neutral in family.refused.items():
        value = meta.get(key)
        if value is not None and not np.array_equal(value, neutral):
            raise meta.fault(key, f"{value!r}: this variant of {arch} is not supported")

    hidden = meta.count("embedding_length")
    heads = meta.count("attention.head_count")
    kv_heads = meta.count("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise meta.fault("attention.head_count_kv", f"{kv_heads} does not divide the {heads} query heads")
    if meta.get("attention.key_length") is None and hidden % heads:
        raise meta.fault("attention.head_count", f"{heads} does not divide embedding_length {hidden}")
    head_dim = meta.count("attention.key_length", hidden // heads)
    value_dim = meta.count("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise meta.fault("attention.value_length", f"{value_dim} differs from the key length {head_dim}")
    if head_dim % 2:
        raise meta.fault("attention.key_length", f"{head_dim} is odd; RoPE needs pairs")
    rope_dim = meta.count("rope.dimension_count", head_dim)
    if rope_dim % 2 or rope_dim > head_dim:
        raise meta.fault("rope.dimension_count", f"{rope_dim} is odd or over the head's {head_dim}")
    embedding = _tensor(gguf, "token_embd.weight", (None, hidden))
    name = gguf.metadata.get("general.name", arch)

    spec = ModelSpec(
        arch=arch,
        name=name if isinstance(name, str) else arch,
        layers=meta.count("block_count"),
        hidden=hidden,
        ffn=meta.count("feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=embedding.shape[0],
        context=meta.count("context_length"),
        rms_eps=meta.positive("attention.layer_norm_rms_epsilon"),
        rope_base=meta.positive("rope.freq_base", 10000.0),
        rope_dim=rope_dim,
        rope_interleaved=family.rope_interleaved,
        rope_scale=_rope_scale(meta),
        rope_factors=_rope_factors(gguf, rope_dim),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied="output.weight" not in gguf.tensors,
    )
    _check_tensors(gguf, spec)
    return spec


def _rope_scale(meta: _Metadata) -> float:
    kind = meta.get("rope.scaling.type")
    if kind == "linear":
        return meta.positive("rope.scaling.factor")
    if kind not in (None, "none"):
        raise meta.fault("rope.scaling.type", f"{kind!r} is not supported; none and linear are")
    old = meta.get("rope.scale_linear")  # the key before rope.scaling.* existed
    if old is not None and old != 0:
        return meta.positive("rope.scale_linear")
    factor = meta.get("rope.scaling.factor")
    if kind is None and factor is not None and factor not in (0, 1):
        raise meta.fault("rope.scaling.type", f"is missing beside a rope.scaling.factor of {factor}")
    return 1.0


def _rope_factors(gguf: GGUF, rope_dim: int) -> tuple[float, ...] | None:
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if name in gguf.tensors:
            raise BadModelFile(gguf.path, f"tensor {name}", "LongRoPE scaling is not supported")
    if "rope_freqs.weight" not in gguf.tensors:
        return None
    info = _tensor(gguf, "rope_freqs.weight", (rope_dim // 2,))
    values = dequantize(gguf.raw(info.name), info.type, info.shape)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise BadModelFile(gguf.path, f"tensor {info.name}", "holds a factor that is not positive and finite")
    return tuple(float(value) for value in values)


def _tensor(gguf: GGUF, name: str, shape: tuple[int | None, ...]) -> TensorInfo:
    """The tensor of that name if its shape (None = any) and type will do."""
    info = gguf.tensors.get(name)
    if info is None:
        raise BadModelFile(gguf.path, f"tensor {name}", "is missing")
    if len(info.shape) != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, info.shape, strict=True)
    ):
        wanted = tuple("any" if want is None else want for want in shape)
        raise BadModelFile(gguf.path, f"tensor {name}", f"has shape {info.shape}, expected {wanted}")
    if info.type not in DECODABLE:
        raise BadModelFile(
            gguf.path,
            f"tensor {name}",
            f"type {info.type.name} (id {int(info.type)}) is not supported; "
            f"{', '.join(kind.name for kind in sorted(DECODABLE))} are",
            hint="pull another quantisation of this model",
        )
    return info


def _layer_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names within a layer and their shapes."""
    tensors: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (spec.hidden,),
        "attn_q.weight": (spec.q_rows, spec.hidden),
        "attn_k.weight": (spec.kv_rows, spec.hidden),
        "attn_v.weight": (spec.kv_rows, spec.hidden),
        "attn_output.weight": (spec.hidden, spec.q_rows),
        "ffn_norm.weight": (spec.hidden,),
        "ffn_gate.weight": (spec.ffn, spec.hidden),
        "ffn_up.weight": (spec.ffn, spec.hidden),
        "ffn_down.weight": (spec.hidden, spec.ffn),
    }
    if spec.qkv_bias:
        tensors |= {
            "attn_q.bias": (spec.q_rows,),
            "attn_k.bias": (spec.kv_rows,),
            "attn_v.bias": (spec.kv_rows,),
        }
    if spec.qk_norm:
        tensors |= {"attn_q_norm.weight": (spec.head_dim,), "attn_k_norm.weight": (spec.head_dim,)}
    return tensors


def _check_tensors(gguf: GGUF, spec: ModelSpec) -> None:
    """All there, all of the right shape, and none left over that would change the result."""
    wanted: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (spec.vocab, spec.hidden),
        "output_norm.weight": (spec.hidden,),
    }
    if not spec.tied:
        wanted["output.weight"] = (spec.vocab, spec.hidden)
    layer = _layer_tensors(spec)
    for index in range(spec.layers):
        wanted |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    for name, shape in wanted.items():
        _tensor(gguf, name, shape)
    known = wanted.keys() | {"rope_freqs.weight"}
    for name in gguf.tensors:
        # Old converters store RoPE's constant frequencies per layer; they say nothing new.
        if (
            name not in known
            and not name.endswith("rope_freqs.weight")
            and not name.endswith("rot_embd.weight")
        ):
            raise BadModelFile(
                gguf.path, f"tensor {name}", f"is not part of the {spec.arch} architecture Galley runs"
            )
