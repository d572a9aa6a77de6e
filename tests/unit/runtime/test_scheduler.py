"""Scheduler cases, one by one, on a backend whose output betrays any KV mix-up."""

from itertools import pairwise

import pytest

from galley.errors import ContextLengthExceeded, EngineFault, InvalidRequest, Overloaded
from galley.runtime.job import State
from galley.runtime.meter import Costs
from galley.runtime.policy import Policy
from galley.types import SamplingParams
from tests.fake import Bench, FakeBackend, alone

P = list(range(100, 140))  # 40 tokens: two and a half blocks


class Eager(Policy):
    """Admits on nothing but the known tokens, so that preemption happens."""

    def reserve(self, jobs, block_size, pool_size):
        return 0


def test_one_job_runs_to_length():
    bench = Bench()
    bench.add("a", P, max_tokens=5)
    bench.run()
    assert len(bench.ids("a")) == 5
    assert bench.last("a").finish == "length"
    assert bench.scheduler.pool.in_use == 0
    # One step for the prompt with the first token, then one a token.
    assert [len(plan) for plan in bench.plans] == [1] * 5
    assert [plan[0][1] for plan in bench.plans] == [40, 1, 1, 1, 1]


def test_a_prompt_of_one_token():
    bench = Bench()
    bench.add("a", [7], max_tokens=40)
    bench.run()
    assert bench.ids("a") == alone([7], max_tokens=40)
    bench.add("b", [7], max_tokens=40)
    bench.run()
    assert bench.ids("b") == bench.ids("a")


def test_max_tokens_one_ends_in_the_prompt_step():
    bench = Bench()
    bench.add("a", P, max_tokens=1)
    assert [out.finish for out in bench.step()] == ["length"]
    assert not bench.scheduler.busy


# -- SCH-1, SCH-2 ---------------------------------------------------------------------------------------


def test_sch1_chunks_keep_within_budget_and_chunk():
    bench = Bench(token_budget=16, chunk=7)
    bench.add("a", range(40))
    bench.add("b", range(500, 540))
    bench.add("c", range(700, 740))
    bench.run()
    assert bench.plans[0] == [("a", 7), ("b", 7), ("c", 2)]
    assert bench.ids("a") == alone(range(40))
    assert bench.ids("b") == alone(range(500, 540))


def test_sch1_a_prompt_for_which_no_budget_is_left_is_not_in_the_step():
    bench = Bench(token_budget=4, chunk=2)
    bench.add("a", range(40))
    bench.add("b", range(500, 540))
    bench.step()
    bench.add("urgent", range(700, 740), options={"urgent": True})
    bench.step()
    assert bench.plans[-1] == [("urgent", 2), ("a", 2)]
    bench.run()


def test_sch1_max_jobs_bounds_the_batch():
    bench = Bench(max_jobs=2)
    for i in range(5):
        bench.add(f"j{i}", range(50 * i, 50 * i + 20))
    bench.run()
    assert max(len(plan) for plan in bench.plans) == 2
    assert len(bench.outs) == 5


