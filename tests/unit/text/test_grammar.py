"""What is enforced is what is understood: whatever a format's grammar permits, its reader reads as calls."""

import json

import jsonschema
import msgspec
import pytest

from galley.model.model import Model
from galley.runtime.guided import EXACT, JSON_STYLE, Compiler, Thinking
from galley.runtime.text.formats import FORMATS, GENERIC
from galley.runtime.text.grammar import calls_grammar
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
