"""Reading a prompt's rows, for embeddings and for its log-probabilities: however the prompt is cut, preempted
or accompanied, and whatever is cached, the numbers are the same, bit for bit (KV-9, SMP-2, SMP-6)."""

import numpy as np
import pytest

from galley.model.gguf import GGUF
from galley.runtime.backend import native_missing, open_backend
from galley.runtime.out import StepOut
from galley.runtime.plan import Draws, Rows
from galley.runtime.reading import Pooled, Scored
from galley.types import SamplingParams
from tests.equality.test_matrix import MATES, PROMPT, Eager, House, spec_of
from tests.tiny import tiny_gguf

KINDS = [("llama", "Q4_1", "native"), ("qwen3", "Q4_0", "native"), ("qwen2", "Q8_0", "reference")]
CHUNKS = (1, 7, 16, 512)
POOLINGS = ("mean", "last", "cls")


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def backend(request, tmp_path_factory):
    arch, types, kind = request.param
    if kind == "native" and (why := native_missing()):
        pytest.skip(why)
    path = tiny_gguf(tmp_path_factory.mktemp("tiny") / "m.gguf", arch, types=types, head_dim=32, seed=3)
    gguf = GGUF.open(path)
    made = open_backend(kind, gguf, spec_of(gguf), threads=2, num_blocks=64).backend
    yield made
    made.close()
    gguf.close()


class Study(House):
    """Keeps the steps' outcomes too."""

    def __init__(self, backend, **limits):
        super().__init__(backend, **limits)
        self.outs: dict[str, list[StepOut]] = {}

    def step(self):
        for out in self.loop.step():
            assert out.error is None, out.error
            self.outs.setdefault(out.job_id, []).append(out)
            self.ids.setdefault(out.job_id, []).extend(out.token_ids)
        assert self.scheduler.check() == []

    def last(self, job: str) -> StepOut:
        return self.outs[job][-1]


def read(house: House, job: str, reading, prompt=None, *, tokens=0, top=2):
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=tokens, logprobs=top)
    return house.scheduler.submit(job, prompt or PROMPT, params, 0.0, reading=reading)


@pytest.fixture(scope="module")
def truth(backend):
    """All states and all logits of the prompt, out of one step of the backend."""
    rows = Rows()
    rows.add(PROMPT, 0, [9, 3, 7, 1], len(PROMPT))
    rows.read(0, len(PROMPT), states=True)
    backend.run(rows)
    return backend.states(), backend.logits()


def pooled(states: np.ndarray, kind: str) -> bytes:
    if kind == "mean":
        total = np.zeros(states.shape[1])
        for row in states:
            total += row
        return (total / len(states)).astype(np.float32).tobytes()
    return states[0 if kind == "cls" else -1].tobytes()


def test_smp6_the_states_of_a_row_do_not_depend_on_what_else_is_wanted(backend, truth):
    states, logits = truth
    for out, wanted in (([], [0, 17, 52]), ([5, 52], [5, 6]), ([52], []), ([51, 52], list(range(53)))):
        rows = Rows()
        rows.add(MATES[0], 0, [20, 21], 0)
        rows.add(PROMPT, 0, [4, 8, 2, 6], 0)
        for place in wanted:
            rows.read(place, place + 1, states=True)
        for place in out:
            rows.read(place, place + 1, states=False)
        backend.run(rows)
        assert backend.states().tobytes() == states[wanted].tobytes()
        assert np.array_equal(backend.logits(), logits[out])
        draws = Draws()
        for place in out:
            draws.add(seed=1, position=place, lane=0, temperature=0.0, logprobs=1, given=7)
        if out:
            assert backend.sample(draws).ids == [7] * len(out)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_kv9_a_pooled_vector_is_the_same_by_every_way(backend, truth, chunk):
    states, _ = truth
    for scene in ("cold", "cached", "mates"):
        house = Study(backend, chunk=chunk, token_budget=64)
        if scene == "cached":
            house.add("earlier", PROMPT[:40])
            house.run()
        if scene == "mates":
            for i, mate in enumerate(MATES):
                house.add(f"mate{i}", mate)
        for pooling in POOLINGS:
            read(house, pooling, Pooled(pooling, len(PROMPT)))
        house.run()
        for pooling in POOLINGS:
            assert house.last(pooling).vector == pooled(states, pooling), (scene, pooling)
            assert house.ids.get(pooling, []) == []
        cached = {pooling: house.last(pooling).cached_tokens for pooling in POOLINGS}
        assert cached["mean"] == 0, "what is cached has no states"
        if scene == "cached":
            assert cached["last"] >= 32, "the last state alone may start from the cache"


def test_sch5_a_preempted_reading_goes_on_where_it_was(backend, truth):
    states, logits = truth
    for reading, want in ((Pooled("mean", 53), pooled(states, "mean")), (Scored(53), None)):
        house = Study(backend, chunk=10, policy=Eager())
        job = read(house, "a", reading)
        for _ in range(3):
            house.step()
        plan = house.scheduler.plan(0.0)
        house.scheduler.preemption.preempt(job, plan, 0.0)
        house.scheduler.fail(plan, None, 0.0)
        house.run()
        assert house.last("a").meter.preemptions == 1
        # What was read is not read again, so the blocks it left in the cache serve.
        assert house.last("a").meter.computed_tokens < 53 + 16
        if want is not None:
            assert house.last("a").vector == want
        else:
            assert [(s.token_id, s.logprob) for s in house.last("a").prompt] == expected(logits)


def expected(logits: np.ndarray) -> list[tuple[int, float]]:
    wide = logits.astype(np.float64)
    norm = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1)) + wide.max(1)
    return [
        (PROMPT[p + 1], pytest.approx(wide[p, PROMPT[p + 1]] - norm[p], abs=2e-4))
        for p in range(len(PROMPT) - 1)
    ]


@pytest.mark.parametrize("tokens", (0, 6))
def test_smp2_the_scores_of_a_prompt_are_the_same_by_every_way(backend, truth, tokens):
    _, logits = truth
    found = []
    for chunk in CHUNKS:
        for scene in ("cold", "cached", "mates"):
            house = Study(backend, chunk=chunk, token_budget=48)
            house.add("plain", PROMPT, tokens=6)
            if scene == "cached":
                house.run()
            if scene == "mates":
                read(house, "other", Scored(len(MATES[2])), MATES[2], tokens=3)
                read(house, "pool", Pooled("mean", len(MATES[3])), MATES[3])
            read(house, "a", Scored(len(PROMPT)), tokens=tokens)
            house.run()
            out = [out for out in house.outs["a"] if out.prompt is not None]
            assert len(out) == 1
            assert [(s.token_id, s.logprob) for s in out[0].prompt] == expected(logits)
            assert all(len(s.top) == 2 and s.rank >= 1 for s in out[0].prompt)
            if tokens:
                assert house.ids["a"] == house.ids["plain"], "reading changes nothing of the draw"
            else:
                assert house.ids.get("a", []) == [] and house.last("a").finish == "length"
            found.append(out[0].prompt)
    assert all(one == found[0] for one in found), "bit for bit"