def test_sch2_a_6000_token_prompt_does_not_stall_a_running_stream():
    bench = Bench(FakeBackend(num_blocks=600), context=8192, token_budget=256)
    bench.add("stream", P, max_tokens=60)
    for _ in range(5):
        bench.step()
    bench.add("long", [i % 900 for i in range(6000)], max_tokens=2)
    steps = 0
    while not bench.outs.get("long"):
        before = len(bench.ids("stream"))
        plan_tokens = sum(n for _, n in bench.step() and bench.plans[-1])
        # Every step of the long prefill gives the stream its token and is within budget.
        assert len(bench.ids("stream")) == before + 1
        assert plan_tokens <= 256
        steps += 1
    assert steps == -(-6000 // 255)
    bench.run()
    assert bench.ids("stream") == alone(P, max_tokens=60)


def test_sch2_decodes_come_first_in_the_plan():
    bench = Bench(token_budget=8)
    bench.add("a", range(8), max_tokens=20)
    bench.step()
    bench.add("b", range(200, 240))
    bench.step()
    assert bench.plans[-1] == [("a", 1), ("b", 7)]


def test_sch2_more_decodes_than_budget_take_turns():
    bench = Bench(token_budget=2, max_jobs=8)
    for i in range(4):
        bench.add(f"j{i}", [i + 1], max_tokens=10)
    bench.run()
    for i in range(4):
        assert bench.ids(f"j{i}") == alone([i + 1], max_tokens=10)
        arrivals = [n for n, plan in enumerate(bench.plans) if any(job == f"j{i}" for job, _ in plan)]
        assert max(b - a for a, b in pairwise(arrivals)) <= 3


# -- SCH-3 ----------------------------------------------------------------------------------------------


def test_sch3_what_can_never_fit_the_context_is_refused_at_submit():
    bench = Bench(context=64)
    with pytest.raises(ContextLengthExceeded) as refused:
        bench.add("a", P, max_tokens=25)
    assert refused.value.extra == {"n_prompt_tokens": 40, "n_ctx": 64, "max_tokens": 25}
    with pytest.raises(ContextLengthExceeded):
        bench.add("a", range(64), max_tokens=None)
    bench.add("a", P, max_tokens=24)
    bench.run()
    assert len(bench.ids("a")) == 24


def test_sch3_what_can_never_fit_the_pool_is_refused_at_submit():
    bench = Bench(FakeBackend(num_blocks=4))
    with pytest.raises(ContextLengthExceeded):
        bench.add("a", P, max_tokens=26)
    bench.add("a", P, max_tokens=25)  # 65 known tokens, 64 of them computed: exactly four blocks
    bench.run()
    assert bench.ids("a") == alone(P, max_tokens=25)


def test_no_limit_means_the_rest_of_the_context():
    bench = Bench(context=64)
    bench.add("a", P, max_tokens=None)
    bench.run()
    assert len(bench.ids("a")) == 24
    assert bench.last("a").finish == "length"


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [([], {}, "prompt"), ([5000], {}, "prompt"), ([-1], {}, "prompt"), ([1], {"temperature": 1.0}, "seed")],
)
def test_bad_input_is_refused(prompt, params, param):
    bench = Bench()
    with pytest.raises(InvalidRequest) as refused:
        bench.scheduler.submit(
            "a", prompt, SamplingParams(max_tokens=4, **({"temperature": 0.0} | params)), 0.0
        )
    assert refused.value.param == param


def test_a_job_id_in_use_is_refused():
    bench = Bench()
    bench.add("a", P)
    with pytest.raises(InvalidRequest):
        bench.add("a", P)


def test_a_full_queue_refuses():
    bench = Bench(max_queue=2)
    bench.add("a", P)
    bench.add("b", P)
    with pytest.raises(Overloaded) as refused:
        bench.add("c", P)
    assert refused.value.retryable


# -- prefix cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 48])
def test_kv4_kv9_a_repeated_prompt_hits_all_full_blocks_but_computes_its_last_token(length):
    bench = Bench()
    bench.add("cold", P[:1] * length)
    bench.run()
    bench.add("warm", P[:1] * length)
    bench.run()
    assert bench.ids("warm") == bench.ids("cold")
    assert bench.outs["warm"][0].cached_tokens == (length - 1) // 16 * 16
    assert bench.last("warm").meter.computed_tokens == bench.last("cold").meter.computed_tokens - (
        (length - 1) // 16 * 16
    )


def test_the_answer_is_cached_too_for_the_next_turn():
    bench = Bench()
    bench.add("one", P, max_tokens=30)
    bench.run()
    turn = P + bench.ids("one") + [1, 2, 3]
    bench.add("two", turn)
    bench.run()
    assert bench.outs["two"][0].cached_tokens == 64  # 69 of 70 are computed: four full blocks
    assert bench.ids("two") == alone(turn)


def test_kv5_a_salt_isolates():
    bench = Bench()
    bench.add("a", P)
    bench.run()
    bench.add("b", P, options={"salt": "s"})
    bench.run()
    assert bench.outs["b"][0].cached_tokens == 0
    bench.add("c", P, options={"salt": "s"})
    bench.run()
    assert bench.outs["c"][0].cached_tokens == 32
    assert bench.ids("a") == bench.ids("b") == bench.ids("c")


