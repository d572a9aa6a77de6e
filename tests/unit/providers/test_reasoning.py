"""Wishes for reasoning, and tools that the model may choose: what template and grammar make of them."""

import json
from array import array

import msgspec
import pytest

from galley.errors import GuideFailed, InvalidRequest, UnsupportedParameter
from galley.model.model import Model
from galley.providers import toolbox as toolbox_module
from galley.providers.reasoning import Reasoning, reasoning_of
from galley.providers.toolbox import Toolbox
from galley.runtime.guided import Compiler
from galley.runtime.text.formats import detect
from galley.types import Request, SamplingParams
from tests.tiny import CHATML, tiny_gguf

pytest.importorskip("llguidance")

VOCAB = 420
QWEN = CHATML + "{% if enable_thinking is false %}{{ '<think></think>' }}{% endif %}{# <tool_call> tools #}"
R1 = CHATML.replace("assistant\n", "assistant\n<think>\n")
LEVELS = CHATML + "{% if reasoning_effort %}{{ reasoning_effort }}{% endif %}{# <think> #}"
HARMONY = LEVELS + "{# <|channel|> <|message|> #}"
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"x": {"enum": [1, 2]}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
}


def request(**more):
    given = {"messages": [{"role": "user", "content": "hi"}], "params": SamplingParams()}
    return Request(id="r", api="chat", model="m", created=0.0, **given | more)


def wish(source, **more):
    return reasoning_of(detect(source), source, request(**more))


@pytest.mark.parametrize(
    ("source", "more", "kwargs", "budget"),
    [
        (QWEN, {"reasoning_effort": "none"}, {"enable_thinking": False}, 0),
        (QWEN, {"reasoning_effort": "low"}, {"enable_thinking": True}, 1024),
        (QWEN, {"reasoning_effort": "max"}, {"enable_thinking": True}, None),
        (QWEN, {"thinking_budget": 7}, {"enable_thinking": True}, 7),
        (QWEN, {"thinking_budget": 0}, {"enable_thinking": False}, 0),
        (QWEN, {"thinking_budget": 7000, "reasoning_effort": "low"}, {"enable_thinking": True}, 1024),
        (R1, {"reasoning_effort": "minimal"}, {}, 256),
        (R1, {"reasoning_effort": "none"}, {}, 0),
        (LEVELS, {"reasoning_effort": "minimal"}, {"reasoning_effort": "low"}, 256),
        (HARMONY, {"reasoning_effort": "xhigh"}, {"reasoning_effort": "high"}, None),
        (CHATML, {"reasoning_effort": "none"}, {}, None),
        (CHATML, {}, {}, None),
    ],
)
def test_a_wish_becomes_a_switch_and_a_bound(source, more, kwargs, budget):
    made = wish(source, **more)
    assert (made.kwargs, made.budget) == (kwargs, budget)
    assert bool(made.told) == bool(kwargs or budget is not None)
    for name, value in kwargs.items():
        assert f"{name}={str(value).lower()}" in next(iter(made.told.values()))


@pytest.mark.parametrize(
    ("source", "more", "param"),
    [
        (CHATML, {"reasoning_effort": "low"}, "reasoning_effort"),
        (CHATML, {"thinking_budget": 5}, "thinking_token_budget"),
        (HARMONY, {"reasoning_effort": "none"}, "reasoning_effort"),
        (HARMONY, {"thinking_budget": 5}, "thinking_token_budget"),
    ],
)
def test_what_cannot_be_done_is_refused(source, more, param):
    with pytest.raises(UnsupportedParameter) as caught:
        wish(source, **more)
    assert caught.value.param == param


def test_a_switch_set_twice_is_refused():
    with pytest.raises(InvalidRequest, match="enable_thinking"):
        wish(QWEN, reasoning_effort="low", template_kwargs={"enable_thinking": False})
    assert wish(QWEN, template_kwargs={"enable_thinking": False}) == Reasoning()


