"""The equality matrix's disk rows: a prefix that comes back from disk gives the same ids and the same logits,
bit for bit, as one computed cold (KV-9), on every backend.
"""

import threading
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest

from galley.model.families import spec_from_gguf
from galley.model.gguf import GGUF
from galley.runtime.backend import native_missing, open_backend
from galley.runtime.engine import Engine
from galley.runtime.pace import Pace
from galley.runtime.tier import DiskOptions
from galley.types import CacheHint, SamplingParams
from tests.tiny import tiny_gguf

B, TOTAL = 16, 10
PROMPT = [(7 * i + 3) % 290 + 3 for i in range(5 * B + 5)]
ROWS = [("llama", "Q4_1", "reference"), ("llama", "Q4_1", "native"), ("qwen3", "Q8_0", "native")]


class Eager(Pace):
    """Any disk hit is worth taking, so that tiny models take them too, whatever was measured."""

    def __init__(self):
        super().__init__(token_s=1.0, byte_s=1e-12, trip_s=0.0)

    def computed(self, tokens, seconds):
        pass

    def read(self, size, seconds):
        pass


@pytest.fixture(scope="module", params=ROWS, ids="-".join)
def opened(request, tmp_path_factory):
    arch, types, kind = request.param
    if kind == "native" and (why := native_missing()):
        pytest.skip(why)
    path = tiny_gguf(tmp_path_factory.mktemp("tiny") / "m.gguf", arch, types=types, head_dim=32, seed=3)
    gguf = GGUF.open(path)
    made = []

    def build(blocks):
        spec = spec_from_gguf(gguf)
        made.append(open_backend(kind, gguf, spec, threads=2, num_blocks=blocks).backend)
        return made[-1]

    yield build
    for backend in made:
        backend.close()
    gguf.close()


class Watched:
    """An engine over a fresh arena, driven in this thread; keeps the logits behind every token."""

    def __init__(self, backend, disk=None, **options):
        self.engine = Engine(backend, eos_ids=(), model_key="m", disk=disk, pace=Eager(), **options)
        self.logits: dict[str, list[bytes]] = {}
        self.ids: dict[str, list[int]] = {}
        self.last: dict[str, object] = {}
        plan_of = self.engine.scheduler.plan
        self.wanted: list[str] = []

        def spy(now):
            plan = plan_of(now)
            self.wanted = [j.id for j, n in plan.rows.items() if j.computed + n == len(j.tokens)]
            return plan

        self.engine.scheduler.plan = spy
        step = self.engine.loop.step

        def watched_step():
            outs = step()
            for job, row in zip(self.wanted, backend.logits() if self.wanted else (), strict=True):
                self.logits.setdefault(job, []).append(np.asarray(row).tobytes())
            self.wanted = []
            assert self.engine.scheduler.check() == []
            return outs

        self.engine.loop.step = watched_step

    def take(self, out):
        self.ids.setdefault(out.job_id, []).extend(out.token_ids)
        if out.last:
            self.last[out.job_id] = out

    def add(self, job, prompt=PROMPT, *, tokens=TOTAL, temperature=0.8, **options):
        params = SamplingParams(temperature=temperature, seed=5, max_tokens=tokens, top_k=40, logprobs=2)
        self.engine.submit(job, prompt, params, on_step=self.take, **options)

    def run(self):
        while self.engine.turn():
            pass

    def said(self, job):
        return self.ids[job], self.logits[job]

    def cached(self, job):
        return self.last[job].meter.cached_tokens


@contextmanager
def watched(backend, disk=None, **options):
    made = Watched(backend, disk, **options)
    try:
        yield made
    finally:
        made.engine.close()


@pytest.fixture(scope="module")
def cold(opened):
    @cache
    def say(prompt, tokens=TOTAL):
        with watched(opened(64)) as house:
            house.add("alone", list(prompt), tokens=tokens)
            house.run()
            return house.said("alone")

    return say


@pytest.fixture
def disk(tmp_path):
    return DiskOptions(path=tmp_path / "kv", limit=1 << 30)


def before(opened, disk, prompt=PROMPT, **options):
    """A life before the restart: compute a prompt and close."""
    with watched(opened(64), disk) as house:
        house.add("before", prompt, **options)
        house.run()


@pytest.mark.parametrize("chunk", [1, B - 1, B, None])
@pytest.mark.parametrize("mates", [0, 2])
def test_kv9_a_disk_hit_is_bitwise_a_cold_run(opened, cold, disk, chunk, mates):
    before(opened, disk)
    with watched(opened(64), disk, chunk=chunk) as house:
        for k in range(mates):
            house.add(f"mate{k}", [9 + k, *PROMPT])
        house.add("job")
        house.run()
        assert house.cached("job") == 5 * B
        assert house.engine.stats().disk_hit_tokens >= 5 * B
        assert house.said("job") == cold(tuple(PROMPT))
        for k in range(mates):
            assert house.said(f"mate{k}") == cold((9 + k, *PROMPT))


@pytest.mark.parametrize(("length", "hit"), [(B, 0), (B + 1, B), (3 * B, 2 * B), (3 * B + 5, 3 * B)])
def test_kv4_kv9_a_shorter_prompt_hits_what_it_shares_and_leaves_a_token(opened, cold, disk, length, hit):
    before(opened, disk)
    with watched(opened(64), disk) as house:
        house.add("job", PROMPT[:length])
        house.run()
        assert house.cached("job") == hit
        assert house.said("job") == cold(tuple(PROMPT[:length]))


