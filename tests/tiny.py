"""Tiny random models as real GGUF files: the shared fixture of tests that need weights but not sense.

The file is written with the ``gguf`` package, so that galley's own reader is tested against somebody else's
writer. The tokenizer is a byte-level BPE with every byte, so any text round-trips and any id stream decodes.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf import quants as gguf_quants

ARCHES = ("llama", "qwen2", "qwen3")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, IM_START, IM_END = range(3)
FIRST_BYTE = len(SPECIALS)
"""Id of byte 0; byte b is ``FIRST_BYTE + b``. Merged tokens follow at ``FIRST_BYTE + 256``."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

MERGES = (
    "Ġ t|Ġ a|h e|i n|r e|o n|Ġt he|e r|Ġ s|a t|Ġ w|Ġ o|e n|Ġ c|i t|i s|a n|o r|e s|Ġ b|e d|Ġ f|in g|Ġ p|o u|"
    "Ġa n|a l|a r|Ġt o|Ġ m|Ġo f|Ġ in|Ġ d|Ġ h|Ġan d|i c|a s|l e|Ġt h|i on|o m|l l"
)

# Mean step of a K-quant element for super-scale 1 with uniformly random scales and quants (see _k_quant).
_K_SPREAD = {"Q4_K": 255.0, "Q5_K": 521.0, "Q6_K": 1366.0}
_K_MIN = {"Q4_K": 7.5, "Q5_K": 15.5}

Float = npt.NDArray[np.float32]


def byte_alphabet() -> list[str]:
    """The printable stand-in of each byte in byte-level BPE vocabularies (GPT-2's table), by byte value."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    table, extra = {b: chr(b) for b in plain}, 256
    for b in range(256):
        if b not in table:
            table[b] = chr(extra)
            extra += 1
    return [table[b] for b in range(256)]


def _merges() -> Iterator[tuple[str, str]]:
    known: set[str] = set()
    for rule in MERGES.split("|"):
        left, right = rule.split(" ")
        known.add(left + right)
        yield left, right
    letters = "abcdefghijklmnopqrstuvwxyz"
    for left in letters.upper() + letters:
        for right in letters:
            if left + right not in known:
                yield left, right


def vocabulary(size: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their GGUF types and the merge rules of a vocabulary of exactly ``size`` ids (>= 259)."""
    tokens = [*SPECIALS, *byte_alphabet()]
    types = [int(TokenType.CONTROL)] * len(SPECIALS) + [int(TokenType.NORMAL)] * 256
    if size < len(tokens):
        raise ValueError(f"a byte-level vocabulary has at least {len(tokens)} tokens, asked for {size}")
    rules: list[str] = []
    for left, right in _merges():
        if len(tokens) == size:
            break
        tokens.append(left + right)
        types.append(int(TokenType.NORMAL))
        rules.append(f"{left} {right}")
    if len(tokens) != size:
        raise ValueError(f"at most {len(tokens)} tokens, asked for {size}")
    return tokens, types, rules


def _k_quant(
    rng: np.random.Generator, kind: str, rows: int, columns: int, std: float
) -> npt.NDArray[np.uint8]:
    """Random valid K-quant super-blocks, uint8 [rows, bytes], whose values have about the given spread.

    The gguf package decodes these types but cannot encode them; every byte pattern is valid, so quants and
    6-bit scales are random and only the half-precision super-scales are set. Layout: formats section 2.
    """
    blocks = rows * columns // 256
    d = (std / _K_SPREAD[kind] * rng.uniform(0.7, 1.3, blocks)).astype("<f2")

    def noise(width: int) -> npt.NDArray[np.uint8]:
        return rng.integers(0, 256, (blocks, width), dtype=np.uint8)

    halves = d.view(np.uint8).reshape(blocks, 2)
    if kind == "Q6_K":
        parts = [noise(128), noise(64), noise(16), halves]
    else:
        least = (d.astype(np.float32) * _K_MIN[kind]).astype("<f2").view(np.uint8).reshape(blocks, 2)
        parts = [halves, least, noise(12), *([noise(32)] if kind == "Q5_K" else []), noise(128)]
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def _add(
    w: GGUFWriter, rng: np.random.Generator, name: str, shape: tuple[int, int], std: float, kind: str
) -> None:
    qtype = GGMLQuantizationType[kind]
    block = 1 if kind in ("F32", "F16", "BF16") else 256 if kind in _K_SPREAD else 32
    if shape[1] % block:
        raise ValueError(f"{name}: {shape[1]} columns are not a multiple of {kind}'s block of {block}")
    if kind in _K_SPREAD:
        w.add_tensor(name, _k_quant(rng, kind, *shape, std), raw_dtype=qtype)
        return
    values = rng.normal(0.0, std, shape).astype(np.float32)
    if kind == "F32":
        w.add_tensor(name, values)
    elif kind == "F16":
        w.add_tensor(name, values.astype(np.float16))
    else:
        w.add_tensor(name, gguf_quants.quantize(values, qtype), raw_dtype=qtype)