class Bench:
    """A toolbox over a tiny model with a template of one's choice."""

    def __init__(self, folder, template):
        self.model = Model.open(tiny_gguf(folder / "m.gguf", vocab=VOCAB, template=template), "tiny")
        self.box = Toolbox(self.model, Compiler(self.model.tokenizer, VOCAB))

    def guide(self, prompt="hi", **more):
        grammar = self.box.compile(request(**more), self.model.tokenizer.encode(prompt))
        return None if grammar is None else grammar.guide()

    def may(self, guide, text):
        for token in self.model.tokenizer.encode(text):
            masks = array("I", [0]) * -(-VOCAB // 32)
            guide.fill(masks, 0)
            if not masks[token >> 5] >> (token & 31) & 1:
                return False
            guide.accept(token, 0)
        return True


@pytest.fixture(params=[QWEN, CHATML], ids=["hermes", "generic"])
def bench(request, tmp_path):
    made = Bench(tmp_path, request.param)
    yield made
    made.model.close()


def call(arguments, name="f"):
    return f'Well. <tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def loose(**more):
    return {
        "type": "function",
        "function": {"name": "g", "parameters": TOOL["function"]["parameters"], **more},
    }


def test_auto_holds_strict_tools_once_a_call_is_opened(bench):
    assert bench.guide(tools=[loose()]) is None, "nothing asks for a grammar"
    assert bench.may(bench.guide(tools=[TOOL]), "Free { text, and <tool then the end")
    assert bench.may(bench.guide(tools=[TOOL]), call({"x": 2}))
    assert not bench.may(bench.guide(tools=[TOOL]), call({"x": 3}))
    assert not bench.may(bench.guide(tools=[TOOL]), call({}))
    assert not bench.may(bench.guide(tools=[TOOL]), call({"x": 2}, "g"))
    both = [TOOL, loose()]
    assert bench.may(bench.guide(tools=both), call({"y": [1]}, "g")), "not strict: any object"
    assert not bench.may(bench.guide(tools=both), call({"y": [1]}))


def test_auto_without_parallel_calls_ends_after_one(bench):
    guide = bench.guide(tools=[loose()], parallel_tool_calls=False)
    assert bench.may(guide, call({"z": 1}, "g")) and guide.ended
    assert not bench.guide(tools=[TOOL]).ended
    again = bench.guide(tools=[TOOL])
    assert bench.may(again, call({"x": 1}) + "\n" + call({"x": 2}).removeprefix("Well. "))


def test_none_masks_what_opens_a_call(bench):
    guide = bench.guide(tools=[TOOL], tool_choice="none")
    assert not bench.may(guide, "Well. <tool_call>")
    assert bench.may(bench.guide(tools=[TOOL], tool_choice="none"), "Well. <tool_cal and so on")


def test_without_llguidance_it_says_what_is_not_kept(bench, monkeypatch):
    monkeypatch.setattr(toolbox_module, "guided_missing", lambda: "no llguidance")
    for more, param in (
        ({"tool_choice": "none"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ):
        asked = request(tools=[loose()], **more)
        assert bench.box.adjusted(asked)[param] == "not enforced: no llguidance"
        assert bench.box.compile(asked, [5]) is None


def test_a_bound_on_reasoning_is_around_the_grammar(tmp_path):
    bench = Bench(tmp_path, R1)
    prompt = "x <think>\n"
    guide = bench.guide(prompt, thinking_budget=2)
    forced = []
    for token in bench.model.tokenizer.encode("a b c")[:2]:
        forced += guide.accept(token, 50)
    assert bench.model.tokenizer.decode(forced) == "</think>"
    guide = bench.guide(prompt, thinking_budget=2, tools=[TOOL], tool_choice="required")
    assert not bench.may(guide, "a long thought")
    assert bench.guide("x <think></think>", thinking_budget=2) is None, "it is over already"
    with pytest.raises(GuideFailed):
        late = bench.guide(prompt, thinking_budget=1, tools=[TOOL], tool_choice="required")
        late.accept(bench.model.tokenizer.encode("a")[0], 50)
        late.accept(bench.model.tokenizer.encode("?")[0], 0)
    bench.model.close()


def test_the_request_stays_as_it_was():
    asked = request(reasoning_effort="low")
    assert msgspec.structs.asdict(asked)["template_kwargs"] == {}
