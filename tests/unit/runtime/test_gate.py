"""Shedding: from measured rates, early, and by the tenant's own share."""

import pytest

from galley.errors import DeadlineExceeded, Overloaded, TooManyRequests
from galley.runtime.cost import CostModel
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


MODEL = CostModel(sizes=(1, 16, 64, 512), seconds=(0.004, 0.006, 0.016, 0.2), context_s=1e-6, chunk_s=2e-8)


class Timed(Bench):
    """A bench on whose clock a step takes what ``cost`` says; with a ``slow``, that times what ``MODEL`` says
    of the step's shape."""

    tick = 0.0

    def __init__(self, slow: float | None = None, **limits):
        super().__init__(FakeBackend(num_blocks=2048), **limits)
        run = self.backend.run

        def timed(rows):
            lengths = [b - a for a, b in zip(rows.seq_start, rows.seq_start[1:], strict=False)]
            prompt = sum(n for n in lengths if n > 1)
            if slow is None:
                run(rows)
                self.now += cost(prompt, sum(n == 1 for n in lengths))
                return
            self.backend.rows = [b"any" for _ in rows.out]  # what is drawn is no matter here
            pairs = list(zip(rows.context, lengths, strict=True))
            decoding = sum(at for at, n in pairs if n == 1)
            chunked = sum(at * n for at, n in pairs if n > 1)
            self.now += slow * MODEL.predict(sum(lengths), decoding, len(rows.out), chunked)

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
        bench.scheduler.gate.admit("local", now=bench.now, inbox=inbox)
    bench.scheduler.gate.admit("local", now=bench.now)


def test_can5_with_a_cost_model_the_gate_knows_before_the_first_step():
    bench = Timed(slow=1.0, cost=MODEL, max_wait_s=1.0, max_jobs=8, token_budget=64)
    admitted = 0
    with pytest.raises(Overloaded):
        for _ in range(1000):
            busy(bench, 1)
            admitted += 1
    assert admitted < 100 and not bench.plans
    last = bench.scheduler.jobs[f"local{bench.count - 1}"]
    bench.run()
    waited = last.meter.first_scheduled - last.meter.arrived
    # Careful at first: an answer is taken to be long until one has ended.
    assert 0.3 <= waited <= 1.35


@pytest.mark.parametrize("slow", [0.5, 1.0, 3.0], ids=lambda slow: f"machine-at-{slow}-of-the-model")
def test_can5_the_cost_model_is_corrected_by_what_steps_take_of_late(slow):
    bench = Timed(slow=slow, cost=MODEL, max_wait_s=1.0, max_jobs=8, token_budget=64)
    busy(bench, 8)
    bench.run()
    assert bench.scheduler.rate.pace == pytest.approx(slow, rel=0.02)
    with pytest.raises(Overloaded):
        busy(bench, 1000)
    last = bench.scheduler.jobs[f"local{bench.count - 1}"]
    bench.run()
    waited = last.meter.first_scheduled - last.meter.arrived
    assert waited == pytest.approx(1.0, rel=0.35)


def test_can5_time_between_two_steps_counts():
    """What the engine thread waits for between two steps delays everybody as much as a step."""
    bench = Timed(slow=1.0, cost=MODEL, max_jobs=8, token_budget=64)
    busy(bench, 16)
    while bench.scheduler.busy:
        bench.step()
        bench.now += 0.02
    assert bench.scheduler.rate.pace > 2.0


def test_can5_who_comes_back_when_told_is_let_in():
    """A burst of ten times what may wait. Everybody refused comes back once, at the time he was told: nearly
    all are let in then, and nobody waits much longer than was promised."""
    bench = Timed(slow=1.3, cost=MODEL, max_wait_s=0.5, max_jobs=8, token_budget=64)
    busy(bench, 8)
    bench.run()
    told, again, let_in = [], [0, 0], []

    def ask() -> float | None:
        try:
            busy(bench, 1)
        except Overloaded as error:
            return error.retry_after_s
        let_in.append(bench.scheduler.jobs[f"local{bench.count}"])
        return None

    for _ in range(200):
        later = ask()
        if later is not None:
            told.append(bench.now + later)
    assert len(told) > 100 and len(set(told)) == len(told), "each his own time"
    told.sort()
    while told or bench.scheduler.busy:
        while told and told[0] <= bench.now:
            told.pop(0)
            again[ask() is not None] += 1
        if bench.scheduler.busy:
            bench.step()
        else:
            bench.now = told[0]
    assert again[0] >= 0.9 * sum(again), again
    late = sorted(job.meter.first_scheduled - job.meter.arrived for job in let_in)
    assert late[int(0.95 * len(late))] <= 2 * 0.5