def tiny_gguf(
    path: Path,
    arch: str = "llama",
    *,
    types: str = "F32",
    head_type: str | None = None,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 96,
    vocab: int = 300,
    context: int = 512,
    tied: bool = True,
    rope_base: float = 10000.0,
    rope_freqs: bool = False,
    rope_scale: float | None = None,
    pre: str = "smollm",
    template: str | None = CHATML,
    seed: int = 0,
    pooling: int | None = None,
    matryoshka: tuple[int, ...] = (),
    add_eos: bool = False,
    causal: bool | None = None,
) -> Path:
    """Write a random model to ``path`` and return it.

    Args:
        arch: ``llama`` (interleaved RoPE), ``qwen2`` (q, k, v biases) or ``qwen3`` (per-head q and k norms).
        types: ggml type of every matrix: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 (columns a multiple of
            32) or Q4_K, Q5_K, Q6_K (columns a multiple of 256). Norms and biases are F32 as everywhere.
        head_type: type of the embedding and of the LM head, when different (SmolLM2 has Q4_1 and Q8_0).
        head_dim: independent of ``hidden / heads``.
        vocab: exact number of ids, at least 259.
        tied: no ``output.weight``; the head is the embedding.
        rope_freqs: add Llama-3-like frequency divisors (``rope_freqs.weight``).
        rope_scale: linear position scaling.
        pooling, matryoshka, add_eos, causal: what the file says of embeddings and attention.

    Scales are chosen so that logits spread by about 3 and greedy text wanders instead of repeating one id.
    Raises ValueError for dimensions that do not fit the type.
    """
    if arch not in ARCHES:
        raise ValueError(f"arch {arch!r} is none of {ARCHES}")
    if heads % kv_heads:
        raise ValueError(f"{heads} heads are not a multiple of {kv_heads} KV heads")
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    w = GGUFWriter(path, arch)
    w.add_name(f"tiny-{arch}-{types}")
    w.add_license("Apache-2.0")
    w.add_context_length(context)
    w.add_embedding_length(hidden)
    w.add_block_count(layers)
    w.add_feed_forward_length(ffn)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(1e-5 if arch == "llama" else 1e-6)
    w.add_rope_freq_base(rope_base)
    w.add_rope_dimension_count(head_dim)
    if rope_scale is not None:
        from gguf import RopeScalingType

        w.add_rope_scaling_type(RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope_scale)
    w.add_vocab_size(vocab)

    tokens, token_types, merges = vocabulary(vocab)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    w.add_token_types(token_types)
    w.add_token_merges(merges)
    w.add_bos_token_id(IM_START)
    w.add_eos_token_id(IM_END)
    w.add_unk_token_id(END_OF_TEXT)
    w.add_pad_token_id(IM_END)
    w.add_add_bos_token(False)
    w.add_add_space_prefix(False)
    if template is not None:
        w.add_chat_template(template)
    if pooling is not None:
        w.add_uint32(f"{arch}.pooling_type", pooling)
    if matryoshka:
        w.add_array(f"{arch}.matryoshka_dimensions", list(matryoshka))
    if add_eos:
        w.add_add_eos_token(True)
    if causal is not None:
        w.add_bool(f"{arch}.attention.causal", causal)

    def vector(name: str, mean: float, std: float, size: int) -> None:
        w.add_tensor(name, rng.normal(mean, std, size).astype(np.float32))

    q_rows, kv_rows = heads * head_dim, kv_heads * head_dim
    # The embedding is small beside what the layers add, else a tied model just repeats its last token.
    _add(w, rng, "token_embd.weight", (vocab, hidden), 0.1, head_type or types)
    vector("output_norm.weight", 30.0 / hidden**0.5, 0.2, hidden)
    if not tied:
        _add(w, rng, "output.weight", (vocab, hidden), 0.1, head_type or types)
    if rope_freqs:
        factors = np.geomspace(1.0, 8.0, head_dim // 2, dtype=np.float32)
        w.add_tensor("rope_freqs.weight", factors)
    for i in range(layers):
        blk = f"blk.{i}."
        wide = hidden**-0.5
        vector(blk + "attn_norm.weight", 1.0, 0.1, hidden)
        _add(w, rng, blk + "attn_q.weight", (q_rows, hidden), 2.0 * wide, types)
        _add(w, rng, blk + "attn_k.weight", (kv_rows, hidden), wide, types)
        _add(w, rng, blk + "attn_v.weight", (kv_rows, hidden), wide, types)
        _add(w, rng, blk + "attn_output.weight", (hidden, q_rows), 1.5 * q_rows**-0.5, types)
        if arch == "qwen2":
            vector(blk + "attn_q.bias", 0.0, 0.5, q_rows)
            vector(blk + "attn_k.bias", 0.0, 0.5, kv_rows)
            vector(blk + "attn_v.bias", 0.0, 0.2, kv_rows)
        if arch == "qwen3":
            vector(blk + "attn_q_norm.weight", 1.5, 0.2, head_dim)
            vector(blk + "attn_k_norm.weight", 1.0, 0.2, head_dim)
        vector(blk + "ffn_norm.weight", 1.0, 0.1, hidden)
        _add(w, rng, blk + "ffn_gate.weight", (ffn, hidden), 1.5 * wide, types)
        _add(w, rng, blk + "ffn_up.weight", (ffn, hidden), wide, types)
        _add(w, rng, blk + "ffn_down.weight", (hidden, ffn), 1.5 * ffn**-0.5, types)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
