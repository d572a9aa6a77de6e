"""The engine's thread, inbox and outbox; the numbers come from the fake backend."""

import asyncio
import threading
import time
from itertools import pairwise

import pytest

from galley.errors import ConfigError, ContextLengthExceeded, EngineFault, InvalidRequest, Overloaded
from galley.runtime.engine import Engine
from galley.runtime.mailbox import Mailbox, Stream
from galley.runtime.out import StepOut
from galley.types import SamplingParams, TokenLogprob
from tests.fake import FakeBackend, alone

P = list(range(100, 140))


def params(**given):
    return SamplingParams(**({"temperature": 0.0, "seed": 1, "max_tokens": 8} | given))


@pytest.fixture
def make():
    engines = []

    def build(backend=None, **options):
        engine = Engine(backend or FakeBackend(context=4096, num_blocks=256), eos_ids=(), **options)
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        engine.close()
        assert engine.scheduler.pool.in_use == 0
        assert not engine._readers
        assert not engine._readers.boxes


async def collect(stream):
    return [out async for out in stream]


def ids(outs):
    return [token for out in outs for token in out.token_ids]


class Slow(FakeBackend):
    """Each step waits for a permit, so that a test decides what happens in which step."""

    def __init__(self, **sizes):
        super().__init__(context=4096, num_blocks=256, **sizes)
        self.permits = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def run(self, rows):
        self.entered.release()
        assert self.permits.acquire(timeout=10)
        super().run(rows)


async def test_streams_run_together_and_say_what_they_say_alone(make):
    engine = make()
    engine.start()
    prompts = [list(range(30 * i, 30 * i + 25 + i)) for i in range(12)]
    outs = await asyncio.gather(
        *(collect(engine.stream(f"j{i}", prompt, params())) for i, prompt in enumerate(prompts))
    )
    for prompt, out in zip(prompts, outs, strict=True):
        assert ids(out) == alone(prompt)
        assert out[-1].finish == "length"
        assert out[-1].meter.completion_tokens == 8
        assert [o.last for o in out].count(True) == 1
        assert next(o.cached_tokens for o in out if o.token_ids) == out[-1].meter.cached_tokens
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.finished, stats.generation_tokens) == (0, 0, 12, 96)
    assert stats.blocks_free + stats.blocks_cached + stats.blocks_used == stats.blocks_total == 256


async def test_one_wakeup_a_step_for_all_jobs_of_a_loop(make):
    backend = Slow()
    engine = make(backend)
    engine.start()
    tasks = [
        asyncio.create_task(collect(engine.stream(f"j{i}", [i + 1], params(max_tokens=6)))) for i in range(8)
    ]
    await asyncio.sleep(0)
    while not all(task.done() for task in tasks):
        backend.permits.release()
        await asyncio.sleep(0.001)
    (box,) = engine._readers.mailboxes.values()
    assert box.wakeups <= engine.stats().steps
    assert engine.stats().generation_tokens == 48


async def test_can1_leaving_the_iterator_cancels_within_a_step(make):
    backend = Slow()
    engine = make(backend)
    engine.start()
    stream = engine.stream("j", P, params(max_tokens=1000))
    backend.permits.release(3)
    assert (await anext(stream)).token_ids
    await stream.aclose()
    backend.permits.release(3)
    while engine.stats().running:
        await asyncio.sleep(0.001)
    assert backend.runs <= 5
    assert engine.stats().blocks_used == 0


async def test_can1_cancelling_the_reading_task_cancels_the_job(make):
    engine = make()
    engine.start()
    task = asyncio.create_task(collect(engine.stream("j", P, params(max_tokens=3000))))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(1000):
        if not engine.stats().running:
            break
        await asyncio.sleep(0.001)
    assert engine.stats().blocks_used == 0


