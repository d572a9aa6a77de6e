"""Make tests/data/families: tiny random models as GGUF, with the logits transformers gives them.

Needs torch, transformers and gguf, none of which the tests need: run it by hand and commit what it writes.

    python tests/oracles/make_families.py tests/data/families
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGUFWriter, TokenType

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
# name -> (architecture, configuration on top of SHAPE)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "llama",
        {
            "rope_parameters": PLAIN,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "intermediate_size": 64,
        },
    ),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
    "llama-linear-rope": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2": ("qwen2", {"rope_parameters": {**PLAIN, "rope_theta": 1e6}, "tie_word_embeddings": True}),
    "qwen3": (
        "qwen3",
        {
            "rope_parameters": {**PLAIN, "rope_theta": 1e6},
            "tie_word_embeddings": True,
            "head_dim": 48,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
        },
    ),
}
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def interleave(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a llama q or k projection from the halves' order to the pairs' order of GGUF."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def export(model: Any, arch: str, path: Path) -> None:
    """Write float32 tensors and the metadata that galley reads."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    w = GGUFWriter(path, arch)
    w.add_name(path.stem)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_freq_base(rope["rope_theta"])
    w.add_rope_dimension_count(head_dim)
    if rope["rope_type"] == "linear":
        w.add_string(f"{arch}.rope.scaling.type", "linear")
        w.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        inverse = model.model.rotary_emb.inv_freq.double().numpy()
        plain = rope["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
        w.add_tensor("rope_freqs.weight", (plain / inverse).astype(np.float32))
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    w.add_token_types([int(TokenType.NORMAL)] * config.vocab_size)
    w.add_token_merges([])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if arch == "llama" and "q_proj" in name:
            values = interleave(values, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            values = interleave(values, config.num_key_value_heads)
        w.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, (arch, extra)) in enumerate(MODELS.items()):
        torch.manual_seed(index)
        settings = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, **SHAPE, **extra}
        config = transformers.AutoConfig.for_model(arch, **settings)
        config._attn_implementation = "eager"
        model: Any = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for tensor_name, tensor in model.named_parameters():
                if "norm" in tensor_name:
                    tensor.normal_(1.0, 0.2)
                elif tensor_name.endswith("bias"):
                    tensor.normal_(0.0, 0.5)
                elif "embed" in tensor_name or "lm_head" in tensor_name:
                    tensor.normal_(0.0, 0.3)
                else:
                    tensor.normal_(0.0, 1.5 * tensor.shape[1] ** -0.5)
        # Long enough that every scaled frequency has turned and several KV blocks are in use.
        tokens = torch.randint(0, config.vocab_size, (1, 100))
        with torch.no_grad():
            logits = model(tokens).logits[0]
        export(model, arch, folder / f"{name}.gguf")
        rows = np.array([0, 1, 15, 16, 17, 40, 63, 64, 98, 99])
        np.savez(
            folder / f"{name}.npz",
            tokens=tokens[0].numpy().astype(np.int32),
            rows=rows,
            logits=logits.numpy()[rows].astype(np.float32),
            versions=np.array([torch.__version__, transformers.__version__]),
        )
        print(name, float(logits.std()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
