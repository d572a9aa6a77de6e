"""Golden outputs of every format: what was written, and what it means. Arguments are compared as JSON."""

from typing import Any, NamedTuple

TOOLS: dict[str, Any] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
    "write": {
        "type": "object",
        "properties": {"path": {"type": "string"}, "text": {"type": "string"}, "meta": {"type": "object"}},
    },
}
PARIS = {"city": "Paris", "days": 3}
ODD = {"path": "é/☃ 🙂", "text": 'a "b"\n</parameter> </tool_call> {', "meta": {"x": [1, {"y": None}]}}
W1, W2 = ("weather", PARIS), ("write", ODD)


class Golden(NamedTuple):
    """One output. ``finish`` is how the engine ended; ``calls`` are those that stand."""

    name: str
    record: str
    said: str
    calls: list[tuple[str, Any]]
    text: str = ""
    reasoning: str = ""
    finish: str = "stop"
    warnings: int = 0
    think: bool = False
    opened: bool = False


ODD_JSON = (
    '{"path": "é/☃ 🙂", "text": "a \\"b\\"\\n</parameter> </tool_call> {", "meta": {"x": [1, {"y": null}]}}'
)
PARIS_JSON = '{"city": "Paris", "days": 3}'


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def coder(name: str, **values: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


V3, V31 = "function<｜tool▁sep｜>{}\n```json\n{}\n```", "{}<｜tool▁sep｜>{}"


def deepseek(form: str, *calls: tuple[str, str]) -> str:
    inner = "\n".join(f"<｜tool▁call▁begin｜>{form.format(*call)}<｜tool▁call▁end｜>" for call in calls)
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


HARMONY_CALL = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}"
DSML = (
    '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
)