def test_kv9_memory_then_disk(opened, cold, disk):
    before(opened, disk)
    with watched(opened(64), disk) as house:
        house.add("head", PROMPT[: 2 * B + 3])
        house.run()
        loaded = house.engine.stats().disk_hit_tokens
        assert loaded == 2 * B
        house.add("job")
        house.run()
        assert house.engine.stats().disk_hit_tokens == 5 * B
        assert house.said("job") == cold(tuple(PROMPT))


def test_kv9_damaged_in_the_middle_is_recomputed_from_there(opened, cold, disk):
    before(opened, disk)
    (file,) = disk.path.glob("*/*-3.kv")
    data = bytearray(file.read_bytes())
    data[-7] ^= 16
    file.write_bytes(data)
    with watched(opened(64), disk) as house:
        house.add("job")
        house.run()
        assert house.cached("job") == 3 * B
        assert house.engine.stats().disk.damaged == 1
        assert house.said("job") == cold(tuple(PROMPT))
    with watched(opened(64), disk) as house:  # written again by the life before this one
        house.add("job")
        house.run()
        assert house.cached("job") == 5 * B
        assert house.said("job") == cold(tuple(PROMPT))


def test_kv9_in_a_pool_too_small_for_both(opened, cold, disk):
    """Loads and jobs compete for blocks: a load that finds no room is a miss, never a wrong answer."""
    before(opened, disk)
    before(opened, disk, [11, *PROMPT])
    with watched(opened(9), disk) as house:
        for k in range(3):
            house.add(f"a{k}", tokens=12)
            house.add(f"b{k}", [11, *PROMPT], tokens=12)
        house.run()
        for k in range(3):
            assert house.said(f"a{k}") == cold(tuple(PROMPT), 12)
            assert house.said(f"b{k}") == cold((11, *PROMPT), 12)


def test_kv5_tenant_and_salt_do_not_share_on_disk(opened, cold, disk):
    before(opened, disk, tenant="a", salt="s")
    with watched(opened(64), disk) as house:
        for k, apart in enumerate([{"tenant": "b", "salt": "s"}, {"tenant": "a"}, {"salt": "s"}]):
            house.add(f"j{k}", **apart)
            house.run()
            assert house.cached(f"j{k}") == 0
            assert house.said(f"j{k}") == cold(tuple(PROMPT))
        house.add("same", tenant="a", salt="s")
        house.run()
        assert house.cached("same") == 5 * B
        assert house.said("same") == cold(tuple(PROMPT))


def test_kv9_a_second_turn_after_a_restart_hits_the_answer_too(opened, cold, disk):
    before(opened, disk, tokens=2 * B)
    said, _ = cold(tuple(PROMPT), 2 * B)
    turn = [*PROMPT, *said, 7, 8, 9]
    with watched(opened(64), disk) as house:
        house.add("two", turn)
        house.run()
        assert house.cached("two") == 7 * B
        assert house.said("two") == cold(tuple(turn))


def test_memory_only_leaves_nothing_on_disk(opened, cold, disk):
    before(opened, disk, cache=CacheHint(memory_only=True))
    assert list(disk.path.glob("*/*.kv")) == []
    with watched(opened(64), disk) as house:
        for name in ("one", "two"):
            house.add(name, cache=CacheHint(memory_only=True))
            house.run()
        assert house.cached("two") == 5 * B
        assert house.said("two") == cold(tuple(PROMPT))


@pytest.mark.parametrize("state", ["memory", "evicted", "restart"])
@pytest.mark.parametrize("at", [1, 5, 17])
def test_slp_sch6_a_parked_job_goes_on_with_identical_output(opened, cold, disk, state, at):
    total = 2 * B
    ids, logits = cold(tuple(PROMPT), total)
    with watched(opened(12), disk) as first:
        first.add("job", tokens=total)
        while len(first.ids.get("job", ())) < at:
            first.engine.turn()
        future = first.engine.park("job")
        first.run()
        parked = future.result(0)
        assert first.last["job"].error.code == "parked"
        assert first.engine.scheduler.pool.in_use == 0
        if state == "evicted":
            first.add("other", [n % 280 + 5 for n in range(11 * B)], tokens=3)
            first.run()
        if state != "restart":
            first.engine.resume(parked, on_step=first.take, job_id="again")
            first.run()
            second = first
    if state == "restart":
        with watched(opened(12), disk) as second:
            second.engine.resume(parked, on_step=second.take, job_id="again")
            second.run()
    assert first.ids["job"] + second.ids["again"] == ids
    assert first.logits["job"] + second.logits["again"] == logits
    assert second.last["again"].finish == "length"
    assert second.last["again"].meter.recomputed_tokens < B


def test_a_served_engine_loads_for_many_at_once(opened, cold, disk):
    """With the engine's own thread: sixteen jobs of one prompt wait for one load."""
    before(opened, disk)
    engine = Engine(opened(256), eos_ids=(), model_key="m", disk=disk, pace=Eager())
    outs, done = {}, threading.Semaphore(0)

    def take(out):
        outs.setdefault(out.job_id, []).append(out)
        if out.last:
            done.release()

    engine.start()
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=TOTAL, top_k=40, logprobs=2)
    for k in range(16):
        engine.submit(f"j{k}", PROMPT, params, on_step=take)
    for _ in range(16):
        assert done.acquire(timeout=60)
    stats = engine.stats()
    engine.close()
    for k in range(16):
        assert [t for out in outs[f"j{k}"] for t in out.token_ids] == cold(tuple(PROMPT))[0]
        assert outs[f"j{k}"][-1].meter.cached_tokens == 5 * B
    assert stats.disk_hit_tokens == 5 * B
