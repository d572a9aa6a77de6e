"""The equality matrix: however a prompt gets to its answer, the ids and the logits are the same, bit for bit.

{cold, partial hit, full hit, after eviction, after preemption} × chunk {1, B-1, B, all} × mates × n > 1,
on a two-layer random model, for every backend and instruction set that this machine has (KV-9, SMP-4, SMP-6).
"""

from functools import cache

import numpy as np
import pytest

from galley.model.gguf import GGUF
from galley.model.spec import ModelSpec
from galley.runtime.backend import native_missing, open_backend
from galley.runtime.engine import build_scheduler
from galley.runtime.loop import Loop
from galley.runtime.policy import Policy
from galley.types import SamplingParams
from tests.tiny import tiny_gguf

B = 16
TOTAL = 14
PROMPT = [(7 * i + 3) % 290 + 3 for i in range(53)]  # three blocks and five tokens
MATES = [[(11 * i + k) % 290 + 3 for i in range(17 + 9 * k)] for k in range(4)]
MODELS = [("llama", "Q4_1"), ("qwen2", "Q8_0"), ("qwen3", "Q4_0")]


def isas() -> list[str]:
    """Instruction sets of the native backend on this machine, best first."""
    if native_missing():
        return []
    from galley import _native

    return list(_native.isa_available())


KINDS = [(*model, kind) for kind in ("reference", "native") for model in MODELS]
# Every set has its own kernels. The best runs all models; each of the others one, in turn.
KINDS += [(*MODELS[number % len(MODELS)], isa) for number, isa in enumerate(isas()[1:])]


class Eager(Policy):
    """Admits on nothing but the known tokens, so that preemption happens."""

    def reserve(self, jobs, block_size, pool_size):
        return 0


class House:
    """One backend with a fresh cache; records the logits behind every token drawn."""

    def __init__(self, backend, **limits):
        self.backend = backend
        options = {"token_budget": 512, "max_jobs": 16, "max_queue": 64, "context": None} | limits
        self.scheduler = build_scheduler(backend, eos_ids=(), **options)
        self.loop = Loop(self.scheduler, backend, clock=lambda: 0.0)
        self.ids: dict[str, list[int]] = {}
        self.logits: dict[str, list[bytes]] = {}
        self.meters: dict[str, object] = {}

    def add(self, job, prompt, *, lane=0, temperature=0.8, tokens=TOTAL, salt=None):
        params = SamplingParams(temperature=temperature, seed=5, max_tokens=tokens, top_k=40, logprobs=2)
        self.scheduler.submit(job, prompt, params, 0.0, lane=lane, salt=salt)

    def step(self):
        plan_of, wanted = self.scheduler.plan, []

        def spy(now):
            plan = plan_of(now)
            wanted.extend(job.id for job, n in plan.rows.items() if job.computed + n == len(job.tokens))
            return plan

        self.scheduler.plan = spy
        outs = self.loop.step()
        self.scheduler.plan = plan_of
        if wanted:
            for job, row in zip(wanted, self.backend.logits(), strict=True):
                self.logits.setdefault(job, []).append(np.asarray(row).tobytes())
        for out in outs:
            assert out.error is None, out.error
            self.ids.setdefault(out.job_id, []).extend(out.token_ids)
            if out.meter is not None:
                self.meters[out.job_id] = out.meter
        assert self.scheduler.check() == []

    def run(self):
        while self.scheduler.busy:
            self.step()

    def said(self, job):
        return self.ids[job], self.logits[job]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def opened(request, tmp_path_factory):
    """``open(blocks)`` gives the backend; one model and kind at a time."""
    arch, types, kind = request.param
    if kind == "native" and (why := native_missing()):
        pytest.skip(why)
    path = tiny_gguf(tmp_path_factory.mktemp("tiny") / "m.gguf", arch, types=types, head_dim=32, seed=3)
    gguf = GGUF.open(path)
    made = []

    @cache
    def build(blocks):
        isa = kind if kind not in ("reference", "native") else None
        wanted = "native" if isa else kind
        made.append(open_backend(wanted, gguf, spec_of(gguf), threads=2, num_blocks=blocks, isa=isa).backend)
        assert isa is None or made[-1].isa == isa
        return made[-1]

    yield build
    for backend in made:
        backend.close()
    gguf.close()


def spec_of(gguf: GGUF) -> ModelSpec:
    from galley.model.families import spec_from_gguf

    return spec_from_gguf(gguf)


