"""Every family's forward against transformers in float32 (logits from tests/oracles/make_families.py)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from galley.model.families import spec_from_gguf
from galley.model.gguf import GGUF
from galley.model.spec import ModelSpec
from galley.runtime.backend.base import Backend
from galley.runtime.backend.reference import ReferenceBackend
from galley.runtime.plan import Rows

DATA = Path(__file__).parents[1] / "data" / "families"
NAMES = ("llama", "llama3-rope", "llama-linear-rope", "qwen2", "qwen3")
BLOCKS = 8


def _reference(gguf: GGUF, spec: ModelSpec) -> Backend:
    return ReferenceBackend(gguf, spec, num_blocks=BLOCKS)


def _native(gguf: GGUF, spec: ModelSpec) -> Backend:
    pytest.importorskip("galley._native")
    from galley.runtime.backend.native import NativeBackend

    return NativeBackend(gguf, spec, threads=1, num_blocks=BLOCKS)


def _logits(backend: Backend, tokens: list[int], chunk: int) -> np.ndarray:
    """Logits of every position, prefilled in chunks over blocks in no order."""
    table = [5, 0, 7, 2, 6, 1, 4]
    parts = []
    for start in range(0, len(tokens), chunk):
        piece = tokens[start : start + chunk]
        rows = Rows()
        rows.add(piece, start, table, len(piece))
        backend.run(rows)
        parts.append(backend.logits())
    return np.concatenate(parts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("make", "limit"),
    [
        pytest.param(_reference, 1e-3, id="reference"),
        # The native KV arena is half precision; logits here spread by about 2.
        pytest.param(_native, 3e-2, id="native"),
    ],
)
def test_family_agrees_with_transformers(
    name: str, make: Callable[[GGUF, ModelSpec], Backend], limit: float
) -> None:
    stored = np.load(DATA / f"{name}.npz")
    with GGUF.open(DATA / f"{name}.gguf") as gguf:
        backend = make(gguf, spec_from_gguf(gguf))
        found = _logits(backend, stored["tokens"].tolist(), 37)
        backend.close()
    expected = stored["logits"]
    assert expected.std() > 1, "the stored logits must be spread, or agreement would mean little"
    assert np.abs(found[stored["rows"]] - expected).max() < limit