def test_kv13_meter_counts_hits_and_writes():
    bench = Bench()
    bench.add("a", P)
    bench.run()
    bench.add("b", [*P[:32], *range(500, 540)])
    bench.run()
    a, b = bench.last("a").meter, bench.last("b").meter
    assert (a.cached_tokens, a.cache_write_tokens) == (0, 32)
    assert (b.cached_tokens, b.cache_write_tokens) == (32, 32)
    counters = bench.scheduler.counters
    assert (counters.cache_query_tokens, counters.cache_hit_tokens) == (112, 32)


def test_sch8_simultaneous_twins_prefill_once():
    bench = Bench()
    for lane in range(4):
        bench.add(f"j{lane}", P, lane=lane, temperature=1.0, seed=9)
    bench.run()
    assert bench.plans[0] == [("j0", 40)]
    assert bench.plans[1][1:] == [("j1", 8), ("j2", 8), ("j3", 8)]
    outputs = [bench.ids(f"j{lane}") for lane in range(4)]
    assert len({tuple(ids) for ids in outputs}) == 4
    for lane in range(4):
        assert outputs[lane] == alone(P, lane=lane, temperature=1.0, seed=9)


def test_sch8_waits_only_until_the_shared_part_is_published():
    bench = Bench(token_budget=64, chunk=32)
    shared = list(range(64))
    bench.add("a", shared + [1] * 200)
    bench.add("b", shared + [2] * 20)
    bench.run()
    starts = {job: n for n, plan in reversed(list(enumerate(bench.plans))) for job, _ in plan}
    assert starts == {"a": 0, "b": 2}
    assert bench.last("b").meter.cached_tokens == 64


def test_sch8_a_short_shared_prefix_does_not_wait():
    bench = Bench()
    bench.add("a", list(range(31)) + [1] * 9)
    bench.add("b", list(range(31)) + [2] * 9)
    bench.step()
    assert len(bench.plans[0]) == 2
    bench.run()


def test_sch8_other_salts_do_not_wait_for_each_other():
    bench = Bench()
    bench.add("a", P, options={"salt": "x"})
    bench.add("b", P, options={"salt": "y"})
    bench.step()
    assert bench.plans[0] == [("a", 40), ("b", 40)]
    bench.run()


def test_sch8_the_holder_vanishing_frees_the_waiting():
    bench = Bench(token_budget=16)
    bench.add("a", range(100))
    bench.add("b", range(100))
    bench.step()
    bench.scheduler.cancel("a", bench.now)
    bench.run()
    assert bench.ids("b") == alone(range(100))


def cached_then_queued(**limits):
    """One job runs in the only slot; a cold one and then one with a cached prompt wait."""
    bench = Bench(max_jobs=1, **limits)
    for tenant in "xy":  # who share nothing (KV-5)
        bench.add(f"warm-{tenant}", range(64), max_tokens=1, options={"tenant": tenant})
    bench.run()
    bench.add("run", [1, 2, 3], max_tokens=3)
    bench.step()
    bench.add("cold", range(300, 340), max_tokens=1, options={"tenant": "x"})
    bench.add("hit", range(64), max_tokens=1, options={"tenant": "y"})
    return bench


def order_of_arrival(bench):
    bench.run()
    return sorted(("cold", "hit"), key=lambda job: bench.last(job).meter.first_scheduled)


def test_sch8_the_longest_cached_prefix_goes_first_among_neighbours():
    assert order_of_arrival(cached_then_queued()) == ["hit", "cold"]


def test_sch8_not_beyond_the_fairness_window():
    bench = cached_then_queued(policy=Policy(slack=100.0))
    bench.scheduler.fairness.output("y", 51)  # 102 in the counter's terms
    assert order_of_arrival(bench) == ["cold", "hit"]


def test_sch8_not_when_the_queue_is_long():
    assert order_of_arrival(cached_then_queued(policy=Policy(order_queue=1))) == ["cold", "hit"]


