"""Guided outputs are the same however they come about: forced tokens or draws, alone or with mates, preempted
or not, on any backend; and a guide that fails ends its own job alone (GRM-2, GRM-3, GRM-6, CAN-3)."""

import json
from array import array

import jsonschema
import pytest

from galley.errors import GuideFailed
from galley.model.model import Model
from galley.runtime.backend import native_missing, open_backend
from galley.runtime.engine import build_scheduler
from galley.runtime.guided import Compiler
from galley.runtime.loop import Loop
from galley.runtime.policy import Policy
from galley.types import SamplingParams, StructuredOutputs
from tests.tiny import tiny_gguf

pytest.importorskip("llguidance")

VOCAB = 420
SCHEMA = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 8},
        "order": {"enum": ["received", "returned", "refunded"]},
        "items": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3},
    },
    "required": ["customer_name", "order", "items"],
    "additionalProperties": False,
}
PROMPT = list(range(10, 60))


class Eager(Policy):
    """Admits on nothing but the known tokens, so that preemption happens."""

    def reserve(self, jobs, block_size, pool_size):
        return 0


class Room:
    """One backend, and a loop with a fresh cache for each run."""

    def __init__(self, path, kind):
        self.model = Model.open(path, "tiny")
        self.kind = kind
        self.compiler = Compiler(self.model.tokenizer, VOCAB)
        self.grammar = self.compiler.compile(StructuredOutputs(json=SCHEMA))

    def loop(self, blocks=64, **limits):
        options = {"token_budget": 64, "max_jobs": 16, "max_queue": 64, "context": None} | limits
        self.backend = open_backend(
            self.kind, self.model.gguf, self.model.spec, threads=2, num_blocks=blocks
        ).backend
        scheduler = build_scheduler(self.backend, eos_ids=self.model.tokenizer.eos_ids, **options)
        return Loop(scheduler, self.backend, clock=lambda: 0.0)

    def params(self, seed, **more):
        return SamplingParams(**{"temperature": 1.0, "seed": seed, "max_tokens": 120} | more)

    def run(self, loop):
        outs = {}
        while loop.scheduler.busy:
            for out in loop.step():
                outs.setdefault(out.job_id, []).append(out)
            assert loop.scheduler.check() == []
        loop.close()
        self.backend.close()
        return outs

    def ids(self, steps):
        return [token for out in steps for token in out.token_ids]


@pytest.fixture(scope="module", params=["reference", "native"])
def room(request, tmp_path_factory):
    if request.param == "native" and (why := native_missing()):
        pytest.skip(why)
    path = tiny_gguf(
        tmp_path_factory.mktemp("tiny") / "m.gguf", vocab=VOCAB, types="Q8_0", head_dim=32, seed=4
    )
    made = Room(path, request.param)
    yield made
    made.model.close()


@pytest.fixture(scope="module")
def alone(room):
    """Each seed by itself, every token drawn (log-probabilities are asked for)."""
    said = {}
    for seed in range(4):
        loop = room.loop()
        loop.scheduler.submit("a", PROMPT, room.params(seed, logprobs=0), 0.0, guide=room.grammar.guide())
        outs = room.run(loop)["a"]
        assert all(len(out.token_ids) == 1 == len(out.logprobs) for out in outs)
        said[seed] = room.ids(outs)
    return said


def test_grm6_forced_tokens_are_those_that_would_be_drawn(room, alone):
    for seed in range(4):
        loop = room.loop()
        loop.scheduler.submit("a", PROMPT, room.params(seed), 0.0, guide=room.grammar.guide())
        outs = room.run(loop)["a"]
        assert room.ids(outs) == alone[seed]
        assert len(outs) < len(alone[seed]) * 0.7, "forced runs cost no steps of their own"
        assert outs[-1].finish == "stop" and outs[-1].complete
        assert outs[-1].meter.completion_tokens == len(alone[seed])
        text = room.model.tokenizer.decode(alone[seed])
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("budget", [3, 16, 64])
def test_grm6_mates_chunks_and_choices_change_nothing(room, alone, budget):
    loop = room.loop(token_budget=budget)
    for seed in range(4):
        loop.scheduler.submit(f"g{seed}", PROMPT, room.params(seed), 0.0, guide=room.grammar.guide())
        loop.scheduler.submit(
            f"free{seed}", PROMPT[:20], room.params(seed, max_tokens=20, ignore_eos=True), 0.0
        )
    outs = room.run(loop)
    assert {seed: room.ids(outs[f"g{seed}"]) for seed in range(4)} == alone
    assert all(len(room.ids(outs[f"free{seed}"])) == 20 for seed in range(4))


def test_sch5_a_preempted_guide_goes_on_where_it_was(room, alone):
    loop = room.loop(blocks=12, policy=Eager())
    for seed in range(4):
        loop.scheduler.submit(f"g{seed}", PROMPT, room.params(seed), 0.0, guide=room.grammar.guide())
    outs = room.run(loop)
    assert loop.scheduler.counters.preemptions
    assert {seed: room.ids(outs[f"g{seed}"]) for seed in range(4)} == alone


