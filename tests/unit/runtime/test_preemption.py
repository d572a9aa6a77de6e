"""What preemption costs: only what is needed, only once in a while, and little in all (SCH-5, SCH-6)."""

import random

import pytest

from galley.runtime.job import State
from galley.runtime.plan import Drawn
from galley.runtime.policy import Policy
from galley.runtime.scheduler import Scheduler
from galley.types import SamplingParams
from tests.fake import Bench, FakeBackend, alone


class Eager(Policy):
    """Admits on nothing but the known tokens, so that preemption happens."""

    def reserve(self, jobs, block_size, pool_size):
        return 0


def until_preempted(bench):
    while True:
        for job in bench.scheduler.jobs.values():
            if job.state is State.PREEMPTED:
                return job
        bench.step()


def test_sch5_only_the_tail_blocks_needed_are_given_up():
    """One block was needed: of the victim's six, five are still there and come back as a hit."""
    bench = Bench(FakeBackend(num_blocks=13), policy=Eager())
    bench.add("a", range(90), max_tokens=30)
    bench.add("b", range(200, 290), max_tokens=30)
    victim = until_preempted(bench)
    size = bench.scheduler.block_size
    kept = bench.scheduler.tree.match(victim.table.namespace, victim.tokens)
    had = (victim.reached - 1) // size
    assert len(kept) >= had - 1 >= 4
    bench.run()
    assert bench.ids(victim.id) == alone(range(90) if victim.id == "a" else range(200, 290), max_tokens=30)


def test_sch5_no_second_preemption_before_a_block_of_new_tokens():
    bench = Bench(FakeBackend(num_blocks=20), policy=Eager())
    for i in range(12):
        bench.add(f"j{i}", range(70 * i, 70 * i + 20), max_tokens=40 + 11 * i)
    progress: dict[str, int] = {}
    seen: dict[str, int] = {}
    forced = bench.scheduler.preemption.force
    calls = []
    bench.scheduler.preemption.force = lambda plan, now: (calls.append(now), forced(plan, now))
    while bench.scheduler.busy:
        before = len(calls)
        bench.step()
        for job in bench.scheduler.jobs.values():
            if job.meter.preemptions > seen.get(job.id, 0):
                if job.id in seen and len(calls) == before:
                    assert len(job.tokens) - progress[job.id] >= bench.scheduler.block_size
                seen[job.id] = job.meter.preemptions
                progress[job.id] = len(job.tokens)
    assert max(seen.values()) >= 2, "the case must come up"


def test_sch5_new_jobs_do_not_take_what_a_preempted_one_has_left():
    bench = Bench(FakeBackend(num_blocks=13), policy=Eager(patience=1000))
    bench.add("a", range(90), max_tokens=60)
    bench.add("b", range(200, 290), max_tokens=60)
    victim = until_preempted(bench)
    for i in range(8):
        bench.add(f"new{i}", range(400 + i, 416 + i), max_tokens=4)
    while victim.state is State.PREEMPTED:
        assert not any(bench.outs.get(f"new{i}") for i in range(8))
        bench.step()
    bench.run()
    assert {bench.last(job).finish for job in bench.outs} == {"length"}


def test_sch6_a_preempted_job_holds_no_memory_and_recomputes_what_was_taken():
    bench = Bench(FakeBackend(num_blocks=13), policy=Eager())
    bench.add("a", range(90), max_tokens=30)
    bench.add("b", range(200, 290), max_tokens=30)
    victim = until_preempted(bench)
    assert len(victim.table) == 0 and victim.computed == 0
    reached = victim.reached
    bench.run()
    meter = bench.last(victim.id).meter
    assert 0 < meter.recomputed_tokens <= reached
    assert meter.computed_tokens - meter.recomputed_tokens == victim.prompt_len + 30 - 1 - meter.cached_tokens


def test_sch3_when_everyone_is_stalled_and_spared_somebody_gives_way_all_the_same():
    """Two jobs just resumed, both at a block's end, no block left: one must go on."""
    bench = Bench(FakeBackend(num_blocks=4), policy=Eager())
    for i in range(2):
        bench.add(f"j{i}", range(100 * i, 100 * i + 32), max_tokens=20)
    bench.step()
    for job in bench.scheduler.running:
        job.resumed_at = len(job.tokens)
    steps = len(bench.plans)
    bench.run()
    assert all(bench.plans[steps:]), "no empty step"
    for i in range(2):
        assert bench.ids(f"j{i}") == alone(range(100 * i, 100 * i + 32), max_tokens=20)


@pytest.mark.parametrize("prompt, output", [(400, 200), (100, 500)])
def test_sch5_recompute_tax_at_one_and_a_half_times_the_memory(prompt, output):
    """Thirty-two jobs at a time that need 1.5 times the pool: at most a tenth of the work is done again."""
    dice = random.Random(3)
    size, slots = 16, 32
    scheduler = Scheduler(
        num_blocks=int(slots * (prompt + output) / 1.5 / size),
        block_size=size,
        vocab=50_000,
        context=4096,
        token_budget=512,
        max_jobs=slots,
    )
    for i in range(160):
        tokens = [dice.randrange(50_000) for _ in range(dice.randrange(prompt // 2, prompt * 3 // 2))]
        length = dice.randrange(output // 2, output * 3 // 2)
        params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        scheduler.submit(f"j{i}", tokens, params, 0.0)
    now = 0.0
    while scheduler.busy:
        now += 0.05
        plan = scheduler.plan(now)
        rows = sum(job.computed + n == len(job.tokens) for job, n in plan.rows.items())
        ids = [dice.randrange(50_000) for _ in range(rows)]
        scheduler.commit(plan, Drawn(ids, [0.0] * rows, [0] * rows, [[] for _ in ids]), now)
        scheduler.take()
    counters = scheduler.counters
    assert counters.preemptions > 0
    assert counters.recomputed_tokens / counters.computed_tokens <= 0.10
