"""The random model: the same weights in every form."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from benchmarks.hf_folder import hf_name, hf_rows
from benchmarks.make_models import make_hf, make_llama_1b
from benchmarks.random_llama import RandomLlama

from galley.model.families import spec_from_gguf
from galley.model.gguf import GGUF

TINY = RandomLlama(layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=64, context=128)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    source = folder / "tokenizer.gguf"
    letters = [chr(0x100 + i) for i in range(TINY.vocab - 4)]
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, letters[0] + letters[1]])
    writer.add_token_types([3, 3, 3, *[1] * (TINY.vocab - 3)])
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    make_llama_1b(folder, source, model=TINY)
    return folder


def dequantised(path: Path) -> dict[str, np.ndarray]:
    return {
        t.name: gguf.dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist())))
        for t in gguf.GGUFReader(path).tensors
    }


def safetensors(path: Path) -> dict[str, np.ndarray]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    assert len(data) == max(h["data_offsets"][1] for n, h in header.items() if n != "__metadata__")
    found = {}
    for name, h in header.items():
        if name != "__metadata__":
            begin, end = h["data_offsets"]
            bits = np.frombuffer(data[begin:end], dtype="<u2").astype(np.uint32) << np.uint32(16)
            found[name] = bits.view(np.float32).reshape(h["shape"])
    return found


def test_both_files_are_llamas_of_the_shape(made: Path) -> None:
    for name in ("l1b-q4_0.gguf", "l1b-q8_0.gguf"):
        with GGUF.open(made / name) as file:
            spec = spec_from_gguf(file)
        assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads) == (2, 64, 4, 2)
        assert (spec.rope_base, spec.tied) == (500_000.0, True)


def test_files_hold_the_models_values_within_a_rounding(made: Path) -> None:
    exact = dict(TINY.tensors())
    for name, step in (("l1b-q4_0.gguf", 8), ("l1b-q8_0.gguf", 127)):
        for tensor, values in dequantised(made / name).items():
            if values.ndim == 1:
                assert (values == exact[tensor]).all()
                continue
            groups = exact[tensor].reshape(-1, 32)
            room = np.abs(groups).max(axis=1, keepdims=True) / (
                127 if tensor == "token_embd.weight" else step
            )
            assert (np.abs(values.reshape(-1, 32) - groups) <= room * 1.01).all()


def test_the_folder_holds_the_same_weights_exactly(made: Path) -> None:
    folder = safetensors(made / "l1b-hf" / "model.safetensors")
    for name, values in TINY.tensors():
        wanted = hf_rows(name, values, heads=TINY.heads, kv_heads=TINY.kv_heads)
        np.testing.assert_array_equal(folder[hf_name(name)], wanted)
    assert json.loads((made / "l1b-hf" / "config.json").read_text())["head_dim"] == TINY.head_dim


def test_rows_of_a_head_go_from_pairs_to_halves() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]  # two heads of four: pairs (0, 1), (2, 3)
    moved = hf_rows("blk.0.attn_q.weight", rows, heads=2, kv_heads=1)[:, 0]
    assert moved.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert hf_rows("blk.0.attn_v.weight", rows, heads=2, kv_heads=1) is rows


def test_nothing_is_made_twice(made: Path) -> None:
    before = (made / "l1b-q4_0.gguf").stat().st_mtime_ns
    make_llama_1b(made, made / "tokenizer.gguf", model=TINY)
    assert (made / "l1b-q4_0.gguf").stat().st_mtime_ns == before


def test_a_folder_made_from_a_file_has_its_dequantised_weights(made: Path, tmp_path: Path) -> None:
    folder = safetensors(make_hf(made / "l1b-q8_0.gguf", tmp_path / "hf") / "model.safetensors")
    values = dequantised(made / "l1b-q8_0.gguf")["blk.1.attn_k.weight"]
    wanted = hf_rows("blk.1.attn_k.weight", values, heads=TINY.heads, kv_heads=TINY.kv_heads)
    np.testing.assert_allclose(folder["model.layers.1.self_attn.k_proj.weight"], wanted, rtol=2**-8)