@pytest.mark.parametrize("most", [1, 2, 5, 17])
def test_length_cuts_a_guided_output_exactly(room, alone, most):
    loop = room.loop()
    loop.scheduler.submit("a", PROMPT, room.params(0, max_tokens=most), 0.0, guide=room.grammar.guide())
    outs = room.run(loop)["a"]
    assert room.ids(outs) == alone[0][:most] and outs[-1].finish == "length"


def test_the_token_that_completes_the_grammar_at_the_limit_is_a_stop(room, alone):
    loop = room.loop()
    most = len(alone[0])
    loop.scheduler.submit("a", PROMPT, room.params(0, max_tokens=most), 0.0, guide=room.grammar.guide())
    outs = room.run(loop)["a"]
    assert room.ids(outs) == alone[0] and outs[-1].finish == "stop"


def test_an_output_without_a_choice_needs_one_draw(room):
    grammar = room.compiler.compile(StructuredOutputs(choice=["there is only one way to say this"]))
    loop = room.loop()
    loop.scheduler.submit("a", PROMPT, room.params(0), 0.0, guide=grammar.guide())
    outs = room.run(loop)["a"]
    assert room.model.tokenizer.decode(room.ids(outs)) == "there is only one way to say this"
    assert len(outs) == 1 and outs[0].meter.cached_tokens == 0 and outs[0].cached_tokens == 0


@pytest.mark.parametrize("place", [5, -8])
def test_a_stop_token_among_forced_ones_ends_the_job(room, alone, place):
    stop = alone[0][place]
    loop = room.loop()
    params = room.params(0, stop_token_ids=[stop])
    loop.scheduler.submit("a", PROMPT, params, 0.0, guide=room.grammar.guide())
    outs = room.run(loop)["a"]
    ids = room.ids(outs)
    assert ids == alone[0][: len(ids)] and ids[-1] == stop
    assert outs[-1].finish == "stop" and outs[-1].stop_token == stop and not outs[-1].complete


class Failing:
    """A guide that breaks at the third mask."""

    def __init__(self, guide, where):
        self.guide, self.where, self.fills = guide, where, 0
        self.broken = False

    @property
    def ended(self):
        return self.guide.ended

    def begin(self, most):
        if self.where == "begin":
            raise GuideFailed("broken at once")
        return []

    def accept(self, token, most):
        if self.broken or (self.where == "accept" and self.fills == 3):
            raise GuideFailed("broken")
        return self.guide.accept(token, 0)

    def fill(self, masks: "array[int]", row: int):
        self.fills += 1
        if self.where == "fill" and self.fills == 3:
            self.broken = True
            raise RuntimeError("no mask today")
        self.guide.fill(masks, row)

    def rollback(self, count):
        self.guide.rollback(count)


@pytest.mark.parametrize("where", ["fill", "accept"])
def test_can3_a_guide_that_fails_ends_its_own_job_alone(room, alone, where):
    loop = room.loop()
    guide = Failing(room.grammar.guide(), where)
    loop.scheduler.submit("bad", PROMPT, room.params(0), 0.0, guide=guide)
    loop.scheduler.submit("good", PROMPT, room.params(1), 0.0, guide=room.grammar.guide())
    loop.scheduler.submit("free", PROMPT, room.params(2, max_tokens=30, ignore_eos=True), 0.0)
    outs = room.run(loop)
    error = outs["bad"][-1].error
    assert isinstance(error, GuideFailed) and error.status == 500 and error.code == "guide_failed"
    assert len(room.ids(outs["bad"])) == 2
    assert room.ids(outs["good"]) == alone[1] and len(room.ids(outs["free"])) == 30
    assert loop.faults == 0


def test_can3_a_guide_that_fails_at_once_is_refused_at_submission(room):
    loop = room.loop()
    with pytest.raises(GuideFailed):
        loop.scheduler.submit("bad", PROMPT, room.params(0), 0.0, guide=Failing(None, "begin"))
    assert not loop.scheduler.busy
    room.run(loop)


def test_banned_ids_are_never_drawn(room):
    loop = room.loop()
    loop.scheduler.submit("a", PROMPT, room.params(0, max_tokens=40, ignore_eos=True), 0.0)
    first = room.ids(room.run(loop)["a"])
    loop = room.loop()
    banned = tuple(set(first[::2]))
    loop.scheduler.submit("a", PROMPT, room.params(0, max_tokens=40, ignore_eos=True), 0.0, banned=banned)
    assert not set(room.ids(room.run(loop)["a"])) & set(banned)


def test_grm2_masks_are_filled_beside_the_forward(room):
    loop = room.loop()
    loop.scheduler.submit("a", PROMPT, room.params(0), 0.0, guide=room.grammar.guide())
    began = []
    run = loop.backend.run
    loop.backend.run = lambda rows: (began.append(loop.masks._filling is not None), run(rows))
    room.run(loop)
    assert any(began) and loop.masks.rows and loop.masks.seconds > 0
