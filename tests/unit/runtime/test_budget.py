"""The bound on reasoning: counted from the marker on, closed by force, with a grammar behind it or none."""

from array import array

import pytest

from galley.model.model import Model
from galley.runtime.budget import Budgeted
from galley.runtime.guided import Compiler, Thinking
from galley.types import StructuredOutputs
from tests.tiny import tiny_gguf

VOCAB = 420


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    opened = Model.open(tiny_gguf(tmp_path_factory.mktemp("m") / "m.gguf", vocab=VOCAB), "tiny")
    yield opened
    opened.close()


def bound(model, budget, *, opened=False, grammar=None):
    tokenizer = model.tokenizer
    return Budgeted(
        grammar,
        markers=("<think>", "</think>"),
        close=tokenizer.encode("</think>"),
        budget=budget,
        opened=opened,
        text_of=tokenizer.token_bytes,
        vocab=VOCAB,
    ).guide()


def say(guide, model, text, most=0):
    """Accept a text; all that was forced meanwhile."""
    forced = []
    for token in model.tokenizer.encode(text):
        forced += guide.accept(token, most)
    return forced


def allowed(guide):
    masks = array("I", [7]) * -(-VOCAB // 32)
    guide.fill(masks, 0)
    return [i for i in range(VOCAB) if masks[i >> 5] >> (i & 31) & 1]


def test_the_marker_is_forced_when_the_budget_is_spent(model):
    close = model.tokenizer.encode("</think>")
    guide = bound(model, 5)
    assert guide.begin(9) == [] and say(guide, model, "<think>") == []
    ids = model.tokenizer.encode("x y z w v u")
    for token in ids[:4]:
        assert guide.accept(token, 99) == [] and len(allowed(guide)) == VOCAB
    assert guide.accept(ids[4], 99) == close
    assert say(guide, model, "the answer is as long as it likes", 99) == [] and not guide.ended


def test_without_room_to_force_it_is_the_only_choice(model):
    close = model.tokenizer.encode("</think>")
    guide = bound(model, 2)
    say(guide, model, "<think>")
    for token in model.tokenizer.encode("x y")[:2]:
        assert guide.accept(token, 0) == []
    for token in close:
        assert allowed(guide) == [token]
        assert guide.accept(token, 0) == []
    assert len(allowed(guide)) == VOCAB


def test_a_part_may_be_forced_and_the_rest_drawn(model):
    close = model.tokenizer.encode("</think>")
    assert len(close) > 3
    guide = bound(model, 1)
    say(guide, model, "<think>")
    assert guide.accept(model.tokenizer.encode("x")[0], 2) == close[:2]
    assert allowed(guide) == [close[2]]
    assert guide.accept(close[2], 99) == close[3:]


def test_who_answers_at_once_or_stops_by_himself_is_left_alone(model):
    at_once = bound(model, 3)
    assert say(at_once, model, "No thought, <think> not even here, at great length", 99) == []
    soon = bound(model, 30, opened=True)
    assert say(soon, model, "hm</think>and a long answer " * 3, 99) == []


def test_none_at_all(model):
    close = model.tokenizer.encode("</think>")
    assert bound(model, 0, opened=True).begin(99) == close
    guide = bound(model, 0, opened=True)
    assert guide.begin(1) == close[:1] and allowed(guide) == [close[1]]
    opener = model.tokenizer.encode("<think>")
    guide = bound(model, 0)
    for token in opener[:-1]:
        assert guide.accept(token, 99) == []
    assert guide.accept(opener[-1], 99) == close


def test_rollback_counts_again(model):
    guide = bound(model, 4)
    say(guide, model, "<think>")
    ids = model.tokenizer.encode("x y z w v")
    for token in ids[:3]:
        guide.accept(token, 0)
    guide.rollback(2)
    for token in ids[1:3]:
        assert guide.accept(token, 99) == []
    assert guide.accept(ids[3], 99) == model.tokenizer.encode("</think>")


@pytest.mark.parametrize("opened", [True, False])
def test_a_grammar_goes_on_behind_it(model, opened):
    pytest.importorskip("llguidance")
    compiler = Compiler(model.tokenizer, VOCAB)
    thinking = Thinking("<think>", "</think>", opened)
    grammar = compiler.compile(StructuredOutputs(choice=["yes", "no"]), thinking=thinking)
    guide = bound(model, 3, opened=opened, grammar=grammar)
    guide.begin(9)
    if not opened:
        say(guide, model, "<think>", 0)
    forced = say(guide, model, "a b c", 99)
    assert model.tokenizer.decode(forced).startswith("</think>")
    assert set(allowed(guide)) < set(range(VOCAB))
    say(guide, model, "yes")
    assert guide.ended
