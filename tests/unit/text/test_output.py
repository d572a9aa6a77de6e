"""Calls and reasoning told from text: the golden corpus of every format, streamed by characters (TXT-6)."""

import json

import msgspec
import pytest

from galley.runtime.text.formats import FORMATS, GENERIC, ChatFormat, detect
from galley.runtime.text.harmony import HarmonyOutput
from galley.runtime.text.output import Output, Piece
from tests.unit.text.corpus import CORPUS, TOOLS, Golden

RECORDS = {record.name: record for record in (*FORMATS, GENERIC)}


def record_of(golden: Golden) -> ChatFormat:
    think = ("[THINK]", "[/THINK]") if golden.record.startswith("mistral") else ("<think>", "</think>")
    return msgspec.structs.replace(RECORDS[golden.record], think=think if golden.think else None)


def reader(golden: Golden) -> Output | HarmonyOutput:
    ids = iter(range(99))
    if golden.record == "harmony":
        return HarmonyOutput(TOOLS, new_id=lambda: f"id{next(ids)}")
    return Output(record_of(golden), TOOLS, reasoning=golden.opened, new_id=lambda: f"id{next(ids)}")


def read(golden: Golden, pieces: list[str]) -> list[Piece]:
    """Everything said, neighbours joined."""
    output = reader(golden)
    found = [piece for text in pieces for piece in output.feed(text)]
    found += output.flush(golden.finish)  # type: ignore[arg-type]
    return found


def meaning(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, str, bool]], list[str]]:
    """Text, reasoning, calls as (name, arguments, retracted), warnings."""
    calls: dict[int, list] = {}
    for piece in pieces:
        if piece.call is not None:
            calls.setdefault(piece.call.index, []).append(piece.call)
    told = []
    for parts in calls.values():
        assert parts[0].name and parts[0].id and not any(part.name or part.id for part in parts[1:])
        arguments = "".join(part.arguments for part in parts)
        told.append((parts[0].name, arguments, any(part.retracted for part in parts)))
    return (
        "".join(piece.text for piece in pieces),
        "".join(piece.reasoning for piece in pieces),
        told,
        [piece.warning for piece in pieces if piece.warning],
    )


@pytest.mark.parametrize("golden", CORPUS, ids=lambda g: f"{g.record}-{g.name}")
def test_txt6_golden(golden: Golden) -> None:
    text, reasoning, calls, warnings = meaning(read(golden, [golden.said]))
    standing = [(name, json.loads(arguments)) for name, arguments, retracted in calls if not retracted]
    assert standing == golden.calls
    assert (text, reasoning) == (golden.text, golden.reasoning)
    assert len(warnings) == golden.warnings, warnings
    assert meaning(read(golden, list(golden.said))) == (text, reasoning, calls, warnings)


def test_arguments_are_streamed_as_they_come() -> None:
    golden = CORPUS[0]
    output = reader(golden)
    seen: list[str] = []
    for char in golden.said:
        seen += [p.call.arguments for p in output.feed(char) if p.call is not None and p.call.arguments]
    assert "".join(seen) == '{"city": "Paris", "days": 3}' and len(seen) > 20


def test_a_call_cut_off_by_the_length_stays_as_far_as_it_came() -> None:
    cut = Golden("cut", "hermes", CORPUS[0].said.partition("ris")[0], [], finish="length")
    text, _, calls, warnings = meaning(read(cut, [cut.said]))
    assert text == "" and calls == [("weather", '{"city": "Pa', False)] and "cut off" in warnings[0]


def test_every_style_has_a_case_of_two_calls_and_odd_characters() -> None:
    covered = {golden.record for golden in CORPUS if len(golden.calls) == 2}
    assert covered >= {record.name for record in FORMATS} - {"llama4", "deepseek-dsml"}


@pytest.mark.parametrize(
    ("source", "name", "think"),
    [
        ("{{ '<tool_call>' }} tools", "hermes", None),
        ("{{ '<tool_call>' }} <think> tools", "hermes", ("<think>", "</think>")),
        ("<tool_call> <function=x> <parameter=y>", "qwen3-coder", None),
        ("<｜tool▁calls▁begin｜><｜tool▁sep｜>```json </think>", "deepseek-v3", ("<think>", "</think>")),
        ("<｜tool▁calls▁begin｜><｜tool▁sep｜>", "deepseek-v3.1", None),
        ("<｜DSML｜invoke", "deepseek-dsml", None),
        ("[TOOL_CALLS] [", "mistral", None),
        ("[TOOL_CALLS][ARGS][THINK]", "mistral-v11", ("[THINK]", "[/THINK]")),
        ("<|start_header_id|> tools", "llama3-json", None),
        ("<|start_header_id|> tools [func_name1(params", "pythonic", None),
        ("<|header_start|>", "llama4", None),
        ("<|start|><|channel|><|message|> <think>", "harmony", None),
        ("<|im_start|>", "generic", None),
    ],
)
def test_formats_are_detected_from_the_template(source: str, name: str, think) -> None:
    found = detect(source)
    assert (found.name, found.think) == (name, think)
