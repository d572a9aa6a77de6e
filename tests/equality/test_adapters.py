"""Adapters in the engine: equal to merged weights, and the same bits however they are batched (LRA-1..5)."""

import numpy as np
import pytest

from galley.model.adapter import Adapter
from galley.model.gguf import GGUF
from galley.runtime.backend import native_missing, open_backend
from galley.runtime.backend.reference import ReferenceBackend
from galley.runtime.journal import Journal, replay
from galley.runtime.plan import Plan, Rows
from galley.runtime.reading import Pooled, Scored
from galley.types import SamplingParams
from tests.equality.test_matrix import MATES, PROMPT, Eager, House, spec_of
from tests.lora import merged, peft
from tests.tiny import tiny_gguf

KINDS = [
    ("llama", "F32", "native"),
    ("qwen2", "Q8_0", "native"),
    ("qwen3", "Q4_1", "native"),
    ("llama", "F32", "reference"),
]
QV = ("self_attn.q_proj", "self_attn.v_proj")


class Bed:
    """A backend and three adapters: all places; some, with another rank and scale; and one of rank 40."""

    def __init__(self, arch: str, types: str, kind: str, folder) -> None:
        path = tiny_gguf(folder / "m.gguf", arch, types=types, head_dim=16, kv_heads=1, hidden=64, seed=3)
        self.gguf = GGUF.open(path)
        self.spec = spec_of(self.gguf)
        self.kind = kind
        self.backend = open_backend(kind, self.gguf, self.spec, threads=2, num_blocks=64).backend
        made = {
            "all": {"rank": 4, "alpha": 8},
            "some": {"rank": 8, "alpha": 8, "places": QV, "seed": 5, "use_rslora": True},
            "wide": {"rank": 40, "alpha": 20, "seed": 6},
        }
        self.adapters = {
            name: Adapter.open(peft(folder / name, self.spec, **how), name, self.spec, max_rank=64)
            for name, how in made.items()
        }
        self.weights = {
            "all": merged(self.gguf, self.spec, scale=2.0),
            "some": merged(self.gguf, self.spec, places=QV, rank=8, seed=5, scale=8 / 8**0.5),
            "wide": merged(self.gguf, self.spec, rank=40, seed=6, scale=0.5),
        }

    def logits(self, adapter: str | None, prompt=PROMPT) -> np.ndarray:
        """Of every position, in one step, the adapter in slot 3."""
        rows = Rows()
        rows.add(prompt, 0, [9, 3, 7, 1], len(prompt))
        if adapter is not None:
            self.backend.place_adapter(3, self.adapters[adapter])
            rows.adapt(3)
        self.backend.run(rows)
        return self.backend.logits()


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def bed(request, tmp_path_factory):
    arch, types, kind = request.param
    if kind == "native" and (why := native_missing()):
        pytest.skip(why)
    made = Bed(arch, types, kind, tmp_path_factory.mktemp("lora"))
    yield made
    made.backend.close()
    made.gguf.close()


class Inn(House):
    """A house whose jobs have adapters."""

    def come(self, job, prompt, adapter=None, *, tokens=8, temperature=0.8):
        params = SamplingParams(temperature=temperature, seed=5, max_tokens=tokens, top_k=40, logprobs=2)
        return self.scheduler.submit(job, prompt, params, 0.0, adapter=adapter)


def test_lra4_the_output_is_that_of_merged_weights(bed):
    """The oracle: a float32 reference backend whose weights have the adapter merged in."""
    plain = bed.logits(None)
    for name in bed.adapters:
        oracle = ReferenceBackend(bed.gguf, bed.spec, num_blocks=16, weights=bed.weights[name])
        rows = Rows()
        rows.add(PROMPT, 0, [0, 1, 2, 3], len(PROMPT))
        oracle.run(rows)
        want, found = oracle.logits(), bed.logits(name)
        # Beside the adapter, native KV is f16, and quantised layers have int8 activations.
        whole = "F32" in str(bed.gguf.metadata["general.name"])
        bound = 1e-4 if bed.kind == "reference" else 2e-3 if whole else 0.05
        assert rms(found - want) <= bound * rms(want), name
        assert rms(plain - want) > 0.2 * rms(want), "the adapter matters"


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def test_lra1_rows_of_several_adapters_in_one_step_are_those_of_each_alone(bed):
    names = [None, "all", "some", None, "wide", "all", None]
    alone = {name: bed.logits(name) for name in set(names)}
    for slot, name in enumerate(("all", "some", "wide")):
        bed.backend.place_adapter(slot, bed.adapters[name])
    rows = Rows()
    for number, name in enumerate(names):
        cut = PROMPT[: 10 + 5 * number]
        start = 8 * number
        rows.add(cut, 0, list(range(start, start + 4)), len(cut))
        if name is not None:
            rows.adapt(("all", "some", "wide").index(name))
    bed.backend.run(rows)
    found, at = bed.backend.logits(), 0
    for number, name in enumerate(names):
        count = 10 + 5 * number
        assert np.array_equal(found[at : at + count], alone[name][:count]), (number, name)
        at += count


