"""What crosses to the backend: rows and draws."""

from galley.types import SamplingParams
from tests.fake import Bench, FakeBackend, alone

P = list(range(100, 140))


class Keen(FakeBackend):
    """Copies what it is given."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.seen = []

    def sample(self, draws):
        self.seen.append({name: list(getattr(draws, name)) for name in draws.__slots__})
        return super().sample(draws)


def test_rows_cover_their_blocks_and_ask_for_logits_only_at_the_end_of_what_is_known():
    bench = Bench(token_budget=16)
    bench.add("a", P)
    rows = []
    run = bench.backend.run
    bench.backend.run = lambda r: rows.append(r) or run(r)
    for _ in range(4):
        bench.step()
    assert [list(r.context) for r in rows] == [[0], [16], [32], [40]]
    assert [list(r.out) for r in rows] == [[], [], [7], [0]]
    assert [len(r.tokens) for r in rows] == [16, 16, 8, 1]
    assert all(list(r.block_start) == [0, 3] for r in rows)


def test_smp4_the_noise_position_is_that_of_the_token_drawn():
    backend = Keen()
    bench = Bench(backend)
    bench.add("a", P, lane=3, seed=-1, temperature=1.0, max_tokens=4)
    bench.run()
    assert [draws["position"] for draws in backend.seen] == [[40], [41], [42], [43]]
    assert all(draws["lane"] == [3] and draws["seed"] == [2**64 - 1] for draws in backend.seen)


def test_steady_decodes_reuse_their_draws_and_newcomers_do_not_mix_them_up():
    backend = Keen()
    bench = Bench(backend)
    bench.add("a", P, temperature=1.0, max_tokens=9, top_k=5)
    bench.step()
    first = bench.loop._draws
    bench.step()
    assert bench.loop._draws is first
    bench.add("b", [1, 2], temperature=0.5, max_tokens=3, min_tokens=2, stop_token_ids=[9])
    bench.run()
    assert bench.loop._draws is not first
    assert bench.ids("a") == alone(P, temperature=1.0, max_tokens=9)
    assert bench.ids("b") == alone([1, 2], temperature=0.5, max_tokens=3, min_tokens=2, stop_token_ids=[9])
    by_step = [(draws["position"], draws["ban_ids"]) for draws in backend.seen]
    assert by_step[2:5] == [([42, 2], [9]), ([43, 3], [9]), ([44, 4], [])]


def test_penalties_count_prompt_and_output_and_survive_preemption():
    backend = Keen()
    bench = Bench(backend)
    job = bench.scheduler.submit(
        "a",
        [5, 5, 6],
        SamplingParams(temperature=0.0, max_tokens=3, repetition_penalty=1.2, presence_penalty=0.5),
        0.0,
    )
    bench.step()
    bench.scheduler.preemption.preempt(job, bench.scheduler.plan(1.0), 1.0)
    bench.scheduler._inflight = None
    bench.run()
    for place, draws in enumerate(backend.seen):
        counts = dict(zip(draws["seen_ids"], draws["seen_counts"], strict=True))
        output = job.tokens[3 : 3 + place]
        assert counts == {**dict.fromkeys([5, 6], 0), **{t: output.count(t) for t in output}}
        assert draws["repetition"][0] > 1


def test_logit_bias_and_logprobs_are_passed_on():
    backend = Keen()
    bench = Bench(backend)
    bench.add("a", P, max_tokens=1, logit_bias={7: 1.5}, logprobs=3)
    bench.run()
    assert backend.seen[0]["bias_ids"] == [7]
    assert backend.seen[0]["bias_values"] == [1.5]
    assert backend.seen[0]["logprobs"] == [3]
    entry = bench.outs["a"][0].logprobs[0]
    assert (entry.token_id, entry.logprob, entry.rank) == (bench.ids("a")[0], -1.0, 1)
