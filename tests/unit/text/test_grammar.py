"""What is enforced is what is understood: whatever a format's grammar permits, its reader reads as calls."""

import json
from array import array

import jsonschema
import msgspec
import pytest

from galley.errors import GuideFailed
from galley.model.model import Model
from galley.runtime.guided import EXACT, JSON_STYLE, Compiler, Thinking
from galley.runtime.text.formats import FORMATS, GENERIC
from galley.runtime.text.grammar import calls_grammar, free_grammar
from galley.runtime.text.harmony import HarmonyOutput
from galley.runtime.text.output import Output
from galley.types import StructuredOutputs
from tests.tiny import tiny_gguf
from tests.unit.text.test_output import meaning
from tests.walk import walk

pytest.importorskip("llguidance")

VOCAB = 420
TOOLS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
        "required": ["city", "days"],
    },
    "tree": {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}, "deep": {"type": "boolean"}},
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer"},
                    "next": {"type": "array", "items": {"type": "null"}},
                },
                "required": ["v"],
                "additionalProperties": False,
            }
        },
        "required": [],
    },
    "now": {"type": "object", "properties": {}},
}
RECORDS = [*FORMATS, GENERIC]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    model = Model.open(tiny_gguf(tmp_path_factory.mktemp("m") / "m.gguf", vocab=VOCAB), "tiny")
    yield Compiler(model.tokenizer, VOCAB)
    model.close()


def grammar(compiler, record, tools, *, several):
    return calls_grammar(
        record, tools, several=several, literal=compiler.literal, style={**JSON_STYLE, **EXACT}
    )


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.name)
def test_every_permitted_text_is_valid_calls(compiler, record, several):
    several = several and record.parallel
    tools = TOOLS
    if record.style == "tagged":  # a random writer would hardly ever end a raw text; see the test below
        city = {"type": "string", "enum": ["Rome", "Bern"]}
        weather = {**TOOLS["weather"], "properties": {**TOOLS["weather"]["properties"], "city": city}}
        tools = {**TOOLS, "weather": weather}
    rules = grammar(compiler, record, tools, several=several)
    compiled = compiler.compile(StructuredOutputs(grammar="start: calls\n" + rules))
    seen: dict[str, int] = {}
    counts = set()
    for seed in range(40):
        text = walk(compiled, compiler.tokenizer, VOCAB, seed)
        if text is None:
            continue
        if record.style == "harmony":
            output = HarmonyOutput(TOOLS, new_id=lambda: "id")
        else:
            output = Output(record, TOOLS, reasoning=False, new_id=lambda: "id")
        said, _, calls, warnings = meaning([*output.feed(text), *output.flush("stop")])
        assert said == "" and warnings == [] and calls, text
        counts.add(len(calls))
        for name, arguments, retracted in calls:
            assert not retracted
            jsonschema.validate(json.loads(arguments), TOOLS[name])
            seen[name] = seen.get(name, 0) + 1
    assert set(seen) == set(TOOLS)
    assert (max(counts) > 1) == several and min(counts) == 1


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.name)
def test_one_tool_by_name_and_reasoning_before(compiler, record):
    rules = grammar(compiler, record, {"now": TOOLS["now"]}, several=False)
    thinking = Thinking("<think>", "</think>", False)
    lark = "start: thinking calls\n" + rules + compiler.thought(thinking)
    compiled = compiler.compile(StructuredOutputs(grammar=lark))
    think = msgspec.structs.replace(record, think=("<think>", "</think>"))
    for seed in range(30):
        text = walk(compiled, compiler.tokenizer, VOCAB, seed, most=900)
        if text is None or record.style == "harmony":
            continue
        output = Output(think, TOOLS, reasoning=False, new_id=lambda: "id")
        said, _, calls, _ = meaning([*output.feed(text), *output.flush("stop")])
        assert said == "" and calls == [("now", "{}", False)], text


@pytest.mark.parametrize("name", ["qwen3-coder", "deepseek-dsml"])
def test_a_raw_text_may_hold_anything_but_its_end(compiler, name):
    record = next(record for record in RECORDS if record.name == name)
    rules = grammar(compiler, record, {"f": {"properties": {"x": {"type": "string"}}}}, several=False)
    guide = compiler.compile(StructuredOutputs(grammar="start: calls\n" + rules)).guide()
    if name == "qwen3-coder":
        value = 'é "a"\n</param </parameter> 🙂'
        text = f"<tool_call>\n<function=f>\n<parameter=x>\n{value}\n</parameter>\n</function>\n</tool_call>"
    else:
        value = 'é "a"\n</param <｜DSML｜ 🙂'
        end = "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>"
        lead = (
            '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="x" string="true">'
        )
        text = lead + value + end
    for token in compiler.tokenizer.encode(text):
        guide.accept(token, 0)
    assert guide.ended
    output = Output(record, TOOLS | {"f": {}}, reasoning=False, new_id=lambda: "id")
    said, _, calls, _ = meaning([*output.feed(text), *output.flush("stop")])
    assert said == "" and [(n, json.loads(a)) for n, a, _ in calls] == [("f", {"x": value})]