CORPUS = [
    Golden("one", "hermes", hermes("weather", PARIS_JSON), [W1]),
    Golden("two", "hermes", hermes("weather", PARIS_JSON) + "\n" + hermes("write", ODD_JSON), [W1, W2]),
    Golden(
        "text around",
        "hermes",
        "I look.\n\n" + hermes("weather", PARIS_JSON) + "\nDone.",
        [W1],
        "I look.\nDone.",
    ),
    Golden(
        "keys turned",
        "hermes",
        '<tool_call>{"arguments": {"a": 1.5e3}, "name": "f"}</tool_call>',
        [("f", {"a": 1.5e3})],
        warnings=1,
    ),
    Golden(
        "string arguments", "hermes", hermes("weather", '"{\\"city\\": \\"Paris\\", \\"days\\": 3}"'), [W1]
    ),
    Golden("no arguments", "hermes", '<tool_call>{"name": "weather"}</tool_call>', [("weather", {})]),
    Golden("no close at the end", "hermes", hermes("weather", PARIS_JSON)[: -len("\n</tool_call>")], [W1]),
    Golden(
        "close forgotten",
        "hermes",
        hermes("weather", PARIS_JSON)[: -len("</tool_call>")] + hermes("write", ODD_JSON),
        [W1, W2],
    ),
    Golden(
        "single quotes",
        "hermes",
        "<tool_call>\n{'name': 'f'}\n</tool_call>",
        [],
        "<tool_call>\n{'name': 'f'}\n</tool_call>",
        warnings=1,
    ),
    Golden(
        "broken arguments",
        "hermes",
        hermes("weather", '{"city": Paris}') + "!",
        [],
        hermes("weather", '{"city": Paris}') + "!",
        warnings=1,
    ),
    Golden(
        "cut in the name",
        "hermes",
        '<tool_call>\n{"name": "wea',
        [],
        '<tool_call>\n{"name": "wea',
        finish="length",
        warnings=1,
    ),
    Golden(
        "no end",
        "hermes",
        '<tool_call>\n{"name": "weather", "arguments": {"city',
        [],
        '<tool_call>\n{"name": "weather", "arguments": {"city',
        warnings=1,
    ),
    Golden("only text", "hermes", " a <tool and <b> \n", [], " a <tool and <b> \n"),
    Golden(
        "broken, then good",
        "hermes",
        "<tool_call>oops " + hermes("weather", PARIS_JSON),
        [W1],
        "<tool_call>oops",
        warnings=1,
    ),
    Golden(
        "thought",
        "hermes",
        "<think>\nhm\n</think>\n\n" + hermes("weather", PARIS_JSON),
        [W1],
        reasoning="hm",
        think=True,
    ),
    Golden(
        "open thought", "hermes", "hm <b>\n</think>\n\nYes.", [], "Yes.", "hm <b>", think=True, opened=True
    ),
    Golden(
        "thought without end",
        "hermes",
        "hm\n" + hermes("weather", PARIS_JSON),
        [W1],
        reasoning="hm",
        think=True,
        opened=True,
    ),
    Golden("thought cut", "hermes", "<think>hm </th", [], "", "hm </th", finish="length", think=True),
    Golden("late think is text", "hermes", "Yes. <think>no", [], "Yes. <think>no", think=True),
    Golden(
        "call named in thought",
        "hermes",
        "a <tool_call> b</think>c",
        [],
        "c",
        "a <tool_call> b",
        think=True,
        opened=True,
        warnings=1,
    ),
    Golden("one", "qwen3-coder", coder("weather", city="Paris", days="3"), [W1]),
    Golden(
        "two",
        "qwen3-coder",
        coder("weather", city="Paris", days="3")
        + "\n"
        + coder(
            "write", path="é/☃ 🙂", text='a "b"\n</parameter> </tool_call> {', meta='{"x": [1, {"y": null}]}'
        ),
        [W1, W2],
    ),
    Golden(
        "no parameters",
        "qwen3-coder",
        "<tool_call>\n<function=weather>\n</function>\n</tool_call>",
        [("weather", {})],
    ),
    Golden(
        "wrong type",
        "qwen3-coder",
        coder("weather", city="7", days="many"),
        [("weather", {"city": "7", "days": "many"})],
        warnings=1,
    ),
    Golden(
        "thought without end",
        "qwen3-coder",
        "hm\n" + coder("weather", city="Paris", days="3"),
        [W1],
        reasoning="hm",
        think=True,
        opened=True,
    ),
    Golden(
        "cut",
        "qwen3-coder",
        coder("weather", city="Paris")[:-30],
        [],
        coder("weather", city="Paris")[:-30],
        warnings=1,
    ),
    Golden("dsml", "deepseek-dsml", DSML, [W1]),
    Golden("one", "deepseek-v3", deepseek(V3, ("weather", PARIS_JSON)), [W1]),
    Golden(
        "two",
        "deepseek-v3",
        "Ok." + deepseek(V3, ("weather", PARIS_JSON), ("write", ODD_JSON)),
        [W1, W2],
        "Ok.",
    ),
    Golden(
        "broken",
        "deepseek-v3",
        deepseek(V3, ("weather", "[1]")),
        [],
        deepseek(V3, ("weather", "[1]")),
        warnings=1,
    ),
    Golden("one", "deepseek-v3.1", deepseek(V31, ("weather", PARIS_JSON)), [W1]),
    Golden("two", "deepseek-v3.1", deepseek(V31, ("weather", PARIS_JSON), ("write", ODD_JSON)), [W1, W2]),
    Golden(
        "marker alone",
        "deepseek-v3.1",
        "<｜tool▁calls▁begin｜>no",
        [],
        "<｜tool▁calls▁begin｜>no",
        warnings=1,
    ),
    Golden("one", "mistral-v11", "[TOOL_CALLS]weather[ARGS]" + PARIS_JSON, [W1]),
    Golden(
        "two",
        "mistral-v11",
        f"[TOOL_CALLS]weather[ARGS]{PARIS_JSON}[TOOL_CALLS]write[CALL_ID]abc[ARGS]{ODD_JSON}",
        [W1, W2],
    ),
    Golden("no name", "mistral-v11", "[TOOL_CALLS]{}", [], "[TOOL_CALLS]{}", warnings=1),
    Golden("thought", "mistral-v11", "[THINK]hm[/THINK]Yes", [], "Yes", "hm", think=True),
    Golden(
        "two",
        "mistral",
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {PARIS_JSON}}}, '
        f'{{"name": "write", "arguments": {ODD_JSON}}}]',
        [W1, W2],
    ),
    Golden(
        "second broken",
        "mistral",
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {PARIS_JSON}}}, oops]',
        [W1],
        ", oops]",
        warnings=1,
    ),
    Golden("one", "llama3-json", '{"name": "weather", "parameters": ' + PARIS_JSON + "}", [W1]),
    Golden(
        "tag",
        "llama3-json",
        '<|python_tag|>{"type": "function", "name": "write", "parameters": ' + ODD_JSON + "}",
        [W2],
    ),
    Golden(
        "two",
        "llama3-json",
        f'{{"name": "weather", "parameters": {PARIS_JSON}}}; {{"name": "write", "parameters": {ODD_JSON}}}',
        [W1, W2],
    ),
    Golden(
        "built in",
        "llama3-json",
        '<|python_tag|>brave_search.call(query="é")',
        [("brave_search", {"query": "é"})],
        warnings=1,
    ),
    Golden("only json", "llama3-json", '{"answer": 42}', [], '{"answer": 42}'),
    Golden("other name", "llama3-json", '{"name": "Bob", "age": 3}', [], '{"name": "Bob", "age": 3}'),
    Golden("one", "pythonic", '[weather(city="Paris", days=3)]', [W1]),
    Golden(
        "two",
        "pythonic",
        "[weather(city='Paris', days=3), write(path=\"é/☃ 🙂\", "
        "text='a \"b\"\\n</parameter> </tool_call> {', meta={'x': [1, {'y': None}]})]",
        [W1, W2],
    ),
    Golden("only a list", "pythonic", "[1, 2] and [weather]", [], "[1, 2] and [weather]"),
    Golden("not a tool", "pythonic", "[f(x=1)]", [], "[f(x=1)]"),
    Golden("one", "harmony", HARMONY_CALL.format("weather", PARIS_JSON), [W1]),
    Golden(
        "thought, call",
        "harmony",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant" + HARMONY_CALL.format("write", ODD_JSON),
        [W2],
        reasoning="hm",
    ),
    Golden(
        "two",
        "harmony",
        HARMONY_CALL.format("weather", PARIS_JSON)
        + "<|end|><|start|>assistant"
        + HARMONY_CALL.format("write", ODD_JSON),
        [W1, W2],
    ),
    Golden(
        "answer",
        "harmony",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes. <|x|>",
        [],
        "Yes. <|x|>",
        "hm",
    ),
    Golden(
        "broken",
        "harmony",
        HARMONY_CALL.format("weather", "{'a'"),
        [],
        HARMONY_CALL.format("weather", "{'a'"),
        warnings=1,
    ),
    Golden("one", "generic", hermes("weather", PARIS_JSON), [W1]),
]
