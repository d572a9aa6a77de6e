"""Attention over several spans: against the oracle, and the same bits however the work is cut and shared."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from galley.errors import ConfigError
from galley.model.families import spec_from_gguf
from galley.model.gguf import GGUF
from galley.runtime.backend import open_backend
from galley.runtime.backend.reference import ReferenceBackend
from galley.runtime.memory import kv_bytes_per_token
from galley.runtime.plan import Rows
from tests.tiny import tiny_gguf

native = pytest.importorskip("galley._native")
from galley.runtime.backend.native import NativeBackend  # noqa: E402

ISAS = native.isa_available()
SPAN = 256
Floats = npt.NDArray[np.float32]


def make(path: Path) -> Path:
    return tiny_gguf(path, types="Q8_0", hidden=96, heads=6, kv_heads=2, head_dim=16, ffn=160, context=2048)


def tokens(n: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, 300, n).tolist()
    return ids


def fill(backend: NativeBackend | ReferenceBackend, ids: list[int], blocks: list[int], chunk: int) -> Floats:
    """Logits of the last token after computing ``ids`` in chunks."""
    for at in range(0, len(ids), chunk):
        rows = Rows()
        part = ids[at : at + chunk]
        rows.add(part, at, blocks[: (at + len(part) + 15) // 16], 1)
        backend.run(rows)
    return backend.logits()[0]


@pytest.mark.parametrize("kv", ["f16", "int8"])
@pytest.mark.parametrize("isa", ISAS)
def test_long_contexts_follow_the_oracle(tmp_path: Path, isa: str, kv: str) -> None:
    ids = tokens(2 * SPAN + 37)
    blocks = np.random.default_rng(1).permutation(48).tolist()
    with GGUF.open(make(tmp_path / "m.gguf")) as gguf:
        spec = spec_from_gguf(gguf)
        oracle = ReferenceBackend(gguf, spec, num_blocks=48)
        want = fill(oracle, ids, blocks, 300)
        backend = NativeBackend(gguf, spec, threads=2, num_blocks=48, isa=isa, kv=kv)
        got = fill(backend, ids, blocks, 300)
        limit = 0.06 if kv == "f16" else 0.09
        assert np.sqrt(((got - want) ** 2).mean()) < limit * want.std()
        backend.close()


@pytest.mark.parametrize("kv", ["f16", "int8"])
@pytest.mark.parametrize("isa", ISAS)
def test_smp6_chunks_and_threads_do_not_change_a_bit(tmp_path: Path, isa: str, kv: str) -> None:
    # A few chunks of a long context are cut into spans for all threads, single tokens always, prompts never.
    ids = tokens(2 * SPAN + 21, seed=2)
    with GGUF.open(make(tmp_path / "m.gguf")) as gguf:
        spec = spec_from_gguf(gguf)
        seen: list[Floats] = []
        for threads in (1, 2, 3):
            backend = NativeBackend(gguf, spec, threads=threads, num_blocks=48, isa=isa, kv=kv)
            seen += [fill(backend, ids, list(range(40)), chunk) for chunk in (len(ids), 200, 9)]
            rows = Rows()  # the last token alone, over what the chunks wrote
            rows.add(ids[-1:], len(ids) - 1, list(range(40)), 1)
            backend.run(rows)
            seen.append(backend.logits()[0])
            backend.close()
        for other in seen[1:]:
            assert np.array_equal(seen[0], other)


@pytest.mark.parametrize("kv", ["f16", "int8"])
@pytest.mark.parametrize("isa", ISAS)
def test_smp6_shared_spans_do_not_change_a_bit(tmp_path: Path, isa: str, kv: str) -> None:
    """Cascade: sequences that share two spans, one span or none, in one step and each alone."""
    prompt = tokens(2 * SPAN, seed=3)
    lengths = [2 * SPAN + 1, 2 * SPAN + 40, 3 * SPAN, SPAN + 7, 2 * SPAN, 19]
    with GGUF.open(make(tmp_path / "m.gguf")) as gguf:
        spec = spec_from_gguf(gguf)
        backend = NativeBackend(gguf, spec, threads=2, num_blocks=400, isa=isa, kv=kv)
        fill(backend, prompt, list(range(32)), 256)
        tables: list[list[int]] = []
        free = 40
        for i, n in enumerate(lengths * 2):
            shared = 32 if n > 2 * SPAN else 16 if n > SPAN else 0
            own = (n + 15) // 16 + 1 - shared
            table = list(range(shared)) + list(range(free, free + own))
            free += own
            tables.append(table)
            ids = prompt[: shared * 16] + tokens(n - shared * 16, seed=10 + i)
            if n > shared * 16:
                rows = Rows()
                rows.add(ids[shared * 16 :], shared * 16, table[: (n + 15) // 16], 1)
                backend.run(rows)
        together = Rows()
        for i, (n, table) in enumerate(zip(lengths * 2, tables, strict=True)):
            together.add([50 + i], n, table[: (n + 16) // 16], 1)
        backend.run(together)
        got = backend.logits().copy()
        for i, (n, table) in enumerate(zip(lengths * 2, tables, strict=True)):
            alone = Rows()
            alone.add([50 + i], n, table[: (n + 16) // 16], 1)
            backend.run(alone)
            assert np.array_equal(backend.logits()[0], got[i]), f"sequence {i} of {n} tokens"
        assert len({row.tobytes() for row in got}) == len(got)  # they are different sequences
        backend.close()


def test_int8_kv_takes_half_the_memory(tmp_path: Path) -> None:
    with GGUF.open(make(tmp_path / "m.gguf")) as gguf:
        spec = spec_from_gguf(gguf)
        sizes = {}
        for kv in ("f16", "int8"):
            backend = NativeBackend(gguf, spec, threads=1, num_blocks=4, kv=kv)
            sizes[kv] = backend.kv_bytes_per_token
            assert backend.fingerprint.endswith(f"kv{kv}")
            assert sizes[kv] == kv_bytes_per_token(spec, kv)
            backend.close()
        values = spec.layers * spec.kv_heads * spec.head_dim * 2
        scales = spec.layers * spec.kv_heads * 2
        assert sizes == {"f16": 2 * values, "int8": values + 4 * scales}


def test_int8_kv_is_refused_where_there_is_none(tmp_path: Path) -> None:
    with GGUF.open(make(tmp_path / "m.gguf")) as gguf:
        spec = spec_from_gguf(gguf)
        with pytest.raises(ConfigError, match="int8"):
            open_backend("reference", gguf, spec, threads=1, num_blocks=4, kv_type="int8")
        opened = open_backend("native", gguf, spec, threads=1, num_blocks=4, kv_type="int8")
        assert opened.backend.fingerprint.endswith("kvint8")
        opened.backend.close()
