"""Grammars: what compiles, what is refused and where, and that nothing else can be written (GRM-1, GRM-3)."""

import json
import re

import jsonschema
import pytest

from galley.errors import GuideFailed, InvalidRequest
from galley.model.model import Model
from galley.runtime import guided
from galley.runtime.guided import Compiler, Thinking
from galley.runtime.schema import subschemas
from galley.types import StructuredOutputs
from tests.tiny import tiny_gguf
from tests.walk import walk

pytest.importorskip("llguidance")

VOCAB = 420
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    opened = Model.open(tiny_gguf(tmp_path_factory.mktemp("m") / "m.gguf", vocab=VOCAB), "tiny")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def compiler(model):
    return Compiler(model.tokenizer, VOCAB)


def texts(compiler, wanted, seeds=range(12), **more):
    grammar = compiler.compile(wanted, **more)
    found = [walk(grammar, compiler.tokenizer, VOCAB, seed) for seed in seeds]
    whole = [text for text in found if text is not None]
    assert whole
    return whole


def test_grm3_schema(compiler):
    for text in texts(compiler, StructuredOutputs(json=PERSON)):
        jsonschema.validate(json.loads(text), PERSON)
        assert text.startswith('{"name": "') and '", "age": ' in text


def test_grm3_object_regex_choice_lark(compiler):
    assert all(isinstance(json.loads(t), dict) for t in texts(compiler, StructuredOutputs(json_object=True)))
    pattern = r"a/[0-9]{2}\n(é|☃)\\?"
    assert all(re.fullmatch(pattern, t) for t in texts(compiler, StructuredOutputs(regex=pattern)))
    options = ['red "x"', "grün\n", "back\\slash", "{}"]
    assert set(texts(compiler, StructuredOutputs(choice=options), range(40))) == set(options)
    lark = 'start: "<" start ">" | NAME\nNAME: /[a-z]{1,3}/'
    assert all(
        re.fullmatch(r"(<*)[a-z]{1,3}(>*)", t) for t in texts(compiler, StructuredOutputs(grammar=lark))
    )


def test_white_space_as_asked_for(compiler):
    loose = StructuredOutputs(json=PERSON, whitespace_pattern=r"[ \n]{0,3}")
    found = texts(compiler, loose, range(30))
    assert all(jsonschema.validate(json.loads(t), PERSON) is None for t in found)
    assert len({re.sub("[^ \n]", "", t) for t in found}) > 3


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "properties.a.not"),
        ({"type": "array", "items": {"type": "array", "uniqueItems": True}}, "items.uniqueItems"),
        ({"$defs": {"x": {"format": "regex"}}, "$ref": "#/$defs/x"}, "$defs.x.format"),
        ({"anyOf": [{"type": "string"}, {"if": {}, "then": {}}]}, "anyOf.1.if"),
        ({"properties": {"a": {"$ref": "http://elsewhere/x"}}}, "properties.a.$ref"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ({"type": "string", "pattern": "\\p{Letter}"}, "pattern"),
        ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "oneOf"),
        ({"type": "object", "minProperties": 3}, "minProperties"),
        ({"items": {"multipleOf": 0.01}}, "items.multipleOf"),
        ({"properties": {"a": {"enum": ["b", {"c": "\x00"}]}}}, "properties.a.enum"),
        ({"properties": {"\x01": {}}}, "properties"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
    ],
)
def test_an_unsupported_keyword_is_named_by_its_path(compiler, schema, path):
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(StructuredOutputs(json=schema), param="response_format.json_schema.schema")
    assert caught.value.param == f"response_format.json_schema.schema.{path}"
    assert caught.value.code == "invalid_json_schema" and caught.value.status == 400


@pytest.mark.parametrize(
    "schema", [{"multipleOf": 0.25}, {"const": "a\nb\t"}, {"type": "string", "pattern": "\\w+"}]
)
def test_what_is_certain_is_not_refused(compiler, schema):
    for text in texts(compiler, StructuredOutputs(json=schema)):
        jsonschema.validate(json.loads(text), schema)


def test_without_strict_keywords_are_left_out_and_named(compiler):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "not": {"const": 1}}},
        "required": ["a"],
    }
    schema |= {"additionalProperties": False, "propertyNames": {"minLength": 1}}
    grammar = compiler.compile(StructuredOutputs(json=schema, strict=False), param="s")
    assert grammar.relaxed == {"s.properties.a.not": "not enforced", "s.propertyNames": "not enforced"}
    one = compiler.compile(
        StructuredOutputs(json={"oneOf": [{"type": "integer"}, {"minimum": 2}]}, strict=False)
    )
    assert "read as anyOf" in one.relaxed["structured_outputs.oneOf"]
    assert "not" in schema["properties"]["a"], "the caller's schema is its own"