@pytest.fixture(scope="module")
def expected(opened):
    """Alone, cold, in one chunk: by (prompt, lane, temperature)."""

    @cache
    def say(prompt, lane, temperature, tokens=TOTAL):
        house = House(opened(64))
        house.add("alone", list(prompt), lane=lane, temperature=temperature, tokens=tokens)
        house.run()
        return house.said("alone")

    return say


def check(house, expected, job, prompt, *, lane=0, temperature=0.8, tokens=TOTAL):
    ids, logits = house.said(job)
    want_ids, want_logits = expected(tuple(prompt), lane, temperature, tokens)
    assert ids == want_ids
    assert len(logits) == len(want_logits) == tokens
    for place, (have, want) in enumerate(zip(logits, want_logits, strict=True)):
        assert have == want, f"the logits of token {place} differ"


@pytest.mark.parametrize("mates", [0, 3])
@pytest.mark.parametrize("chunk", [1, B - 1, B, None])
@pytest.mark.parametrize("cache_state", ["cold", "partial", "full", "evicted"])
def test_kv9_smp6_cache_state_by_chunk_by_mates(opened, expected, cache_state, chunk, mates):
    house = House(opened(24), chunk=chunk)
    if cache_state == "partial":
        house.add("before", PROMPT[: 2 * B] + [9] * 12, tokens=2)
    elif cache_state != "cold":
        house.add("before", PROMPT)
    house.run()
    if cache_state == "evicted":
        house.add("flood", [5] * (23 * B), tokens=2)
        house.run()
        assert house.scheduler.tree.evictions
    for k in range(mates):
        house.add(f"mate{k}", MATES[k])
    house.add("job", PROMPT)
    house.run()
    hits = {"cold": 0, "partial": 2 * B, "full": 3 * B, "evicted": 0}
    assert house.meters["job"].cached_tokens == hits[cache_state]
    check(house, expected, "job", PROMPT)
    for k in range(mates):
        check(house, expected, f"mate{k}", MATES[k])


@pytest.mark.parametrize("chunk", [1, B - 1, B, None])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_kv9_sch5_after_preemption(opened, expected, chunk, temperature):
    house = House(opened(10), chunk=chunk, policy=Eager())
    for k, prompt in enumerate([PROMPT, MATES[2], MATES[3]]):
        house.add(f"j{k}", prompt, temperature=temperature, tokens=40)
    house.run()
    assert house.scheduler.counters.preemptions
    for k, prompt in enumerate([PROMPT, MATES[2], MATES[3]]):
        check(house, expected, f"j{k}", prompt, temperature=temperature, tokens=40)


@pytest.mark.parametrize("chunk", [1, B - 1, B, None])
@pytest.mark.parametrize("mates", [0, 3])
def test_kv8_smp4_n_choices_share_the_prompt(opened, expected, chunk, mates):
    house = House(opened(40), chunk=chunk)
    for k in range(mates):
        house.add(f"mate{k}", MATES[k], temperature=0.0)
    for lane in range(4):
        house.add(f"lane{lane}", PROMPT, lane=lane)
    house.run()
    for lane in range(4):
        check(house, expected, f"lane{lane}", PROMPT, lane=lane)
        assert house.meters[f"lane{lane}"].cached_tokens == (3 * B if lane else 0)
    for k in range(mates):
        check(house, expected, f"mate{k}", MATES[k], temperature=0.0)
    assert len({tuple(house.ids[f"lane{lane}"]) for lane in range(4)}) > 1


def test_kv9_a_second_turn_hits_the_first_answer(opened, expected):
    house = House(opened(24))
    house.add("one", PROMPT)
    house.run()
    turn = PROMPT + house.ids["one"] + MATES[0]
    house.add("two", turn)
    house.run()
    assert house.meters["two"].cached_tokens == 4 * B
    check(house, expected, "two", turn)


def test_kv5_a_salt_changes_nothing_but_the_sharing(opened, expected):
    house = House(opened(24))
    house.add("one", PROMPT)
    house.run()
    house.add("two", PROMPT, salt="tenant")
    house.run()
    assert house.meters["two"].cached_tokens == 0
    check(house, expected, "two", PROMPT)


def test_smp6_sixteen_alike_in_one_batch(opened, expected):
    house = House(opened(96))
    for k in range(16):
        house.add(f"j{k}", PROMPT, salt=f"{k}")
    house.run()
    for k in range(16):
        check(house, expected, f"j{k}", PROMPT)