def test_sch8_not_across_tiers():
    bench = cached_then_queued()
    bench.add("above", range(500, 540), max_tokens=1, options={"priority": -1})
    bench.run()
    first = [bench.last(job).meter.first_scheduled for job in ("above", "hit", "cold")]
    assert first == sorted(first)


def test_sch8_a_job_is_not_overtaken_for_ever():
    bench = cached_then_queued(policy=Policy(patience=3))
    for i in range(20):
        bench.add(f"hit{i}", range(64), max_tokens=1, options={"tenant": "x"})
    bench.run()
    before = [job for job in bench.outs if job.startswith("hit")]
    started = bench.last("cold").meter.first_scheduled
    assert sum(bench.last(job).meter.first_scheduled < started for job in before) <= 4


def test_kv6_duplicates_of_one_block_do_not_disturb():
    bench = Bench()
    bench.add("a", list(range(20)) + [1] * 30, max_tokens=40)
    bench.add("b", list(range(20)) + [2] * 30, max_tokens=40)
    bench.run()
    assert bench.ids("b") == alone(list(range(20)) + [2] * 30, max_tokens=40)
    bench.add("c", list(range(20)) + [2] * 30, max_tokens=40)
    bench.run()
    assert bench.last("c").meter.cached_tokens == 48
    assert bench.ids("c") == bench.ids("b")


def test_kv9_after_eviction():
    bench = Bench(FakeBackend(num_blocks=8))
    bench.add("a", P)
    bench.run()
    bench.add("b", range(500, 610))
    bench.run()
    assert bench.scheduler.tree.evictions > 0
    bench.add("c", P)
    bench.run()
    assert bench.ids("c") == bench.ids("a")


# -- preemption -----------------------------------------------------------------------------------------


def test_sch5_preempted_jobs_resume_where_they_were():
    bench = Bench(FakeBackend(num_blocks=10), policy=Eager())
    for i in range(3):
        bench.add(f"j{i}", range(200 * i, 200 * i + 30), temperature=0.9, seed=i, max_tokens=60)
    bench.run()
    assert bench.scheduler.counters.preemptions > 0
    for i in range(3):
        assert bench.ids(f"j{i}") == alone(
            range(200 * i, 200 * i + 30), temperature=0.9, seed=i, max_tokens=60
        )
    assert bench.scheduler.counters.recomputed_tokens == sum(
        bench.last(f"j{i}").meter.recomputed_tokens for i in range(3)
    )


def test_sch5_victim_is_lowest_priority_then_least_lost_then_newest():
    bench = Bench()
    jobs = [
        bench.add(f"j{i}", range(100 * i, 100 * i + 33), options={"priority": p})
        for i, p in enumerate([0, 1, 1])
    ]
    bench.step()
    policy = bench.scheduler.policy
    assert policy.victim(jobs, 16, forced=False) is jobs[2]
    jobs[2].computed += 3
    assert policy.victim(jobs, 16, forced=False) is jobs[1]
    jobs[1].resumed_at = len(jobs[1].tokens) - 15
    assert policy.victim(jobs, 16, forced=False) is jobs[2]
    jobs[2].resumed_at = len(jobs[2].tokens) - 16
    assert policy.victim(jobs, 16, forced=False) is jobs[2]
    for job in jobs:
        job.resumed_at = len(job.tokens)
    assert policy.victim(jobs, 16, forced=False) is None
    assert policy.victim(jobs, 16, forced=True) is jobs[1]


def test_sch5_resume_is_mostly_a_hit():
    bench = Bench(FakeBackend(num_blocks=9), policy=Eager())
    bench.add("a", range(64), max_tokens=20)
    bench.add("b", range(200, 264), max_tokens=20)
    bench.run()
    meter = bench.last("b").meter
    assert meter.preemptions == 1
    assert 0 < meter.recomputed_tokens <= 32
    assert bench.ids("b") == alone(range(200, 264), max_tokens=20)


def test_sch5_preempted_before_new():
    bench = Bench(FakeBackend(num_blocks=8), policy=Eager())
    bench.add("a", range(60), max_tokens=30)
    bench.add("b", range(200, 260), max_tokens=30)
    while not any(job.state is State.PREEMPTED for job in bench.scheduler.jobs.values()):
        assert bench.scheduler.busy
        bench.step()
    bench.add("c", [1, 2, 3], options={"priority": 0})
    order = [job.id for job in bench.scheduler.queue.ordered(bench.now)]
    assert order == ["b", "c"]
    bench.run()


