"""Hugging Face folders (config, tokenizer, bfloat16 safetensors), written without torch or transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.random_llama import Floats
from galley.model.quant.blocks import GGMLType, quantize

__all__ = ["HfFolder", "LlamaConfig", "hf_name", "hf_rows", "llama_config"]

LlamaConfig = dict[str, Any]
"""What ``config.json`` says, with Hugging Face's names."""

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``. KeyError for unknown names."""
    if not name.startswith("blk."):
        return _NAMES[name]
    _, layer, part = name.split(".", 2)
    return f"model.layers.{layer}.{_NAMES[part]}"


def hf_rows(name: str, values: Floats, *, heads: int, kv_heads: int) -> Floats:
    """Rows of q and k from GGUF's order (rotated pairs side by side) to Hugging Face's (halves)."""
    count = {"attn_q.weight": heads, "attn_k.weight": kv_heads}.get(name.split(".", 2)[-1])
    if count is None:
        return values
    pairs = values.reshape(count, -1, 2, values.shape[-1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


class HfFolder:
    """One folder being written; it appears under its name only when it is whole."""

    def __init__(
        self,
        path: Path,
        config: LlamaConfig,
        shapes: Mapping[str, tuple[int, ...]],
        tokenizer: gguf.GGUFReader,
    ) -> None:
        """``shapes``: GGUF names, in the order in which ``add`` will get them."""
        self.path = path
        self._config = config
        self._partial = path.with_suffix(".partial")
        self._partial.mkdir(parents=True, exist_ok=True)
        (self._partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        eos = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
        (self._partial / "generation_config.json").write_text(json.dumps(eos) + "\n")
        self._write_tokenizer(tokenizer)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, shape in shapes.items():
            size = 2
            for n in shape:
                size *= n
            header[hf_name(name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format wants the data aligned
        self._file = (self._partial / "model.safetensors").open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _write_tokenizer(self, reader: gguf.GGUFReader) -> None:
        """A byte-level BPE that cuts digits apart, as SmolLM2's; control tokens as added tokens."""
        field = {k.removeprefix("tokenizer."): f.contents() for k, f in reader.fields.items()}
        if (field["ggml.model"], field["ggml.pre"]) != ("gpt2", "smollm"):
            raise ValueError(f"tokenizer {field['ggml.model']}/{field['ggml.pre']} is not SmolLM2's")
        tokens: list[str] = field["ggml.tokens"]
        merges = [(a, b) for a, b in (m.split(" ") for m in field["ggml.merges"])]
        bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
        cuts = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        bpe.pre_tokenizer = pre_tokenizers.Sequence(cuts)  # type: ignore[assignment]
        bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        control = gguf.TokenType.CONTROL
        kinds = zip(tokens, field["ggml.token_type"], strict=True)
        bpe.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t, k in kinds if k == control]
        )
        bpe.save(str(self._partial / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[field["ggml.bos_token_id"]],
            "eos_token": tokens[field["ggml.eos_token_id"]],
            "pad_token": tokens[field["ggml.padding_token_id"]],
            "model_max_length": self._config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": field["chat_template"],
        }
        (self._partial / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")

    def add(self, name: str, values: Floats) -> None:
        """The next tensor, GGUF's name and order of rows."""
        config = self._config
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        rows = hf_rows(name, values, heads=heads, kv_heads=kv_heads)
        quantize(rows, GGMLType.BF16).tofile(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            self._partial.rename(self.path)


def llama_config(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    context: int,
    rope_theta: float,
    norm_epsilon: float,
) -> LlamaConfig:
    """The ``config.json`` of a Llama with tied embeddings and SmolLM2's tokenizer."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "rms_norm_eps": norm_epsilon,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