@pytest.mark.parametrize("chunk", (1, 7, 16, 512))
def test_lra1_kv9_adapters_by_cache_by_chunk_by_mates_by_preemption(bed, chunk):
    alone = {}
    for name, adapter in [(None, None), *bed.adapters.items()]:
        house = Inn(bed.backend)
        house.come("a", PROMPT, adapter)
        house.run()
        alone[name] = house.said("a")
    house = Inn(bed.backend, chunk=chunk, token_budget=64, policy=Eager())
    jobs = {}
    for turn in range(2):  # the second time everything is cached
        for name, adapter in [(None, None), *bed.adapters.items()]:
            jobs[f"{name}{turn}"] = house.come(f"{name}{turn}", PROMPT, adapter), name
        for number, mate in enumerate(MATES):
            house.come(f"mate{turn}{number}", mate, bed.adapters["all"] if number % 2 else None)
        for _ in range(4):
            house.step()
        running = [job for job, _ in jobs.values() if job in house.scheduler.running and job.adapter]
        if running:
            house.scheduler.preemption.preempt(running[0], Plan(0), 0.0)
        house.run()
    for job, (made, name) in jobs.items():
        ids, logits = house.said(job)
        assert ids == alone[name][0], (job, chunk)
        assert logits[-len(ids) :] == alone[name][1], (job, chunk)
        if job.endswith("1"):
            assert made.meter.cached_tokens >= 48 - 16, "its own KV is found again"
    assert not house.scheduler.residency.held


def test_lra2_an_adapters_kv_is_nobody_elses(bed):
    house = Inn(bed.backend)
    for number, name in enumerate((None, "all", "some", "all")):
        house.come(f"job{number}", PROMPT, bed.adapters.get(name))
        house.run()
    cached = [house.meters[f"job{number}"].cached_tokens for number in range(4)]
    assert cached == [0, 0, 0, 48]
    renamed = bed.adapters["all"]
    spaces = {
        house.scheduler.namespace("t", None, None, adapter)
        for adapter in (None, renamed, bed.adapters["some"])
    }
    assert len(spaces) == 3
    assert ("lora", f"all@{renamed.digest}") in house.scheduler.namespace("t", None, None, renamed)


def test_lra1_lra5_one_slot_serves_two_adapters_in_turn_and_nobody_else_waits(bed):
    alone = {}
    for name, adapter in [(None, None), *bed.adapters.items()]:
        house = Inn(bed.backend)
        house.come("a", MATES[0], adapter, tokens=12)
        house.run()
        alone[name] = house.ids["a"]
    house = Inn(bed.backend, adapters=1)
    first = house.come("all", MATES[0], bed.adapters["all"], tokens=12)
    second = house.come("some", MATES[0], bed.adapters["some"], tokens=12)
    base = house.come("base", MATES[0], tokens=12)
    house.step()
    assert first in house.scheduler.running and base in house.scheduler.running
    assert second not in house.scheduler.running, "its adapter has no slot"
    assert len(house.scheduler.residency) == 1
    house.run()
    assert [house.ids[name] for name in ("all", "some", "base")] == [alone["all"], alone["some"], alone[None]]
    assert not house.scheduler.residency.held


def test_sch9_a_journal_with_adapters_and_readings_plays_again(bed, tmp_path):
    journal = Journal(tmp_path / "journal")
    house = Inn(bed.backend, journal=journal, adapters=1, chunk=16)
    house.come("a", PROMPT, bed.adapters["all"])
    house.come("b", PROMPT, bed.adapters["some"])
    params = SamplingParams(max_tokens=0, temperature=0.0, logprobs=1)
    house.scheduler.submit("c", PROMPT, params, 0.0, reading=Scored(len(PROMPT)))
    house.scheduler.submit("d", PROMPT, params, 0.0, reading=Pooled("mean", len(PROMPT)))
    while house.scheduler.busy:
        house.loop.step()
    journal.close()
    again = replay((tmp_path / "journal").read_bytes().splitlines())
    assert again.same and again.plans > 4, again.difference
