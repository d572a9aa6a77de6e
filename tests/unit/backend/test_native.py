"""The native kernels: every instruction set this machine has against the numpy oracle, and faults."""

import platform
from array import array
from pathlib import Path

import numpy as np
import pytest

from galley.errors import ConfigError, EngineFault
from galley.model.families import spec_from_gguf
from galley.model.gguf import GGUF
from galley.model.quant.blocks import DECODABLE, dequantize
from galley.runtime.backend.reference import ReferenceBackend
from galley.runtime.plan import Draws, Rows
from galley.runtime.sampling.logits import draw
from tests.tiny import tiny_gguf

native = pytest.importorskip("galley._native")
from galley.runtime.backend.native import NativeBackend  # noqa: E402

ISAS = native.isa_available()
FLOATS = ("F32", "F16", "BF16")
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SUPERBLOCKS = ("Q4_K", "Q5_K", "Q6_K")


def make(path: Path, types: str, seed: int = 0) -> Path:
    if types in SUPERBLOCKS:
        return tiny_gguf(path, types=types, hidden=256, heads=8, kv_heads=2, head_dim=32, ffn=256, seed=seed)
    return tiny_gguf(path, types=types, hidden=96, heads=6, kv_heads=2, head_dim=16, ffn=160, seed=seed)