@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        (StructuredOutputs(regex="(?=a)b("), "invalid_grammar"),
        (StructuredOutputs(regex="("), "invalid_grammar"),
        (StructuredOutputs(grammar="start: nowhere"), "invalid_grammar"),
        (StructuredOutputs(grammar="\0"), "invalid_grammar"),
        (StructuredOutputs(json="{"), "invalid_grammar"),
        (StructuredOutputs(json="3"), "invalid_grammar"),
        (StructuredOutputs(choice=["x" * 600_000]), "invalid_grammar"),
        (StructuredOutputs(json=False), "invalid_json_schema"),
        (StructuredOutputs(json={"properties": {"a": 3}}), "invalid_json_schema"),
        (StructuredOutputs(json={"type": "foo"}), "invalid_json_schema"),
        (StructuredOutputs(json={"x-guidance": {"lenient": True}, "not": {}}), "invalid_json_schema"),
    ],
)
def test_what_cannot_be_compiled_is_a_400(compiler, wanted, code):
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(wanted)
    assert caught.value.code == code


def test_grm1_compiled_grammars_are_kept_up_to_a_bound(model):
    compiler = Compiler(model.tokenizer, VOCAB, size=2)
    one, two, three = (StructuredOutputs(choice=[text]) for text in "abc")
    assert compiler.compile(one) is compiler.compile(one) and compiler.compiled == 1
    compiler.compile(two), compiler.compile(one), compiler.compile(three)
    assert compiler.compiled == 3
    assert compiler.compile(one) and compiler.compiled == 3, "the one used last stays"
    assert compiler.compile(two) and compiler.compiled == 4, "the one used longest ago went"
    assert compiler.compile(one, thinking=Thinking("<t>", "</t>", False)) is not compiler.compile(one)


def test_without_llguidance_it_says_what_to_install(model, monkeypatch):
    monkeypatch.setattr(guided, "guided_missing", lambda: "structured output needs the package llguidance")
    with pytest.raises(InvalidRequest) as caught:
        Compiler(model.tokenizer, VOCAB).compile(StructuredOutputs(json_object=True))
    assert caught.value.code == "missing_dependency" and "galley[guided]" in str(caught.value.hint)


@pytest.mark.parametrize("opened", [True, False])
def test_grm5_reasoning_comes_before_the_grammar(compiler, opened):
    thinking = Thinking("<think>", "</think>", opened)
    grammar = compiler.compile(StructuredOutputs(json=PERSON), thinking=thinking)
    encode, decode = compiler.tokenizer.encode, compiler.tokenizer.decode
    for lead in ["hm { </thi no</think>\n\n"] if opened else ["<think>hm</think>", ""]:
        guide = grammar.guide()
        for token in encode(lead + '{"name": "a", "age": 3'):
            guide.accept(token, 0)
        with pytest.raises(GuideFailed):
            guide.accept(encode("]")[0], 0)
    guide = grammar.guide()
    with pytest.raises(GuideFailed):
        for token in encode('{"name": ]' if not opened else "a</think>["):
            guide.accept(token, 0)
    assert decode(encode("x")) == "x"


def test_grm6_begin_leaves_a_token_to_draw(compiler):
    only = compiler.compile(StructuredOutputs(choice=["the only way"]))
    whole = compiler.tokenizer.encode("the only way")
    guide = only.guide()
    assert guide.begin(100) == whole[:-1] and not guide.ended
    assert guide.accept(whole[-1], 5) == [] and guide.ended
    assert only.guide().begin(3) == whole[:3] and only.guide().begin(0) == []


def test_grm4_rollback(compiler):
    guide = compiler.compile(StructuredOutputs(json=PERSON)).guide()
    ids = compiler.tokenizer.encode('{"name": "abc')
    for token in ids:
        guide.accept(token, 0)
    guide.rollback(3)
    for token in compiler.tokenizer.encode('xy", "age": 3}'):
        guide.accept(token, 0)
    assert guide.ended


def test_grm3_an_end_token_only_where_the_grammar_may_end(compiler):
    guide = compiler.compile(StructuredOutputs(regex="a+")).guide()
    eos = compiler.tokenizer.eos_ids[0]
    with pytest.raises(GuideFailed):
        guide.accept(eos, 0)
    guide = compiler.compile(StructuredOutputs(regex="a+")).guide()
    guide.accept(compiler.tokenizer.encode("a")[0], 0)
    assert guide.accept(eos, 0) == []


def test_subschemas_reach_every_place_where_a_schema_may_be():
    schema = {
        "items": {"a": 1},
        "properties": {"not": {"not": {}}},
        "allOf": [{"$defs": {"q": {}}}],
        "enum": [{}],
    }
    paths = {".".join(path) for path, _ in subschemas(schema, [])}
    assert paths == {"", "items", "properties.not", "properties.not.not", "allOf.0", "allOf.0.$defs.q"}
