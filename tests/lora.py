"""Random LoRA adapters as real files, and base weights with them merged in: fixtures and their oracle."""

import json
import struct
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from galley.model.gguf import GGUF
from galley.model.quant.blocks import dequantize
from galley.model.spec import ModelSpec

PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
EVERY = tuple(PLACES)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, values in tensors.items():
        kind = {"float32": "F32", "float16": "F16"}[values.dtype.name]
        raw = values.tobytes()
        header[name] = {
            "dtype": kind,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def halves(
    spec: ModelSpec, places, rank: int, seed: int
) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]:
    """A and B of every layer and place, in transformers' row order, as trained ones are: B not zero."""
    rng = np.random.default_rng(seed)
    sizes = {
        "attn_q": (spec.q_rows, spec.hidden),
        "attn_k": (spec.kv_rows, spec.hidden),
        "attn_v": (spec.kv_rows, spec.hidden),
        "attn_output": (spec.hidden, spec.q_rows),
        "ffn_gate": (spec.ffn, spec.hidden),
        "ffn_up": (spec.ffn, spec.hidden),
        "ffn_down": (spec.hidden, spec.ffn),
    }
    found = {}
    for layer in range(spec.layers):
        for place in places:
            out, inner = sizes[PLACES[place]]
            a = rng.normal(0, inner**-0.5, (rank, inner)).astype(np.float32)
            b = rng.normal(0, 0.5, (out, rank)).astype(np.float32)
            found[layer, place] = a, b
    return found


def peft(
    folder: Path, spec: ModelSpec, *, places=EVERY, rank=4, seed=0, alpha=8, half=False, **config
) -> Path:
    """A PEFT folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for (layer, place), (a, b) in halves(spec, places, rank, seed).items():
        stem = f"base_model.model.model.layers.{layer}.{place}.lora_"
        kind = np.float16 if half else np.float32
        tensors[stem + "A.weight"], tensors[stem + "B.weight"] = a.astype(kind), b.astype(kind)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    said = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": [p.split(".")[1] for p in places],
    }
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    return folder


def turned(rows: np.ndarray, heads: int) -> np.ndarray:
    """transformers' rows of q or k in the order that GGUF has for llama: halves of a head side by side."""
    size = len(rows) // heads
    order = [h * size + i // 2 + (i % 2) * (size // 2) for h in range(heads) for i in range(size)]
    return rows[order]


def gguf_lora(
    path: Path, spec: ModelSpec, *, places=EVERY, rank=4, seed=0, alpha=8.0, kind="adapter"
) -> Path:
    """The same adapter as a GGUF file, rows turned as llama.cpp's converter does."""
    w = GGUFWriter(path, spec.arch)
    w.add_type(kind)
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", alpha)
    for (layer, place), (a, b) in halves(spec, places, rank, seed).items():
        name = f"blk.{layer}.{PLACES[place]}.weight"
        if spec.rope_interleaved and PLACES[place] in ("attn_q", "attn_k"):
            rows = turned(b, len(b) // spec.head_dim)
        else:
            rows = b
        w.add_tensor(name + ".lora_a", a)
        w.add_tensor(name + ".lora_b", np.ascontiguousarray(rows))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def merged(gguf: GGUF, spec: ModelSpec, *, places=EVERY, rank=4, seed=0, scale=2.0) -> dict[str, np.ndarray]:
    """Float32 weights of the adapted tensors with ``scale * B A`` added: the oracle (LRA-4)."""
    found = {}
    for (layer, place), (a, b) in halves(spec, places, rank, seed).items():
        name = f"blk.{layer}.{PLACES[place]}.weight"
        info = gguf.tensors[name]
        weight = dequantize(gguf.raw(name), info.type, info.shape).astype(np.float64)
        more = scale * (b.astype(np.float64) @ a.astype(np.float64))
        if spec.rope_interleaved and PLACES[place] in ("attn_q", "attn_k"):
            more = turned(more, len(more) // spec.head_dim)
        found[name] = (weight + more).astype(np.float32)
    return found