def prompt(n: int) -> Rows:
    rows = Rows()
    rows.add(np.random.default_rng(n).integers(0, 300, n).tolist(), 0, [5, 2, 3, 0][: (n + 15) // 16], n)
    return rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("types", FLOATS + BLOCKS + SUPERBLOCKS)
def test_logits_follow_the_oracle(tmp_path: Path, isa: str, types: str) -> None:
    with GGUF.open(make(tmp_path / "m.gguf", types)) as gguf:
        spec = spec_from_gguf(gguf)
        oracle = ReferenceBackend(gguf, spec, num_blocks=8)
        backend = NativeBackend(gguf, spec, threads=2, num_blocks=8, isa=isa)
        for n in (1, 2, 7, 49):
            rows = prompt(n)
            oracle.run(rows)
            backend.run(rows)
            want, got = oracle.logits(), backend.logits()
            # float weights differ by the f16 KV cache alone, quantised ones by int8 activations too
            limit = 0.01 if types in FLOATS else 0.06
            assert np.abs(got - want).max() < limit * want.std() * 4
            assert np.sqrt(((got - want) ** 2).mean()) < limit * want.std()
        backend.close()


@pytest.mark.parametrize("types", FLOATS + BLOCKS + SUPERBLOCKS)
def test_smp6_fusing_instruction_sets_agree_to_the_bit(tmp_path: Path, types: str) -> None:
    fusing = [isa for isa in ISAS if isa != "portable" or platform.machine() in ("aarch64", "arm64")]
    if len(fusing) < 2:
        pytest.skip(f"only {fusing} here")
    with GGUF.open(make(tmp_path / "m.gguf", types)) as gguf:
        seen = []
        for isa in fusing:
            backend = NativeBackend(gguf, spec_from_gguf(gguf), threads=2, num_blocks=8, isa=isa)
            for n in (1, 5, 49):
                backend.run(prompt(n))
                seen.append((n, backend.logits().tobytes()))
            backend.close()
    assert len(set(seen)) == 3


@pytest.mark.parametrize("isa", ISAS)
def test_sampling_follows_the_oracle(tmp_path: Path, isa: str) -> None:
    rng = np.random.default_rng(3)
    with GGUF.open(make(tmp_path / "m.gguf", "Q8_0")) as gguf:
        backend = NativeBackend(gguf, spec_from_gguf(gguf), threads=2, num_blocks=8, isa=isa)
        backend.run(prompt(40))
        logits = backend.logits()
        vocab = backend.spec.vocab
        for trial in range(20):
            draws = Draws()
            # Thin, middling, all but a few; the fourth row of four has none.
            masks = rng.random((3, -(-vocab // 32) * 32)) < np.array([[0.05], [0.5], [0.95]])
            masks[:, 7] = True
            packed = np.packbits(masks, axis=1, bitorder="little").view("<u4").reshape(-1)
            draws.masks = array("I", packed.tolist())
            for row in range(40):
                draws.add(
                    seed=int(rng.integers(0, 2**63)),
                    position=trial * 100 + row,
                    lane=row % 3,
                    temperature=[0.0, 0.7, 1.0, 1.6][row % 4],
                    top_k=[0, 5, 40][row % 3],
                    top_p=[1.0, 0.9, 0.3][trial % 3],
                    min_p=[0.0, 0.05][row % 2],
                    repetition=[1.0, 1.3][trial % 2],
                    frequency=0.4 * (trial % 3),
                    presence=0.2 * (row % 3),
                    logprobs=[-1, 0, 5][row % 3],
                    bias={7: 2.0, 9: -100.0} if row % 5 == 0 else None,
                    ban=[1, 2, 3] if row % 7 == 0 else (),
                    seen={11: 2, 12: 0, 13: 1},
                    mask_row=row % 4 if row % 4 < 3 else -1,
                )
            want, got = draw(logits, draws), backend.sample(draws)
            assert got.ids == want.ids
            assert all(masks[row % 4][id] for row, id in enumerate(got.ids) if row % 4 < 3)
            assert got.ranks == want.ranks
            assert np.allclose(got.logprobs, want.logprobs, atol=1e-4, equal_nan=True)
            assert [[i for i, _ in t] for t in got.tops] == [[i for i, _ in t] for t in want.tops]
        backend.close()


def test_nothing_to_draw_is_a_fault(tmp_path: Path) -> None:
    with GGUF.open(make(tmp_path / "m.gguf", "F32")) as gguf:
        spec = spec_from_gguf(gguf)
        backend = NativeBackend(gguf, spec, threads=2, num_blocks=8)
        for temperature in (0.0, 1.0):
            backend.run(prompt(1))
            draws = Draws()
            draws.add(seed=1, position=1, lane=0, temperature=temperature, ban=list(range(spec.vocab)))
            with pytest.raises(EngineFault, match="finite"):
                backend.sample(draws)
        backend.close()


def test_a_mask_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    with GGUF.open(make(tmp_path / "m.gguf", "F32")) as gguf:
        spec = spec_from_gguf(gguf)
        words = -(-spec.vocab // 32)
        backend = NativeBackend(gguf, spec, threads=2, num_blocks=8)
        oracle = ReferenceBackend(gguf, spec, num_blocks=8)
        for bad, row in ((words - 1, 0), (words, 1), (2 * words, 2)):
            draws = Draws()
            draws.masks = array("I", [0xFFFFFFFF]) * bad
            draws.add(seed=1, position=1, lane=0, temperature=1.0, mask_row=row)
            backend.run(prompt(1))
            with pytest.raises(EngineFault, match="mask"):
                backend.sample(draws)
            oracle.run(prompt(1))
            with pytest.raises(ValueError, match="mask"):
                oracle.sample(draws)
        backend.close()


@pytest.mark.parametrize(
    ("tokens", "context", "blocks", "problem"),
    [
        ([300], 0, [0], "vocabulary"),
        ([-1], 0, [0], "vocabulary"),
        ([1], 0, [8], "arena"),
        ([1], 0, [-1], "arena"),
        ([1], 16, [0], "too short"),
        ([1] * 17, 0, [0], "too short"),
        ([1], -1, [0], "too short"),
    ],
)
def test_bad_step_arrays_are_faults(
    tmp_path: Path, tokens: list[int], context: int, blocks: list[int], problem: str
) -> None:
    with GGUF.open(make(tmp_path / "m.gguf", "F32")) as gguf:
        backend = NativeBackend(gguf, spec_from_gguf(gguf), threads=1, num_blocks=8)
        rows = Rows()
        rows.add(tokens, context, blocks, 1)
        with pytest.raises(EngineFault, match=problem):
            backend.run(rows)
        backend.run(prompt(3))  # and it still serves
        backend.close()
        with pytest.raises(EngineFault, match="closed"):
            backend.run(prompt(3))


def test_unknown_isa_names_those_there_are(tmp_path: Path) -> None:
    with GGUF.open(make(tmp_path / "m.gguf", "F32")) as gguf, pytest.raises(ConfigError, match=ISAS[0]):
        NativeBackend(gguf, spec_from_gguf(gguf), threads=1, num_blocks=1, isa="avx9000")


@pytest.mark.parametrize("kind", sorted(DECODABLE, key=int), ids=lambda t: t.name)
def test_embedding_rows_are_the_formats_values(kind: int) -> None:
    from galley.model.quant.blocks import BLOCKS as FORMATS

    rng = np.random.default_rng(int(kind))
    block = FORMATS[kind]
    raw = rng.integers(0, 256, (3, 512 // block.block * block.nbytes), np.uint8).reshape(-1)
    if int(kind) in (0, 1, 30):  # random bits of a float type are NaNs too often: take finite values
        raw = (rng.integers(0, 60, raw.shape)).astype(np.uint8)
    want = dequantize(raw, kind, (3, 512))
    got = np.empty((3, 512), np.float32)
    native.dequantise(int(kind), raw, got)
    finite = np.isfinite(want)
    assert np.allclose(got[finite], want[finite], rtol=1e-6, atol=0)