def test_sch10_the_estimate_jumps_and_decays():
    policy = Policy()
    start = policy.ratio
    policy.preempted()
    assert policy.ratio > start
    for _ in range(2000):
        policy.step()
    assert policy.ratio == policy.floor


def test_sch10_admission_leaves_room_for_running_jobs():
    bench = Bench(FakeBackend(num_blocks=20))
    bench.add("a", range(16), max_tokens=200)
    bench.add("b", range(100, 320), max_tokens=4)  # 14 blocks: would fit now, not beside what "a" will need
    bench.step()
    assert bench.plans[0] == [("a", 16)]
    bench.run()
    assert bench.scheduler.counters.preemptions == 0
    assert bench.ids("b") == alone(range(100, 320), max_tokens=4)


def test_sch4_smaller_jobs_pass_one_that_does_not_fit_but_not_for_ever():
    policy = Eager(patience=5)
    bench = Bench(FakeBackend(num_blocks=10), policy=policy, max_jobs=4)
    bench.add("long", range(16), max_tokens=100)
    bench.step()
    bench.add("big", range(100, 240), max_tokens=2)
    passed = 0
    for i in range(30):
        bench.add(f"s{i}", [500 + i], max_tokens=1)
        bench.step()
        passed += f"s{i}" in bench.outs
    assert 0 < passed <= 6
    bench.run()
    assert bench.ids("big") == alone(range(100, 240), max_tokens=2)


def test_sch7_priority_lower_runs_first_and_waiting_lifts():
    bench = Bench(max_jobs=1)
    bench.add("run", P, max_tokens=3)
    bench.step()
    bench.add("low", [1], options={"priority": 5})
    bench.add("high", [2], options={"priority": 0})
    assert [job.id for job in bench.scheduler.queue.ordered(bench.now)] == ["high", "low"]
    bench.now += 60.0
    bench.add("fresh", [3], options={"priority": 0})
    # Lifted to the best tier in which anybody waits, and no higher: there, first come, first served.
    assert [job.id for job in bench.scheduler.queue.ordered(bench.now)] == ["low", "high", "fresh"]
    bench.run()


def test_sch9_the_same_log_gives_the_same_plans():
    def play():
        bench = Bench(FakeBackend(num_blocks=12), policy=Policy(watermark=0.0), token_budget=40)
        for i in range(12):
            bench.add(
                f"j{i}", range(i % 3 * 60, i % 3 * 60 + 35 + i), max_tokens=20, options={"priority": i % 2}
            )
            bench.step()
            if i == 7:
                bench.scheduler.cancel("j5", bench.now)
        bench.run()
        return bench.plans

    assert play() == play()


# -- how jobs end ---------------------------------------------------------------------------------------


def test_eos_ends_with_stop_and_is_counted():
    first = alone(P, max_tokens=8)
    bench = Bench(eos=frozenset([first[3]]))
    bench.add("a", P)
    bench.run()
    assert bench.ids("a") == first[: first.index(first[3]) + 1]
    last = bench.last("a")
    assert (last.finish, last.stop_token) == ("stop", None)
    assert last.meter.completion_tokens == len(bench.ids("a"))


def test_ignore_eos_goes_on():
    first = alone(P, max_tokens=8)
    bench = Bench(eos=frozenset([first[3]]))
    bench.add("a", P, ignore_eos=True)
    bench.run()
    assert bench.ids("a") == first


def test_stop_token_ids_name_the_token_also_when_eos_is_ignored():
    first = alone(P, max_tokens=8)
    bench = Bench()
    bench.add("a", P, stop_token_ids=[first[2]], ignore_eos=True)
    bench.run()
    assert bench.last("a").finish == "stop"
    assert bench.last("a").stop_token == first[2]


