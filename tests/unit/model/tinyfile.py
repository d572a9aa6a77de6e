"""Small real GGUF files for the reader's tests, written with the ``gguf`` package."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_letters() -> list[str]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {}, 0
    for byte in range(256):
        if byte in plain:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(256 + extra)
            extra += 1
    return [table[byte] for byte in range(256)]


def write(
    path: Path,
    arch: str = "llama",
    *,
    keys: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    shapes: dict[str, tuple[int, ...]] | None = None,
    extra: dict[str, tuple[int, ...]] | None = None,
    tied: bool = True,
    template: str | None = CHATML,
    tokens: list[str] | None = None,
    types: list[int] | None = None,
    merges: list[str] | None = None,
    pre: str = "gpt-2",
) -> Path:
    """A model of two layers: hidden 64, 4 heads, 2 KV heads of 16, ffn 96."""
    writer = gguf.GGUFWriter(str(path), arch)
    numbers = {
        "block_count": 2,
        "context_length": 128,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }
    for key, value in numbers.items():
        if key not in (keys or {}):
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in (keys or {}).items():
        name = (
            key if "." in key and key.split(".")[0] in ("general", "split", "tokenizer") else f"{arch}.{key}"
        )
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    tokens = tokens or [*SPECIALS, *byte_letters(), "he", "ll"]
    types = types or [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges if merges is not None else ["h e", "l l"])
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(tokens), 64),
        "output_norm.weight": (64,),
    }
    if not tied:
        tensors["output.weight"] = (len(tokens), 64)
    for i in range(2):
        layer = {
            "attn_norm.weight": (64,),
            "attn_q.weight": (64, 64),
            "attn_k.weight": (32, 64),
            "attn_v.weight": (32, 64),
            "attn_output.weight": (64, 64),
            "ffn_norm.weight": (64,),
            "ffn_gate.weight": (96, 64),
            "ffn_up.weight": (96, 64),
            "ffn_down.weight": (64, 96),
        }
        if arch == "qwen2":
            layer |= {"attn_q.bias": (64,), "attn_k.bias": (32,), "attn_v.bias": (32,)}
        if arch == "qwen3":
            layer |= {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)}
        tensors |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    tensors |= (shapes or {}) | (extra or {})
    rng = np.random.default_rng(1)
    for name, shape in tensors.items():
        if name not in drop:
            writer.add_tensor(name, np.abs(rng.standard_normal(shape)).astype(np.float32) + 0.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
