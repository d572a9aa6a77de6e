"""The prefix-stability lint: templates that keep their prefix, and the ways they lose it."""

from pathlib import Path

import pytest

from galley.model.chat import ChatTemplate
from galley.model.model import Model
from galley.model.stability import check_stability
from tests.tiny import CHATML, tiny_gguf

STRIPPED = CHATML.replace("message['content']", "(message['content'].split('</think>')[-1])").replace(
    "{% if add", "{# </think> #}{% if add"
)
LAST_ONLY = CHATML.replace("message['content'] +", "('[last]' if loop.last else '') + message['content'] +")
DATED = "Today is {{ strftime_now('%d') }}.\n" + CHATML
COUNTED = "{{ messages|length }} messages\n" + CHATML
PICKY = "{{ raise_exception('no') }}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    path: Path = tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", seed=7)
    model = Model.open(path, "tiny")
    yield model.tokenizer
    model.close()


def test_a_plain_template_keeps_everything(tokenizer):
    found = check_stability(ChatTemplate(CHATML), tokenizer)
    assert found.stable and found.prompt_stable and not found.dates and found.lost_share < 0.02
    assert len(found.turns) == 4 and found.words().startswith("stable")


def test_reasoning_taken_out_of_the_history_loses_the_answers(tokenizer):
    found = check_stability(ChatTemplate(STRIPPED), tokenizer)
    assert not found.stable and found.prompt_stable and 0.05 < found.lost_share < 0.9
    assert "answers are not" in found.words()


def test_a_mark_on_the_last_message_rewrites_every_turn(tokenizer):
    found = check_stability(ChatTemplate(LAST_ONLY), tokenizer)
    assert not found.stable and not found.prompt_stable
    assert "earlier turns are rewritten" in found.words()


def test_a_count_up_front_loses_all(tokenizer):
    found = check_stability(ChatTemplate(COUNTED), tokenizer)
    assert all(turn.kept == 0 for turn in found.turns) and found.lost_share == 1


def test_dates_are_told(tokenizer):
    found = check_stability(ChatTemplate(DATED), tokenizer)
    assert found.dates and "writes the time" in found.words()


def test_a_template_that_refuses_is_unknown(tokenizer):
    found = check_stability(ChatTemplate(PICKY), tokenizer)
    assert found.failure and not found.stable and "unknown" in found.words()