def test_calls_or_an_answer_of_a_form(compiler):
    rules = grammar(compiler, GENERIC, {"now": TOOLS["now"]}, several=False)
    both = compiler.compile(StructuredOutputs(choice=["yes", "no"]), calls=rules)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert {walk(both, compiler.tokenizer, VOCAB, seed) for seed in range(40)} == {"yes", "no", call}


def test_a_control_token_is_spelled_by_its_id(compiler):
    assert compiler.literal("<|im_end|>a") == '<[2]> "a"'
    lark = f'start: {compiler.literal("<|im_start|>")} "x" {compiler.literal("<|im_end|>")} "y"'
    guide = compiler.compile(StructuredOutputs(grammar=lark)).guide()
    assert guide.begin(1) == [1]


def test_what_a_format_cannot_write_is_refused(compiler):
    by_name = {record.name: record for record in RECORDS}
    cases = [
        ("pythonic", {"a-b": {}}),
        ("pythonic", {"f": {"properties": {"x y": {}}}}),
        ("qwen3-coder", {"f": {"properties": {"x": {"type": "string", "minLength": 3}}}}),
        ("qwen3-coder", {"f": {"properties": {"x>": {}}}}),
    ]
    for name, tools in cases:
        with pytest.raises(ValueError, match="format"):
            grammar(compiler, by_name[name], tools, several=False)


def free(compiler, record, tools, *, several=True):
    rules = free_grammar(
        record, tools, several=several, literal=compiler.literal, style={**JSON_STYLE, **EXACT}
    )
    return compiler.compile(StructuredOutputs(grammar="start: free\n" + rules))


FREE = [record for record in RECORDS if record.style != "harmony"]
STRICT = {
    "weather": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Bern"]}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "now": TOOLS["now"],
}


@pytest.mark.parametrize("record", FREE, ids=lambda r: r.name)
def test_what_follows_an_opened_call_is_a_call(compiler, record):
    """``tool_choice: auto``: text is free; from the marker on the grammar holds."""
    said_before = "" if record.bare else "Let me see. { <tool_cal "
    opener = record.bare or record.openers[0]
    tools = {"weather": STRICT["weather"]} if record.style == "pythonic" else STRICT
    compiled = free(compiler, record, tools, several=record.parallel)
    found = 0
    for seed in range(25):
        text = walk(compiled, compiler.tokenizer, VOCAB, seed, lead=said_before + opener)
        if text is None:
            continue
        output = Output(record, TOOLS, reasoning=False, new_id=lambda: "id")
        said, _, calls, warnings = meaning([*output.feed(text), *output.flush("stop")])
        assert said.strip() == said_before.strip() and warnings == [] and calls, text
        for name, arguments, retracted in calls:
            assert not retracted
            jsonschema.validate(json.loads(arguments), STRICT[name])
            found += 1
    assert found > 3


@pytest.mark.parametrize("record", FREE, ids=lambda r: r.name)
def test_text_without_a_call_is_free_and_may_end_anywhere(compiler, record):
    encode = compiler.tokenizer.encode
    for tools in (STRICT, None):
        guide = free(compiler, record, tools).guide()
        masks = array("I", [0]) * -(-VOCAB // 32)
        end = compiler.tokenizer.eos_ids[0]
        for token in encode("It is 5 < 6, ok: {x} [y]\n\n<too"):
            guide.fill(masks, 0)
            assert masks[token >> 5] >> (token & 31) & 1
            assert guide.accept(token, 9) == []
        guide.fill(masks, 0)
        assert masks[end >> 5] >> (end & 31) & 1
        guide.accept(end, 0)


@pytest.mark.parametrize("record", FREE, ids=lambda r: r.name)
def test_with_no_tools_no_call_can_be_opened(compiler, record):
    """``tool_choice: none``."""
    grammar = free(compiler, record, None)
    for opener in [*record.openers, *([record.bare, "\n " + record.bare] if record.bare else [])]:
        guide = grammar.guide()
        with pytest.raises(GuideFailed):
            for token in compiler.tokenizer.encode(opener):
                guide.accept(token, 0)


def test_one_call_where_several_are_not_wanted(compiler):
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for several in (False, True):
        guide = free(compiler, GENERIC, {"now": TOOLS["now"]}, several=several).guide()
        for token in compiler.tokenizer.encode("a " + call):
            guide.accept(token, 0)
        assert guide.ended != several
