"""Shedding: from measured rates, early, and by the tenant's own share."""

import pytest

from galley.errors import DeadlineExceeded, Overloaded, TooManyRequests
from galley.runtime.queue import Waiting
from galley.runtime.rate import ENOUGH, ServiceRate
from tests.fake import Bench, FakeBackend


def cost(prompt: int, rows: int) -> float:
    return 0.004 + 0.0005 * prompt + 0.001 * rows


def measured(steps: int = 200) -> ServiceRate:
    rate = ServiceRate()
    for i in range(steps):
        prompt, rows = (i * 37) % 200, (i * 13) % 30 + 1
        rate.observe(prompt, rows, cost(prompt, rows))
    return rate


def test_rate_finds_the_cost_of_a_step():
    start, each, row = measured()._fit()
    assert (start, each, row) == pytest.approx((0.004, 0.0005, 0.001), rel=0.02)


def test_rate_forgets():
    rate = measured()
    for i in range(400):
        prompt, rows = (i * 37) % 200, (i * 13) % 30 + 1
        rate.observe(prompt, rows, 3 * cost(prompt, rows))
    assert rate._fit() == pytest.approx((0.012, 0.0015, 0.003), rel=0.05)


def test_rate_of_steps_that_are_all_alike_still_adds_up():
    rate = ServiceRate()
    for _ in range(50):
        rate.observe(100, 10, 0.2)
    start, each, row = rate._fit()
    assert min(start, each, row) >= 0.0
    assert start + 100 * each + 10 * row == pytest.approx(0.2, rel=0.01)


def test_rate_is_not_upset_by_a_step_that_was_stopped():
    rate = measured()
    before = rate.seconds(1000, 1000, budget=512, slots=8)
    rate.observe(10, 10, 3600.0)
    assert rate.seconds(1000, 1000, budget=512, slots=8) < 1.5 * before


def test_rate_says_nothing_before_it_knows_and_ignores_a_standing_clock():
    rate = ServiceRate()
    for _ in range(50):
        rate.observe(10, 1, 0.0)
    assert rate.seconds(100, 100, budget=10, slots=1) is None
    for _ in range(ENOUGH):
        rate.observe(10, 1, 0.1)
    assert rate.seconds(100, 0, budget=100, slots=1) > 0


def test_rate_counts_full_steps():
    rate = measured()
    # 1000 answer tokens over 10 slots: 100 steps.
    assert rate.seconds(0, 1000, budget=512, slots=10) == pytest.approx(100 * 0.004 + 1000 * 0.001, rel=0.05)
    # 5120 prompt tokens over a budget of 512: 10 steps.
    assert rate.seconds(5120, 0, budget=512, slots=10) == pytest.approx(10 * 0.004 + 5120 * 0.0005, rel=0.05)


class Timed(Bench):
    """A bench on whose clock a step takes what ``cost`` says."""

    def step(self):
        outs = super().step()
        self.now -= 1.0
        return outs

    def __init__(self, **limits):
        super().__init__(FakeBackend(num_blocks=2048), **limits)
        run = self.backend.run

        def timed(rows):
            lengths = [b - a for a, b in zip(rows.seq_start, rows.seq_start[1:], strict=False)]
            prompt = sum(n for n in lengths if n > 1)
            run(rows)
            self.now += cost(prompt, sum(n == 1 for n in lengths))

        self.backend.run = timed


def busy(bench, jobs: int, tenant: str = "local", prompt: int = 100, **options):
    for _ in range(jobs):
        n = bench.count = getattr(bench, "count", 0) + 1
        tokens = [(n * 31 + k) % 900 for k in range(prompt)]
        bench.add(f"{tenant}{n}", tokens, max_tokens=20, options={"tenant": tenant, **options})


def test_can5_a_full_queue_says_when_to_come_back():
    bench = Timed(max_queue=20, max_jobs=4, token_budget=64)
    busy(bench, 20)
    for _ in range(30):
        bench.step()
    busy(bench, 20 - len(bench.scheduler.queue))
    with pytest.raises(Overloaded) as refused:
        busy(bench, 1)
    assert refused.value.status == 503 and refused.value.code == "overloaded" and refused.value.retryable
    promised = refused.value.retry_after_s
    assert 0 < promised < 0.5
    began = bench.now
    while len(bench.scheduler.queue) >= 20:
        bench.step()
    assert bench.now - began == pytest.approx(promised, rel=1.0), "measured, not a constant"
    busy(bench, 1)
    bench.run()


def test_sheds_what_would_wait_too_long_and_admits_again_when_it_said():
    bench = Timed(max_wait_s=1.0, max_jobs=8, token_budget=64)
    for _ in range(3):
        busy(bench, 8)
        bench.run()
    admitted = 0
    with pytest.raises(Overloaded) as refused:
        for _ in range(1000):
            busy(bench, 1)
            admitted += 1
    assert 8 < admitted < 200
    began = bench.now
    last = f"local{bench.count - 1}"
    while bench.scheduler.jobs[last].meter.first_scheduled is None:
        bench.step()
    # The last one let in was to wait about a second, by an estimate.
    assert 0.5 <= bench.now - began <= 2.0
    assert refused.value.retry_after_s < 1.0
    bench.run()


def test_nothing_is_shed_for_its_wait_before_anything_was_measured():
    bench = Timed(max_wait_s=0.001)
    busy(bench, 100)
    bench.run()


def test_a_flooding_tenant_is_shed_and_another_is_not():
    bench = Timed(max_wait_s=1.0, max_jobs=8, token_budget=64, max_queue=50)
    for _ in range(3):
        busy(bench, 8)
        bench.run()
    busy(bench, 1, "small")
    with pytest.raises(TooManyRequests) as refused:
        for _ in range(1000):
            busy(bench, 1, "flood")
    assert (refused.value.status, refused.value.type, refused.value.code) == (
        429,
        "requests",
        "rate_limit_exceeded",
    )
    busy(bench, 3, "small")
    busy(bench, 3, "third")
    bench.run()


def test_a_full_queue_is_not_full_for_a_tenant_below_its_share():
    bench = Bench(max_queue=10)
    busy(bench, 10, "flood")
    busy(bench, 5, "small")
    with pytest.raises(TooManyRequests):
        busy(bench, 1, "small")
    with pytest.raises(TooManyRequests):
        busy(bench, 1, "flood")
    busy(bench, 3, "third")
    assert len(bench.scheduler.queue) == 18
    bench.run()


def test_can5_a_deadline_that_cannot_be_met_is_refused_at_once():
    bench = Timed(max_jobs=2, token_budget=64)
    for _ in range(3):
        busy(bench, 8)
        bench.run()
    busy(bench, 60)
    with pytest.raises(DeadlineExceeded) as refused:
        busy(bench, 1, max_queue_s=0.05)
    error = refused.value
    assert (error.status, error.code, error.param) == (503, "deadline_exceeded", "max_queue_s")
    wait = bench.scheduler.gate.wait_s("local", running=len(bench.scheduler.running))
    assert error.retry_after_s == pytest.approx(wait - 0.05)
    busy(bench, 1, max_queue_s=3600.0)
    bench.run()


def test_what_is_on_its_way_counts():
    bench = Timed(max_jobs=2, token_budget=64, max_queue=5)
    inbox = {"local": Waiting()}
    for _ in range(5):
        inbox["local"].more(100)
    with pytest.raises(Overloaded):
        bench.scheduler.gate.admit("local", inbox=inbox)
    bench.scheduler.gate.admit("local")
