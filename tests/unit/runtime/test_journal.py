"""The scheduler's journal plays again to the same plans (SCH-9)."""

import json
import random
import stat

import pytest

from galley.errors import GalleyError, InvalidRequest
from galley.runtime.fairness import Fairness
from galley.runtime.journal import Journal, Recorded, replay
from galley.runtime.park import park, resume
from galley.runtime.policy import Policy
from galley.types import CacheHint
from tests.fake import Bench, FakeBackend


class Forcing:
    """A grammar that opens with a token, forces two after every third draw, and now and then gives up."""

    ended = False

    def begin(self, most):
        return [50][:most]

    def accept(self, token, most):
        if token == 77:
            raise GalleyError("no more", code="guide_failed")
        self.ended = token > 190
        return [51, 52][:most] if token % 3 == 0 and not self.ended else []

    def fill(self, masks, row):
        words = -(-200 // 32)
        for word in range(row * words, (row + 1) * words):
            masks[word] = 0xFFFFFFFF

    def rollback(self, count):
        raise AssertionError("no end token is forced")


class Busy(Bench):
    """Random arrivals, cancels, parks, grammars and faults on a small pool, on a recorded scheduler."""

    def __init__(self, journal, **limits):
        backend = FakeBackend(num_blocks=24, block_size=4, vocab=200)
        super().__init__(backend, eos=frozenset(range(10)), context=64, **limits)
        self.scheduler = self.loop.scheduler = Recorded(
            journal,
            num_blocks=24,
            block_size=4,
            vocab=200,
            context=64,
            eos=frozenset(range(10)),
            fairness=Fairness(weights={"t1": 2.0}),
            **limits,
        )

    def play(self, steps: int, seed: int) -> None:
        dice = random.Random(seed)
        for n in range(steps):
            self.add(
                f"j{n}",
                [dice.randrange(6) for _ in range(dice.randrange(1, 30))],
                max_tokens=dice.randrange(1, 20),
                temperature=dice.choice([0.0, 1.0]),
                logit_bias={5: 1.0},
                options={
                    "tenant": f"t{dice.randrange(3)}",
                    "priority": dice.randrange(2),
                    "urgent": dice.random() < 0.1,
                    "max_total_s": dice.choice([None, 9.0]),
                    "guide": Forcing() if dice.random() < 0.3 else None,
                    "cache": CacheHint(memory_only=True) if dice.random() < 0.2 else None,
                    "banned": (60, 61) if dice.random() < 0.2 else (),
                },
            )
            plain = [job.id for job in self.scheduler.jobs.values() if job.guide is None]
            if plain and dice.random() < 0.1:
                resume(self.scheduler, park(self.scheduler, dice.choice(plain), self.now), f"r{n}", self.now)
            if dice.random() < 0.02:
                self.scheduler.new_epoch()
            if dice.random() < 0.1:
                self.scheduler.cancel(f"j{dice.randrange(n + 1)}", self.now)
            if dice.random() < 0.05:
                self.backend.fail_on = frozenset([self.backend.runs])
            self.step()
        self.run()


def record(path, **limits):
    journal = Journal(path)
    bench = Busy(journal, token_budget=16, max_jobs=5, **limits)
    bench.play(150, seed=11)
    journal.close()
    return bench


def test_sch9_a_journal_plays_again_to_the_same_plans(tmp_path):
    bench = record(tmp_path / "plans.jsonl")
    assert bench.scheduler.counters.preemptions > 0
    with (tmp_path / "plans.jsonl").open("rb") as lines:
        found = replay(lines)
    assert found.same and found.plans >= len([plan for plan in bench.plans if plan]) > 100
    events = [json.loads(line) for line in (tmp_path / "plans.jsonl").read_text().splitlines()]
    kinds = {event["event"] for event in events}
    assert kinds >= {"resume", "park", "epoch", "fail", "cancel"}
    assert any(forced for event in events for said in event.get("said", {}).values() for forced, _ in said)
    assert stat.S_IMODE((tmp_path / "plans.jsonl").stat().st_mode) == 0o600


def test_sch9_a_plan_that_differs_is_named(tmp_path):
    record(tmp_path / "plans.jsonl")
    lines = (tmp_path / "plans.jsonl").read_text().splitlines()
    plans = [n for n, line in enumerate(lines) if json.loads(line)["event"] == "plan"]
    event = json.loads(lines[plans[20]])
    event["rows"][0][1] += 1
    lines[plans[20]] = json.dumps(event)
    found = replay(lines)
    assert not found.same and found.plans == 21 and f"line {plans[20] + 1}, plan 21" in found.difference


def test_sch9_another_clock_is_noticed(tmp_path):
    """A deadline passed earlier or later changes the plans: time is an input like any other."""
    record(tmp_path / "plans.jsonl")
    lines = []
    for line in (tmp_path / "plans.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "plan":
            event["now"] += 5.0
        lines.append(json.dumps(event))
    assert not replay(lines).same


class Other(Policy):
    pass


def test_a_journal_of_another_policy_must_be_given_it(tmp_path):
    record(tmp_path / "plans.jsonl", policy=Other(window=1))
    lines = (tmp_path / "plans.jsonl").read_bytes().splitlines()
    with pytest.raises(InvalidRequest, match="Other"):
        replay(lines)
    assert replay(lines, policy=Other(window=1)).same


@pytest.mark.parametrize(
    "lines", [[], [b"{}"], [b"nonsense"], [b'{"event":"plan","now":1,"rows":[]}'], [b'{"event":"begin"}']]
)
def test_what_is_no_journal_is_refused(lines):
    with pytest.raises(InvalidRequest) as refused:
        replay(lines)
    assert refused.value.code == "bad_journal"


def test_a_journal_is_bounded_and_says_where_it_ends(tmp_path, caplog):
    journal = Journal(tmp_path / "plans.jsonl", max_bytes=20_000)
    bench = Busy(journal, token_budget=16, max_jobs=5)
    bench.play(100, seed=1)
    journal.close()
    assert journal.fault == "it has reached its limit" and "ends here" in caplog.text
    assert (tmp_path / "plans.jsonl").stat().st_size <= 20_000
    assert replay((tmp_path / "plans.jsonl").read_bytes().splitlines()).same


def test_a_full_disk_ends_the_journal_and_nothing_else(tmp_path):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    journal = Journal(tmp_path / "plans.jsonl")
    journal._file.close()
    journal._file = Full()
    bench = Busy(journal, token_budget=16, max_jobs=5)
    bench.play(20, seed=1)
    assert "No space left" in journal.fault