def test_min_tokens_bans_every_end_until_reached():
    first = alone(P, max_tokens=8)
    bench = Bench(eos=frozenset([first[0]]))
    bench.add("a", P, min_tokens=4, stop_token_ids=[first[1]])
    bench.run()
    assert first[0] not in bench.ids("a")[:4]
    assert len(bench.ids("a")) >= 4


def test_finish_ends_well_and_keeps_the_cache():
    bench = Bench()
    bench.add("a", P, max_tokens=50)
    for _ in range(4):
        bench.step()
    assert bench.scheduler.finish("a", bench.now)
    bench.step()
    assert bench.last("a").finish == "stop"
    assert bench.last("a").error is None
    assert bench.last("a").meter.completion_tokens == 4
    assert bench.scheduler.pool.idle == 2


# -- CAN ------------------------------------------------------------------------------------------------


def test_can2_cancel_in_every_state_and_twice():
    bench = Bench(FakeBackend(num_blocks=8), policy=Eager(), max_jobs=2)
    assert not bench.scheduler.cancel("nobody", 0.0)
    bench.add("a", range(60), max_tokens=30)
    bench.add("b", range(200, 260), max_tokens=30)
    bench.add("w", range(300, 310))
    while not any(job.state is State.PREEMPTED for job in bench.scheduler.jobs.values()):
        assert bench.scheduler.busy
        bench.step()
    for job in ("w", "b", "a", "a"):
        bench.scheduler.cancel(job, bench.now)
        assert bench.scheduler.check() == []
    assert not bench.scheduler.busy
    bench.step()
    assert {job: outs[-1].error.code for job, outs in bench.outs.items()} == dict.fromkeys("wba", "cancelled")
    assert bench.scheduler.pool.in_use == 0


@pytest.mark.parametrize("verb", ["cancel", "finish"])
def test_can2_in_flight_is_freed_only_in_commit(verb):
    bench = Bench()
    bench.add("a", P)
    held = []

    def meanwhile():
        getattr(bench.scheduler, verb)("a", bench.now)
        getattr(bench.scheduler, verb)("a", bench.now)
        held.append(bench.scheduler.pool.in_use)

    bench.loop.arrivals = meanwhile
    outs = bench.step()
    assert held == [3]
    assert bench.scheduler.pool.in_use == 0
    assert len(outs) == 1
    assert outs[0].last
    assert outs[0].token_ids == []
    assert outs[0].meter.computed_tokens == 40
    bench.loop.arrivals = None
    bench.add("b", P)
    bench.run()
    assert bench.last("b").meter.cached_tokens == 32


@pytest.mark.parametrize("error", [EngineFault, RuntimeError, MemoryError])
def test_can3_kv3_a_failed_forward_ends_its_jobs_only_and_publishes_nothing(error):
    bench = Bench(FakeBackend(fail_on=frozenset([0]), error=error), max_jobs=1)
    bench.add("a", P)
    bench.add("b", range(300, 340))
    bench.step()
    assert isinstance(bench.last("a").error, EngineFault)
    assert bench.last("a").meter is not None
    assert len(bench.scheduler.tree) == 0
    bench.run()
    assert bench.ids("b") == alone(range(300, 340))
    bench.add("c", P)
    bench.run()
    assert bench.last("c").meter.cached_tokens == 0
    assert bench.ids("c") == alone(P)
    assert bench.loop.faults == 1


def test_can3_blocks_of_earlier_good_steps_stay():
    bench = Bench(FakeBackend(fail_on=frozenset([5])))
    bench.add("a", P, max_tokens=20)
    bench.run()
    assert isinstance(bench.last("a").error, EngineFault)
    assert len(bench.ids("a")) == 5
    bench.add("b", P, max_tokens=20)
    bench.run()
    assert bench.last("b").meter.cached_tokens == 32
    assert bench.ids("b") == alone(P, max_tokens=20)


def test_can3_a_backend_that_draws_too_few_is_a_fault():
    bench = Bench()
    sample = bench.backend.sample
    bench.backend.sample = lambda draws: type(sample(draws))([], [], [], [])  # type: ignore[method-assign]
    bench.add("a", P)
    bench.run()
    assert isinstance(bench.last("a").error, EngineFault)


