"""Any arrivals, cancels, faults, clock: invariants after every operation, and all say what they say alone.

The pool is tiny, so that eviction, duplicates and preemption happen all the time.
"""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from galley.errors import EngineFault, GalleyError
from galley.runtime.policy import Policy
from tests.fake import Bench, FakeBackend, alone
from tests.property.machines import machine_settings

B = 4
PROMPTS = [list(range(1, 12)), [*range(1, 9), 50, 51, 52, 53, 54], [7], [1, 2, 3, 4, 9, 9, 9, 9, 9], [5] * 17]
EOS = frozenset(range(30))


class Eager(Policy):
    def reserve(self, jobs, block_size, pool_size):
        return 0


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.backend = FakeBackend(num_blocks=9, block_size=B, vocab=200)
        self.bench = Bench(
            self.backend,
            eos=EOS,
            context=32,
            token_budget=7,
            chunk=5,
            max_jobs=4,
            policy=Eager(hold_back=2 * B),
        )
        self.asked: dict[str, tuple] = {}
        self.count = 0

    @rule(
        prompt=st.sampled_from(PROMPTS),
        turn=st.booleans(),
        limit=st.integers(1, 14),
        temperature=st.sampled_from([0.0, 1.0]),
        lane=st.integers(0, 1),
        priority=st.integers(0, 1),
        least=st.integers(0, 3),
        total=st.sampled_from([None, None, None, 6.0]),
        queue=st.sampled_from([None, None, None, 2.0]),
        tenant=st.sampled_from(["a", "b", "c"]),
        urgent=st.sampled_from([False, False, False, True]),
    )
    def submit(self, prompt, turn, limit, temperature, lane, priority, least, total, queue, tenant, urgent):
        done = [job for job, outs in self.bench.outs.items() if outs[-1].finish and job in self.asked]
        if turn and done:  # a second turn: the first one's prompt and answer
            prompt = (self.asked[done[-1]][0] + self.bench.ids(done[-1]))[:17]
        job, self.count = f"j{self.count}", self.count + 1
        params = {
            "max_tokens": limit, "temperature": temperature, "lane": lane, "min_tokens": min(least, limit)
        }  # fmt: skip
        terms = {"priority": priority, "max_total_s": total, "max_queue_s": queue}
        # Nobody is shed here: every deadline is long enough for the gate, or runs out in the queue.
        self.bench.scheduler.gate.rate.steps = 0
        self.bench.add(job, prompt, options=terms | {"tenant": tenant, "urgent": urgent}, **params)
        self.asked[job] = (prompt, params)

    @rule()
    def step(self):
        self.bench.step()

    @precondition(lambda self: self.bench.scheduler.busy)
    @rule()
    def step_that_fails(self):
        self.backend.fail_on = frozenset([self.backend.runs])
        self.bench.step()

    @rule(data=st.data(), well=st.booleans(), in_flight=st.booleans())
    def stop(self, data, well, in_flight):
        if not self.asked:
            return
        job = data.draw(st.sampled_from(sorted(self.asked)))
        verb = self.bench.scheduler.finish if well else self.bench.scheduler.cancel
        if in_flight:
            self.bench.loop.arrivals = lambda: verb(job, self.bench.now) and None
            self.bench.step()
            self.bench.loop.arrivals = None
        else:
            verb(job, self.bench.now)

    @invariant()
    def sound(self):
        assert self.bench.scheduler.check() == []

    @invariant()
    def every_end_is_told_once(self):
        for job, outs in self.bench.outs.items():
            assert [out.last for out in outs[:-1]] == [False] * (len(outs) - 1), job
            last = outs[-1]
            assert last.last == (last.finish is not None or isinstance(last.error, GalleyError))
            untold = [out.job_id for out in self.bench.scheduler._out]
            assert last.last + (job in self.bench.scheduler.jobs) + untold.count(job) == 1, job

    def teardown(self):
        self.bench.run(2000)
        self.bench.step()  # collects what ended without a step
        scheduler = self.bench.scheduler
        assert scheduler.pool.in_use == 0
        assert set(self.bench.outs) == set(self.asked)
        for job, (prompt, params) in self.asked.items():
            said, last = self.bench.ids(job), self.bench.last(job)
            expected = alone(prompt, eos=EOS, vocab=200, **params)
            assert said == expected[: len(said)], job
            assert last.meter.completion_tokens == len(said)
            if last.error is not None:
                assert isinstance(last.error, EngineFault) or last.error.code in (
                    "cancelled",
                    "deadline_exceeded",
                )
            elif last.finish == "length":
                assert len(said) == params["max_tokens"]
        assert scheduler.counters.finished == len(self.asked)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = machine_settings(60)
