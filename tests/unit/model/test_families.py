"""ModelSpec from metadata: what each family means and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from galley.errors import BadModelFile
from galley.model.families import spec_from_gguf
from galley.model.gguf import GGUF
from galley.model.spec import ModelSpec

from .tinyfile import write


def spec(path: Path, arch: str = "llama", **options: Any) -> ModelSpec:
    with GGUF.open(write(path / "m.gguf", arch, **options)) as file:
        return spec_from_gguf(file)


def test_families_differ_as_the_table_says(tmp_path: Path) -> None:
    llama, qwen2, qwen3 = (spec(tmp_path, arch) for arch in ("llama", "qwen2", "qwen3"))
    assert (llama.rope_interleaved, qwen2.rope_interleaved, qwen3.rope_interleaved) == (True, False, False)
    assert (llama.qkv_bias, qwen2.qkv_bias, qwen3.qkv_bias) == (False, True, False)
    assert (llama.qk_norm, qwen2.qk_norm, qwen3.qk_norm) == (False, False, True)
    assert llama.head_dim == llama.rope_dim == 16 and llama.vocab == 261 and llama.tied
    assert llama.rope_base == 10000.0 and llama.rope_scale == 1.0 and llama.rope_factors is None


def test_untied_head_and_explicit_head_width(tmp_path: Path) -> None:
    assert not spec(tmp_path, tied=False).tied
    wide = {f"blk.{i}.attn_q.weight": (4 * 24, 64) for i in range(2)}
    wide |= {f"blk.{i}.attn_k.weight": (2 * 24, 64) for i in range(2)}
    wide |= {f"blk.{i}.attn_v.weight": (2 * 24, 64) for i in range(2)}
    wide |= {f"blk.{i}.attn_output.weight": (64, 4 * 24) for i in range(2)}
    wide |= {f"blk.{i}.attn_{x}_norm.weight": (24,) for i in range(2) for x in "qk"}
    keys = {"attention.key_length": 24, "attention.value_length": 24}
    assert spec(tmp_path, "qwen3", keys=keys, shapes=wide).head_dim == 24


def test_rope_scaling(tmp_path: Path) -> None:
    linear = spec(tmp_path, keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert linear.rope_scale == 4.0
    factors = spec(tmp_path, extra={"rope_freqs.weight": (8,)}).rope_factors
    assert factors is not None and len(factors) == 8


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": ({"arch": "mamba"}, "llama, qwen2, qwen3"),
    "yarn": ({"keys": {"rope.scaling.type": "yarn"}}, "metadata[llama.rope.scaling.type]"),
    "longrope": ({"extra": {"rope_factors_long.weight": (8,)}}, "LongRoPE"),
    "experts": ({"keys": {"expert_count": 8}}, "metadata[llama.expert_count]"),
    "missing tensor": ({"drop": ("blk.1.ffn_up.weight",)}, "tensor blk.1.ffn_up.weight: is missing"),
    "wrong shape": ({"shapes": {"blk.0.attn_k.weight": (64, 64)}}, "tensor blk.0.attn_k.weight"),
    "no embedding": ({"drop": ("token_embd.weight",)}, "tensor token_embd.weight"),
    "bias llama does not have": ({"extra": {"blk.0.attn_q.bias": (64,)}}, "tensor blk.0.attn_q.bias"),
    "missing bias": ({"arch": "qwen2", "drop": ("blk.0.attn_k.bias",)}, "tensor blk.0.attn_k.bias"),
    "too many layers": ({"keys": {"block_count": 3}}, "tensor blk.2."),
    "absurd layers": ({"keys": {"block_count": 1 << 30}}, "metadata[llama.block_count]"),
    "no layers": ({"keys": {"block_count": 0}}, "metadata[llama.block_count]"),
    "text for a number": ({"keys": {"embedding_length": "64"}}, "metadata[llama.embedding_length]"),
    "absent number": ({"keys": {"context_length": None}}, "metadata[llama.context_length]: is missing"),
    "uneven heads": ({"keys": {"attention.head_count_kv": 3}}, "metadata[llama.attention.head_count_kv]"),
    "heads by layer": ({"keys": {"attention.head_count_kv": [2, 4]}}, "layer to layer"),
    "infinite rope base": ({"keys": {"rope.freq_base": float("inf")}}, "metadata[llama.rope.freq_base]"),
    "odd rope width": ({"keys": {"rope.dimension_count": 15}}, "metadata[llama.rope.dimension_count]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_place(case: str, tmp_path: Path) -> None:
    options, words = REFUSED[case]
    with pytest.raises(BadModelFile) as caught:
        spec(tmp_path, **options)
    assert words in caught.value.message
