"""The numpy backend: batch invariance bit for bit (SMP-6), paging, faults."""

from pathlib import Path

import numpy as np
import pytest

from galley.errors import EngineFault
from galley.model.families import spec_from_gguf
from galley.model.gguf import GGUF
from galley.runtime.backend.reference import Linear, ReferenceBackend
from galley.runtime.plan import Draws, Rows
from tests.tiny import ARCHES, tiny_gguf


def open_backend(path: Path, *, num_blocks: int = 64, block_size: int = 16) -> ReferenceBackend:
    with GGUF.open(path) as gguf:
        return ReferenceBackend(gguf, spec_from_gguf(gguf), num_blocks=num_blocks, block_size=block_size)


@pytest.fixture(scope="module", params=ARCHES)
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ReferenceBackend:
    path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    return open_backend(
        tiny_gguf(path, request.param, head_dim=32, tied=request.param == "llama", rope_freqs=True)
    )


def ids(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 300, n).tolist()


def alone(backend: ReferenceBackend, tokens: list[int]) -> np.ndarray:
    rows = Rows()
    rows.add(tokens, 0, list(range(8)), len(tokens))
    backend.run(rows)
    return backend.logits()


def test_smp6_rows_do_not_depend_on_batch_size(backend: ReferenceBackend) -> None:
    for count in (2, 3, 8, 9, 17):
        prompts = [ids(i, 1 + 5 * i % 23) for i in range(count)]
        rows = Rows()
        for i, prompt in enumerate(prompts):
            rows.add(prompt, 0, [2 * i + 1, 2 * i], len(prompt))
        backend.run(rows)
        together = backend.logits()
        for i, prompt in enumerate(prompts):
            found = together[rows.seq_start[i] : rows.seq_start[i + 1]]
            assert np.array_equal(found, alone(backend, prompt))


@pytest.mark.parametrize("chunk", [1, 2, 15, 16, 17, 33])
def test_smp6_rows_do_not_depend_on_chunks_or_places(backend: ReferenceBackend, chunk: int) -> None:
    tokens, table = ids(7, 50), [9, 3, 60, 0]
    parts = []
    for start in range(0, 50, chunk):
        rows = Rows()
        piece = tokens[start : start + chunk]
        rows.add(piece, start, table, len(piece))
        backend.run(rows)
        parts.append(backend.logits())
    assert np.array_equal(np.concatenate(parts), alone(backend, tokens))


def test_smp6_rows_do_not_depend_on_block_size(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf")
    small, large = open_backend(path, block_size=4), open_backend(path, block_size=32)
    assert np.array_equal(alone(small, ids(1, 30)), alone(large, ids(1, 30)))


def test_only_the_rows_asked_for_come_out(backend: ReferenceBackend) -> None:
    rows = Rows()
    rows.add(ids(1, 20), 0, [0, 1], 0)
    rows.add(ids(2, 10), 0, [2], 2)
    backend.run(rows)
    assert np.array_equal(backend.logits(), alone(backend, ids(2, 10))[-2:])


def test_untiled_products_agree_with_tiled_ones() -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(48, 64)).astype(np.float32), rng.normal(size=(11, 64)).astype(np.float32)
    bias = rng.normal(size=48).astype(np.float32)
    plain, tiled = (Linear(weight, bias, {weight.shape: proven}) for proven in (False, True))
    assert np.allclose(plain(x), x @ weight.T + bias, atol=1e-4)
    assert np.allclose(tiled(x), x @ weight.T + bias, atol=1e-4)
    assert all(np.array_equal(plain(x[i : i + 1])[0], plain(x)[i]) for i in range(11))


def test_greedy_text_wanders(backend: ReferenceBackend) -> None:
    tokens = ids(3, 8)
    for _ in range(40):
        row = alone(backend, tokens)[-1]
        assert 1.0 < row.std() < 8.0
        draws = Draws()
        draws.add(seed=0, position=len(tokens), lane=0, temperature=0.0)
        rows = Rows()
        rows.add(tokens, 0, list(range(8)), 1)
        backend.run(rows)
        tokens.append(backend.sample(draws).ids[0])
    assert len(set(tokens[8:])) > 15


def test_facts(backend: ReferenceBackend) -> None:
    spec = backend.spec
    assert backend.kv_bytes_per_token == 2 * spec.layers * spec.kv_heads * spec.head_dim * 4
    assert backend.weight_bytes >= 4 * (spec.linear_params + spec.vocab * spec.hidden)
    assert backend.fingerprint.startswith("reference-")


@pytest.mark.parametrize(
    ("tokens", "context", "blocks"),
    [
        ([300], 0, [0]),
        ([-1], 0, [0]),
        ([1], 0, [64]),
        ([1], 0, [-1]),
        ([1] * 17, 0, [0]),
        ([1], 512, [0] * 40),
    ],
)
def test_step_that_does_not_fit_is_a_fault(
    backend: ReferenceBackend, tokens: list[int], context: int, blocks: list[int]
) -> None:
    rows = Rows()
    rows.add(tokens, context, blocks, 1)
    with pytest.raises(EngineFault):
        backend.run(rows)


def test_closed_backend_refuses(tmp_path: Path) -> None:
    backend = open_backend(tiny_gguf(tmp_path / "m.gguf"))
    backend.close()
    backend.close()
    with pytest.raises(EngineFault):
        alone(backend, [1])


def test_given_weights_replace_the_files(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "m.gguf")
    with GGUF.open(path) as gguf:
        spec = spec_from_gguf(gguf)
        zero = {"output_norm.weight": np.zeros(spec.hidden, dtype=np.float32)}
        backend = ReferenceBackend(gguf, spec, num_blocks=8, weights=zero)
    assert not alone(backend, [1, 2]).any()


@pytest.mark.parametrize(
    "kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
)
def test_every_type_runs(kind: str, tmp_path: Path) -> None:
    if kind.endswith("_K"):
        path = tiny_gguf(tmp_path / "m.gguf", types=kind, hidden=256, heads=8, head_dim=32, ffn=256, layers=1)
    else:
        path = tiny_gguf(tmp_path / "m.gguf", types=kind)
    row = alone(open_backend(path), ids(1, 5))[-1]
    assert np.isfinite(row).all() and 0.5 < row.std() < 20