def test_can5_queue_deadline_counts_until_first_scheduled():
    bench = Bench(max_jobs=1)
    bench.add("run", P, max_tokens=30, options={"max_queue_s": 5.0})
    bench.add("wait", [1], options={"max_queue_s": 5.0})
    bench.run()
    assert bench.last("run").finish == "length"
    error = bench.last("wait").error
    assert (error.code, error.status) == ("deadline_exceeded", 503)
    assert bench.last("wait").meter.finished == pytest.approx(5.0)


def test_can5_total_deadline_ends_a_running_job():
    bench = Bench()
    bench.add("a", P, max_tokens=100, options={"max_total_s": 10.0})
    bench.run()
    error = bench.last("a").error
    assert (error.code, error.status, error.param) == ("deadline_exceeded", 504, "max_total_s")
    assert len(bench.ids("a")) == 9
    assert bench.scheduler.pool.in_use == 0


def test_deadlines_of_finished_jobs_do_not_pile_up():
    bench = Bench()
    for i in range(300):
        bench.add(f"j{i}", [i + 1], max_tokens=1, options={"max_total_s": 1e6})
        bench.run()
    assert len(bench.scheduler.deadlines._heap) <= 130
    assert bench.scheduler.deadlines.next is None


def test_reset_ends_everyone_and_starts_afresh():
    bench = Bench(max_jobs=1)
    bench.add("a", P, max_tokens=30)
    bench.add("b", [1])
    bench.step()
    bench.scheduler.reset(EngineFault("x"), bench.now)
    bench.step()
    assert isinstance(bench.last("a").error, EngineFault)
    assert isinstance(bench.last("b").error, EngineFault)
    assert bench.scheduler.pool.free == 64
    bench.add("c", P)
    bench.run()
    assert bench.ids("c") == alone(P)


def test_plan_and_commit_alternate():
    bench = Bench()
    bench.add("a", P)
    plan = bench.scheduler.plan(1.0)
    with pytest.raises(RuntimeError):
        bench.scheduler.plan(1.0)
    bench.scheduler.fail(plan, EngineFault("x"), 1.0)
    with pytest.raises(RuntimeError):
        bench.scheduler.fail(plan, EngineFault("x"), 1.0)


# -- meters ---------------------------------------------------------------------------------------------


def test_meter_counts_flop_bytes_and_time():
    costs = Costs(
        token_flop=10.0, attention_flop=1.0, head_flop=100.0, weight_bytes=1000.0, kv_bytes_per_token=2.0
    )
    bench = Bench(costs=costs)
    bench.add("a", range(10), max_tokens=3)
    bench.run()
    meter = bench.last("a").meter
    assert meter.prefill_flop == 10 * 10 + 55 + 100
    assert meter.decode_bytes == (1000 + 11 * 2) + (1000 + 12 * 2)
    assert (
        meter.kv_byte_seconds == 2 * 16 * 2.0
    )  # one block from the first plan (t=1) to the last commit (t=3)
    assert (meter.first_scheduled, meter.first_token, meter.last_token, meter.finished) == (
        1.0,
        1.0,
        3.0,
        3.0,
    )
    assert (meter.steps, meter.computed_tokens, meter.peak_blocks, meter.itl_max_s) == (3, 12, 1, 1.0)
    assert (meter.prompt_tokens, meter.completion_tokens) == (10, 3)


def test_meter_prefill_flop_does_not_depend_on_chunks():
    costs = Costs(token_flop=10.0, attention_flop=1.0, head_flop=100.0)
    totals = []
    for chunk in (1, 3, 64):
        bench = Bench(costs=costs, chunk=chunk)
        bench.add("a", range(40), max_tokens=1)
        bench.run()
        totals.append(bench.last("a").meter.prefill_flop)
    assert len(set(totals)) == 1


def test_weights_are_shared_by_the_sequences_of_a_step():
    bench = Bench(costs=Costs(weight_bytes=1000.0))
    bench.add("a", [1], max_tokens=3)
    bench.add("b", [2], max_tokens=3)
    bench.run()
    assert bench.last("a").meter.decode_bytes == bench.last("b").meter.decode_bytes == 1000.0