async def test_can2_cancel_is_for_any_thread_id_and_number_of_times(make):
    engine = make()
    engine.start()
    engine.cancel("nobody")
    task = asyncio.create_task(collect(engine.stream("j", P, params(max_tokens=3000))))
    await asyncio.sleep(0.01)
    threads = [threading.Thread(target=engine.cancel, args=("j",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outs = await task
    assert outs[-1].error.code == "cancelled"
    assert outs[-1].meter.completion_tokens == len(ids(outs))
    engine.cancel("j")


async def test_finish_ends_well(make):
    engine = make()
    engine.start()
    outs = []
    async for out in engine.stream("j", P, params(max_tokens=3000)):
        outs.append(out)
        if not out.last:
            engine.finish("j")
    assert outs[-1].finish == "stop"
    assert outs[-1].error is None


async def test_can3_a_backend_fault_ends_its_jobs_and_service_goes_on(make):
    engine = make(FakeBackend(context=4096, num_blocks=256, fail_on=frozenset([1])))
    engine.start()
    outs = await collect(engine.stream("a", P, params()))
    assert isinstance(outs[-1].error, EngineFault)
    assert ids(await collect(engine.stream("b", P, params()))) == alone(P)
    assert engine.stats().faults == 1


async def test_can3_after_a_failed_step_the_pool_is_checked_and_mended(make):
    class Spoiling(FakeBackend):
        def run(self, rows):
            if self.runs == 1:
                engine.scheduler.pool._free.pop()  # a block is lost in the step that fails
            super().run(rows)

    engine = make(Spoiling(context=4096, num_blocks=256, fail_on=frozenset([1])))
    engine.start()
    outs = await collect(engine.stream("a", P, params()))
    assert isinstance(outs[-1].error, EngineFault)
    assert ids(await collect(engine.stream("b", P, params()))) == alone(P)
    assert engine.stats().violations == 1 and engine.stats().faults == 1
    assert engine.scheduler.check() == []


async def test_a_defect_in_the_engine_itself_does_not_kill_it(make):
    engine = make()
    engine.start()
    commit = engine.scheduler.commit
    engine.scheduler.commit = lambda *_: 1 / 0
    outs = await collect(engine.stream("a", P, params()))
    assert isinstance(outs[-1].error, EngineFault)
    engine.scheduler.commit = commit
    assert ids(await collect(engine.stream("b", P, params()))) == alone(P)


async def test_can4_a_slow_reader_gets_steps_merged_and_never_holds_up_others(make):
    engine = make()
    engine.start()
    slow = engine.stream("slow", P, params(max_tokens=200, logprobs=0))
    first = await anext(slow)
    fast = await collect(engine.stream("fast", [1, 2, 3], params()))
    assert ids(fast) == alone([1, 2, 3])
    while engine.stats().running:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    rest = await collect(slow)
    assert len(rest) == 1
    assert first.token_ids + rest[0].token_ids == alone(P, max_tokens=200)
    assert len(first.logprobs) + len(rest[0].logprobs) == 200
    assert rest[0].finish == "length"


async def test_can4_a_standing_event_loop_costs_one_merged_item_and_one_wakeup():
    loop = asyncio.get_running_loop()
    box, stream = Mailbox(loop), Stream("j")
    for token in range(100):
        assert box.post([(stream, StepOut(job_id="j", token_ids=[token]))])
    assert box.wakeups == 1
    assert len(box._pending) == 1
    assert (await stream.next()).token_ids == list(range(100))


def test_a_closed_event_loop_is_told():
    loop = asyncio.new_event_loop()
    box = Mailbox(loop)
    stream = asyncio.run(_stream())
    loop.close()
    assert not box.post([(stream, StepOut(job_id="j"))])


async def _stream():
    return Stream("j")


def test_merging_keeps_everything():
    entry = TokenLogprob(1, -0.5, 1)
    a = StepOut(job_id="j", token_ids=[1], logprobs=[entry], cached_tokens=0)
    b = StepOut(job_id="j", token_ids=[2], logprobs=[entry], finish="stop", stop_token=2)
    merged = a.then(b)
    assert merged.token_ids == [1, 2]
    assert merged.logprobs == [entry, entry]
    assert (merged.finish, merged.stop_token, merged.cached_tokens) == ("stop", 2, 0)


def test_submit_refuses_at_once(make):
    engine = make(max_queue=1)
    ignore = lambda out: None  # noqa: E731
    with pytest.raises(ContextLengthExceeded):
        engine.submit("j", [1] * 5000, params(), on_step=ignore)
    with pytest.raises(InvalidRequest):
        engine.submit("j", [], params(), on_step=ignore)
    engine.submit("j", P, params(), on_step=ignore)
    with pytest.raises(InvalidRequest):
        engine.submit("j", P, params(), on_step=ignore)
    with pytest.raises(Overloaded):
        engine.submit("k", P, params(), on_step=ignore)


async def test_refused_streams_leave_nothing_behind(make):
    engine = make()
    with pytest.raises(InvalidRequest):
        await anext(engine.stream("j", [], params()))
    assert not engine._readers.boxes


async def test_can6_drain_finishes_what_runs_and_admits_nothing(make):
    engine = make()
    engine.start()
    task = asyncio.create_task(collect(engine.stream("j", P, params(max_tokens=300))))
    await asyncio.sleep(0.005)
    draining = asyncio.create_task(engine.drain())
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await anext(engine.stream("k", P, params()))
    await draining
    assert engine.stats().running == 0 and not engine._readers, "drained means done"
    assert len(ids(await task)) == 300


async def test_close_tells_everyone(make):
    backend = Slow()
    engine = make(backend, max_jobs=1)
    engine.start()
    tasks = [asyncio.create_task(collect(engine.stream(f"j{i}", [i + 1], params()))) for i in range(3)]
    await asyncio.sleep(0.01)
    backend.permits.release(100)
    await asyncio.to_thread(engine.close)
    for task in tasks:
        outs = await task
        assert outs[-1].finish or outs[-1].error.code == "cancelled"
    with pytest.raises(Overloaded):
        engine.submit("late", P, params(), on_step=print)


def test_close_before_start_tells_everyone(make):
    engine = make()
    outs = []
    engine.submit("j", P, params(), on_step=outs.append)
    engine.close()
    assert outs[0].error.code == "cancelled"


async def test_a_failing_callback_ends_its_own_job_only(make):
    engine = make()
    engine.start()
    calls = []

    def bad(out):
        calls.append(out)
        raise ValueError("mine")

    engine.submit("bad", P, params(max_tokens=3000), on_step=bad)
    assert ids(await collect(engine.stream("good", [1], params(max_tokens=50)))) == alone([1], max_tokens=50)
    assert calls[-1].error.code == "cancelled"


def test_an_idle_engine_parks(make):
    engine = make()
    engine.start()
    time.sleep(0.05)
    before = time.thread_time(), time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before[1] < 0.05
    assert engine.stats().steps == 0


def test_offline_turns_need_no_thread(make):
    engine = make()
    outs = []
    engine.submit("j", P, params(), on_step=outs.append)
    while engine.turn():
        pass
    assert ids(outs) == alone(P)
    engine.start()
    with pytest.raises(RuntimeError):
        engine.turn()


def test_kv1_a_violation_at_idle_is_counted_and_the_pool_rebuilt(make):
    engine = make()
    engine.scheduler.pool._free.pop()
    engine.start()
    for _ in range(1000):
        if engine.violations:
            break
        time.sleep(0.001)
    assert engine.stats().violations == 1
    assert engine.scheduler.check() == []


def test_context_is_what_model_and_memory_allow():
    assert Engine(FakeBackend(num_blocks=4), eos_ids=()).context == 64
    assert Engine(FakeBackend(num_blocks=400, context=128), eos_ids=()).context == 128
    assert Engine(FakeBackend(num_blocks=400), eos_ids=(), context=100).context == 100
    with pytest.raises(ConfigError):
        Engine(FakeBackend(num_blocks=4), eos_ids=(), context=65)


async def test_sch2_steps_a_stream_waits_while_a_6000_token_prompt_comes_in(make):
    engine = make(FakeBackend(num_blocks=600, context=8192), token_budget=256)
    steps_at = []
    engine.submit(
        "stream",
        P,
        params(max_tokens=80),
        on_step=lambda out: steps_at.append(engine.scheduler.counters.steps),
    )
    for _ in range(5):
        engine.turn()
    engine.submit("long", [i % 900 for i in range(6000)], params(max_tokens=1), on_step=lambda out: None)
    while engine.turn():
        pass
    assert max(b - a for a, b in pairwise(steps_at)) == 1
    assert max(sum(n for _, n in step) for step in engine.backend.steps) <= 256
