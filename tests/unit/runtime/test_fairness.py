"""Shares of the machine between tenants, tiers between jobs, and the latency-critical class."""

import random

import pytest

from galley.runtime.fairness import KEPT, Fairness
from galley.runtime.job import State
from galley.runtime.policy import Policy
from tests.fake import Bench, FakeBackend, alone


def jain(shares: list[float]) -> float:
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


def served(bench: Bench, tenant: str) -> float:
    """Service in the counters' own terms, counted from outside: prompts admitted and tokens drawn."""
    w = bench.scheduler.fairness
    total = 0.0
    for job in bench.jobs:
        if job.tenant == tenant:
            if job.meter.first_scheduled is not None:
                total += w.w_in * (job.prompt_len - job.meter.cached_tokens)
            total += w.w_out * job.meter.completion_tokens
    return total


def crowd(bench: Bench, plan: dict[str, tuple[int, int, int]], seed: int = 0) -> None:
    """Queue, by tenant, so many jobs of about so many prompt and output tokens, in random order."""
    dice = random.Random(seed)
    jobs = [(tenant, i, prompt, output) for tenant, (n, prompt, output) in plan.items() for i in range(n)]
    dice.shuffle(jobs)
    bench.jobs = []
    for tenant, i, prompt, output in jobs:
        tokens = [dice.randrange(900) for _ in range(dice.randrange(prompt // 2, prompt + 1))]
        bench.jobs.append(
            bench.add(
                f"{tenant}{i}", tokens, max_tokens=dice.randrange(1, output + 1), options={"tenant": tenant}
            )
        )


def test_sch7_service_gap_of_two_backlogged_tenants_stays_within_the_bound():
    bench = Bench(FakeBackend(num_blocks=256), token_budget=64, max_jobs=8, context=512, max_queue=10_000)
    # One asks short and often, the other long and rarely.
    crowd(bench, {"short": (150, 20, 40), "long": (150, 160, 4)})
    w = bench.scheduler.fairness
    running = 8 * (160 + 40)  # tokens that can run at once
    bound = 2 * max(w.w_in * 160, w.w_out * running)
    worst = 0.0
    while all(bench.scheduler.queue.tenants.get(t) for t in ("short", "long")):
        bench.step()
        worst = max(worst, abs(served(bench, "short") - served(bench, "long")))
    assert 0 < worst <= bound
    # Much tighter in fact: about one job of each.
    assert worst <= 4 * w.w_out * (160 + 40)
    assert jain([served(bench, t) for t in ("short", "long")]) >= 0.99
    bench.run()


def test_sch7_weights_divide_the_service():
    bench = Bench(
        FakeBackend(num_blocks=256), token_budget=64, max_jobs=8, context=512, max_queue=10_000,
        fairness=Fairness(weights={"gold": 3.0}),
    )  # fmt: skip
    crowd(bench, {"gold": (200, 60, 10), "lead": (200, 60, 10)})
    while all(bench.scheduler.queue.tenants.get(t) for t in ("gold", "lead")):
        bench.step()
    assert served(bench, "gold") / served(bench, "lead") == pytest.approx(3.0, rel=0.1)
    bench.run()


def test_sch7_work_conserving_one_tenant_alone_gets_all():
    def steps(tenant_of):
        bench = Bench(FakeBackend(num_blocks=256), token_budget=64, max_jobs=8, context=512)
        for i in range(40):
            bench.add(f"j{i}", range(i, i + 30), max_tokens=5, options={"tenant": tenant_of(i)})
        bench.run()
        return len(bench.plans)

    assert steps(lambda i: "one") == pytest.approx(steps(lambda i: f"t{i % 4}"), abs=2)


def test_sch7_idleness_earns_a_bounded_credit_and_only_to_those_known():
    fair = Fairness(credit=100.0)
    for _ in range(5):
        fair.wait("busy", 0)
    fair.prompt("busy", 10_000)
    fair.wait("late", 0)
    assert fair["late"] == fair["busy"] == 10_000  # lifted, else it had the machine for itself for a while
    fair.leave("late", 0)
    fair.output("busy", 500)
    fair.wait("late", 0)
    assert fair["late"] == 11_000 - 100  # an hour away or a minute: never more
    # Leaving and coming back in between earns nothing more.
    fair.leave("late", 0)
    fair.wait("late", 0)
    assert fair["late"] == 11_000 - 100
    # A tenant that has had more keeps its counter: nobody is lifted down.
    fair.prompt("late", 300)
    fair.leave("late", 0)
    fair.wait("late", 0)
    assert fair["late"] == 11_200


def test_sch7_credits_of_several_do_not_add_up():
    """The level that counts is the one without credit, else each newcomer would start lower than the last."""
    fair = Fairness(credit=100.0)
    for tenant in "abc":
        fair.wait(tenant, 0)
        fair.prompt(tenant, 1)
        fair.leave(tenant, 0)
    fair.wait("busy", 0)
    fair.prompt("busy", 5000)
    for tenant in "abc":
        fair.wait(tenant, 0)
    assert [fair[tenant] for tenant in "abc"] == [fair["busy"] - 100] * 3


def test_sch7_made_up_names_have_no_credit():
    fair = Fairness(credit=100.0)
    fair.wait("busy", 0)
    fair.prompt("busy", 5000)
    for i in range(20):
        fair.wait(f"new{i}", 0)
        assert fair[f"new{i}"] == 5000


def test_sch7_an_empty_queue_lifts_to_the_last_one_who_left():
    fair = Fairness()
    fair.wait("a", 0)
    fair.prompt("a", 500)
    fair.leave("a", 0)
    fair.wait("b", 0)
    assert fair["b"] == 500


def test_sch7_who_waits_in_a_lower_tier_gives_no_credit_to_one_above():
    fair = Fairness()
    fair.wait("starved", 5)
    fair.wait("busy", 0)
    fair.prompt("busy", 1000)
    fair.wait("fresh", 0)
    assert fair["fresh"] == 1000
    fair.wait("also low", 5)
    assert fair["also low"] == fair["starved"] == 0


def test_sch7_counters_of_made_up_tenants_do_not_pile_up():
    fair = Fairness()
    fair.wait("steady", 0)
    for i in range(3 * KEPT):
        fair.prompt("steady", 1)
        fair.wait(f"t{i}", 0)
        fair.leave(f"t{i}", 0)
    assert len(fair._counters) <= KEPT + 1
    assert fair["steady"] == 3 * KEPT


def test_a_weight_must_be_above_zero():
    with pytest.raises(ValueError, match="above zero"):
        Fairness(weights={"a": 0.0})


def test_sch7_a_flood_of_one_tenant_does_not_delay_another():
    """Fifty times as much from one: the other's first token comes nearly as soon as alone."""

    def waits(flood: int) -> list[float]:
        limits = {"token_budget": 128, "max_jobs": 16, "context": 1024, "max_queue": 99_999}
        bench = Bench(FakeBackend(num_blocks=1024), **limits)
        dice = random.Random(4)
        jobs = []
        big = 0
        for _ in range(300):
            for _ in range(flood if bench.now % 20 == 0 else 0):
                tokens = [dice.randrange(900) for _ in range(120)]
                bench.add(f"big{big}", tokens, max_tokens=8, options={"tenant": "big"})
                big += 1
            if bench.now % 20 == 0:
                tokens = [dice.randrange(900) for _ in range(120)]
                name = f"small{len(jobs)}"
                jobs.append(bench.add(name, tokens, max_tokens=8, options={"tenant": "small"}))
            bench.step()
        assert flood == 0 or len(bench.scheduler.queue) > 100, "the flood must be a backlog"
        times = [job.meter.first_token - job.meter.arrived for job in jobs if job.meter.first_token]
        assert len(times) >= len(jobs) - 1
        return sorted(times)

    quiet, loud = waits(0), waits(50)
    # In steps. Slots are taken by the flood, so one has to end first: a few steps of eight.
    assert loud[int(0.95 * len(loud))] <= max(2 * quiet[int(0.95 * len(quiet))], quiet[-1] + 4)


def test_sch7_a_small_tenants_prompt_is_not_behind_those_of_a_flood_that_have_begun():
    """Its chunks come first in every step until its first token: as soon as alone, but for the decodes."""
    bench = Bench(FakeBackend(num_blocks=2000), token_budget=128, max_jobs=16, context=1024, max_queue=9999)
    dice = random.Random(2)
    for i in range(200):
        tokens = [dice.randrange(900) for _ in range(600)]
        bench.add(f"flood{i}", tokens, max_tokens=32, options={"tenant": "flood"})
    steps = []
    for k in range(6):
        job = bench.add(f"small{k}", range(k, k + 600), max_tokens=8, options={"tenant": "small"})
        while job.meter.first_token is None:
            bench.step()
        steps.append(job.meter.first_token - job.meter.arrived)
        for _ in range(40):
            bench.step()
    # Alone 600 tokens take five steps of 128; the decodes of fifteen others leave it 113.
    assert max(steps[1:]) <= 7, steps
    assert len(bench.scheduler.queue) > 50, "the flood is still there"


def test_sch7_the_last_slot_is_for_a_tenant_that_has_none():
    bench = Bench(FakeBackend(num_blocks=512), max_jobs=8)
    for i in range(20):
        bench.add(f"flood{i}", [1, 2, i], max_tokens=50, options={"tenant": "flood"})
    bench.step()
    assert len(bench.plans[-1]) == 7
    bench.add("small", [7], max_tokens=2, options={"tenant": "small"})
    bench.step()  # level with the flood at first, which came earlier
    bench.step()
    assert bench.ids("small") and len(bench.plans[-1]) == 8
    bench.run()


def test_sch7_equal_tenants_are_served_equally():
    bench = Bench(FakeBackend(num_blocks=512), token_budget=128, max_jobs=8, context=1024, max_queue=9999)
    crowd(bench, {f"t{k}": (80, 100, 12) for k in range(5)}, seed=3)
    while all(bench.scheduler.queue.tenants.get(f"t{k}") for k in range(5)):
        bench.step()
    assert jain([served(bench, f"t{k}") for k in range(5)]) >= 0.99
    bench.run()


def test_sch7_a_strict_tier_comes_first_whatever_the_counters_say():
    bench = Bench(max_jobs=1)
    bench.add("run", [1, 2, 3], max_tokens=3)
    bench.step()
    bench.scheduler.fairness.output("greedy", 10_000)
    bench.add("high", [2], options={"priority": -1, "tenant": "greedy"})
    bench.add("low", [3], options={"priority": 0, "tenant": "modest"})
    assert [job.id for job in bench.scheduler.queue.ordered(bench.now)] == ["high", "low"]
    bench.run()


def test_sch7_ageing_lets_no_tier_starve():
    bench = Bench(FakeBackend(num_blocks=64), max_jobs=1)
    bench.add("low", [1, 2, 3], max_tokens=2, options={"priority": 3})
    for i in range(100):
        bench.add(f"h{i}", [i + 5], max_tokens=4)
        bench.step()
    assert bench.last("low").finish == "length"
    finished = bench.last("low").meter.finished
    assert 30.0 <= finished <= 45.0, "three tiers of ten seconds each, then its turn by counter and arrival"


def test_sch7_age_does_not_undo_the_shares():
    """However long the flood has waited, a newcomer of another tenant is not behind all of it."""
    bench = Bench(max_jobs=1, max_queue=1000)
    for i in range(100):
        bench.add(f"old{i}", [1, 2, i], max_tokens=4, options={"tenant": "flood"})
    bench.step()
    bench.now += 1000.0
    bench.add("new", [7], options={"tenant": "newcomer"})
    order = [job.id for job in bench.scheduler.queue.ordered(bench.now)]
    assert order.index("new") <= 1
    bench.run()


def test_sch7_prompts_of_running_jobs_share_the_budget_by_counter():
    """A long prompt in the middle of its chunks does not hold up another tenant's short one."""
    bench = Bench(FakeBackend(num_blocks=600), context=8192, token_budget=64)
    bench.add("long", [i % 900 for i in range(5000)], max_tokens=2, options={"tenant": "a"})
    bench.step()
    bench.add("short", range(500, 550), max_tokens=2, options={"tenant": "b"})
    bench.step()
    assert bench.plans[-1][0] == ("short", 50)
    assert bench.ids("short")
    # The same tenant's own is in turn: first come, first served.
    bench.add("mine", range(600, 650), max_tokens=2, options={"tenant": "a"})
    bench.step()
    assert [job for job, _ in bench.plans[-1]] == ["short", "long"]
    bench.run()


# -- the latency-critical class -------------------------------------------------------------------------


class Eager(Policy):
    def reserve(self, jobs, block_size, pool_size):
        return 0


@pytest.mark.parametrize(
    "full", ["slots", "blocks", "budget", "prompts", "queue"], ids=lambda what: f"no-{what}-left"
)
def test_sch2_sch7_an_urgent_prompt_is_in_the_very_next_step(full):
    sizes = {
        "slots": (64, {"max_jobs": 2, "token_budget": 512}),
        "blocks": (8, {"max_jobs": 16, "token_budget": 512}),
        "budget": (64, {"max_jobs": 16, "token_budget": 8}),
        "prompts": (600, {"max_jobs": 16, "token_budget": 64}),
        "queue": (64, {"max_jobs": 1, "token_budget": 512}),
    }
    blocks, limits = sizes[full]
    bench = Bench(FakeBackend(num_blocks=blocks), policy=Eager(), context=4096, **limits)
    for i in range({"slots": 2, "blocks": 4, "budget": 12, "prompts": 1, "queue": 9}[full]):
        size = {"blocks": 25, "prompts": 4000}.get(full, 5)
        bench.add(f"j{i}", range(100 * i % 890, 100 * i % 890 + size) if size < 90 else
                  [k % 900 for k in range(size)], max_tokens=60 if full != "blocks" else 12)  # fmt: skip
    for _ in range(3):
        bench.step()
    bench.add("urgent", [7, 8, 9], max_tokens=3, options={"urgent": True})
    bench.step()
    assert bench.ids("urgent"), "its first token came with the first step planned after it"
    bench.run()
    assert bench.ids("urgent") == alone([7, 8, 9], max_tokens=3)
    for job in [job for job in bench.outs if job.startswith("j")]:
        assert bench.last(job).finish == "length"


def test_sch7_urgent_jobs_do_not_preempt_each_other():
    bench = Bench(max_jobs=2, policy=Eager())
    for i in range(2):
        bench.add(f"u{i}", [i + 1], max_tokens=20, options={"urgent": True})
    bench.step()
    third = bench.add("u2", [9], max_tokens=2, options={"urgent": True})
    bench.step()
    assert third.state is State.WAITING
    bench.run()
    assert bench.scheduler.counters.preemptions == 0 and bench.scheduler.urgent == 0


def test_sch7_an_urgent_job_too_large_for_what_may_be_cleared_disturbs_nobody():
    bench = Bench(FakeBackend(num_blocks=10), policy=Eager(), max_jobs=4)
    bench.add("u", range(100), max_tokens=30, options={"urgent": True})
    bench.add("j", [1, 2, 3], max_tokens=30)
    bench.step()
    bench.add("big", range(300, 380), max_tokens=2, options={"urgent": True})
    bench.step()
    assert bench.scheduler.counters.preemptions == 0
    bench.run()
    assert bench.ids("big") == alone(range(300, 380), max_tokens=2)


def test_sch2_urgent_prompts_leave_decodes_half_of_the_step():
    bench = Bench(token_budget=8, max_jobs=16)
    for i in range(8):
        bench.add(f"j{i}", [i + 1], max_tokens=40)
    bench.step()
    bench.add("urgent", range(200, 240), max_tokens=1, options={"urgent": True})
    while not bench.ids("urgent"):
        bench.step()
        assert sum(n for job, n in bench.plans[-1] if job == "urgent") == 4
        assert len(bench.plans[-1]) == 5
    said = [len(bench.ids(f"j{i}")) for i in range(8)]
    assert max(said) - min(said) <= 1, "they take turns"
    bench.run()
