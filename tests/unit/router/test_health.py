"""Breaker, budget, latency: on a clock that is turned by hand."""

import random

import pytest

from galley.router.health import Breaker, Budget, Health, Latency


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def breaker(clock):
    return Breaker(clock, random.Random(1), base_s=30.0)


def fail(b, times=5):
    for _ in range(times):
        b.back(b.take(), False)


def test_five_failures_in_a_row_open_it_and_successes_between_do_not(clock):
    b = breaker(clock)
    for _ in range(10):
        fail(b, 4)
        b.back(b.take(), True)
        clock.now += 20  # the rate is over too few outcomes of the window
    assert b.state == "closed"
    fail(b)
    assert b.state == "open" and b.take() is None and 24 <= b.waits() <= 36


def test_a_rate_of_half_over_twenty_opens_it(clock):
    b = breaker(clock)
    for i in range(19):
        b.back(b.take(), i % 2 == 0)
    assert b.state == "closed"
    b.back(b.take(), False)
    assert b.state == "open"


def test_half_open_lets_one_probe_through_at_a_time(clock):
    b = breaker(clock)
    fail(b)
    clock.now += 37
    probe = b.take()
    assert probe.probe and [b.take() for _ in range(100)] == [None] * 100, "a herd must not follow the probe"
    b.back(probe, True)
    assert b.state == "half-open", "one success is not enough"
    second = b.take()
    assert second.probe and b.take() is None
    b.back(second, True)
    assert b.state == "closed" and not b.take().probe


def test_a_failed_probe_reopens_for_longer_up_to_the_cap(clock):
    b = breaker(clock)
    fail(b)
    waits = []
    for _ in range(8):
        clock.now += b.waits() + 0.001
        b.back(b.take(), False)
        waits.append(b.waits())
    assert 48 <= waits[0] <= 72 and all(240 <= wait <= 360 for wait in waits[4:])


def test_a_cancelled_probe_gives_its_place_back(clock):
    b = breaker(clock)
    fail(b)
    clock.now += 37
    b.back(b.take(), None)
    assert b.take().probe


def test_late_answers_from_before_it_opened_say_nothing(clock):
    b = breaker(clock)
    late = [b.take() for _ in range(10)]
    fail(b)
    until = b.waits()
    for ticket in late:
        b.back(ticket, False)
    assert b.waits() == until, "opened_at must not be refreshed by stragglers"


def test_rate_limits_and_client_errors_do_not_open_it(clock):
    health = Health(clock, random.Random(0), retry_share=0.2)
    for _ in range(50):
        health.breaker.back(health.breaker.take(), None)
    health.limit(3)
    assert health.breaker.state == "closed" and health.waits() == 3
    clock.now += 3
    assert health.waits() == 0


def test_budget_bounds_extras_over_any_span():
    rng = random.Random(3)
    budget = Budget(0.2, floor=3, cap=10)
    requests = extras = 0
    for _ in range(5000):
        if rng.random() < 0.5:
            budget.deposit()
            requests += 1
        extras += budget.take()
        assert extras <= 0.2 * requests + 3
    assert extras > 0.19 * requests, "and what is allowed can be used"
    assert not Budget(0.0).take()


def test_latency_jumps_to_a_peak_and_decays(clock):
    latency = Latency(clock, decay_s=10)
    for _ in range(100):
        clock.now += 1
        latency.note(0.1)
    latency.note(2.0)
    assert latency.average == 2.0
    clock.now += 10
    latency.note(0.1)
    assert 1.0 < latency.average < 1.1 and latency.quantile(0.5) == pytest.approx(0.1)
    assert Latency(clock).quantile(0.95) is None
