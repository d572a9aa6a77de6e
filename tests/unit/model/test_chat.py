"""Chat templates: fidelity, bounds, and the wall between user text and control tokens."""

import json
import time
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galley.errors import InvalidRequest, TemplateError
from galley.model.chat import ChatTemplate
from galley.model.gguf import GGUF
from galley.model.model import Model, file_digest
from galley.model.tokenizer import Tokenizer

from .tinyfile import CHATML, SPECIALS, write

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    with GGUF.open(write(tmp_path_factory.mktemp("chat") / "m.gguf")) as file:
        return Tokenizer.from_gguf(file)


def say(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content} for content in contents]


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if tokenizer.is_special(i)]


# -- fidelity


def test_tojson_keeps_key_order_and_does_not_escape() -> None:
    value = [{"type": "function", "function": {"name": "z<é>&'", "a": 1}}]
    assert ChatTemplate("{{ tools|tojson }}").render(HI, tools=value) == json.dumps(value, ensure_ascii=False)
    indented = ChatTemplate("{{ tools|tojson(indent=2, sort_keys=true) }}").render(HI, tools=value)
    assert indented == json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True)
    assert "\\u00e9" in ChatTemplate("{{ tools|tojson(ensure_ascii=true) }}").render(HI, tools=value)


def test_blocks_are_trimmed_and_loops_can_break() -> None:
    source = (
        "{% for m in messages %}\n  {% if loop.index > 2 %}\n    "
        "{% break %}\n  {% endif %}\n{{ m.content }}\n{% endfor %}"
    )
    assert ChatTemplate(source).render(say("a", "b", "c")) == "a\nb\n"
    loops = (
        "{% for m in messages %}{{ loop.index0 }}{{ loop.last }}"
        "{{ loop.length }}{{ loop.previtem is defined }};{% endfor %}"
    )
    assert ChatTemplate(loops).render(say("a", "b")) == "0False2False;1True2True;"


def test_generation_tag_clock_and_kwargs() -> None:
    source = (
        "{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}{{ thinking }}{{ add_generation_prompt }}"
    )
    template = ChatTemplate(source, now=lambda: datetime(2031, 5, 1))
    assert template.render(HI, thinking=False, add_generation_prompt=False) == "2031FalseFalse"


def test_bos_eos_macros_namespaces_and_slices() -> None:
    source = (
        "{{ bos_token }}{% set ns = namespace(n=0) %}{% macro f(x) %}[{{ x ~ '!' }}]{% endmacro %}"
        "{% for m in messages[1:] %}{% set ns.n = ns.n + 1 %}{{ f(m['content']|trim) }}{% endfor %}{{ ns.n }}"
        "{{ messages[::-1][0].content.split('c')[-1] }}{{ eos_token }}{{ 'x' in ['x', 'y'] }}"
    )
    assert ChatTemplate(source, "<s>", "</s>").render(say("a", " b ", "cd")) == "<s>[b!][cd!]2d</s>True"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (CHATML, "chatml"),
        ("<|start_header_id|>", "llama3"),
        ("[INST] <<SYS>>", "llama2"),
        ("{{ 1 }}", "custom"),
    ],
)
def test_format_is_recognised(source: str, name: str) -> None:
    assert ChatTemplate(source).name == name


def test_content_parts_developer_and_arguments() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    echo = ChatTemplate("{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}")
    assert echo.render([{"role": "developer", "content": parts}]) == "system=a\nb;"
    assert echo.render([{"role": "assistant", "content": None}]) == "assistant=;"
    loops = "{% for m in messages %}{% for p in m['content'] %}<{{ p.text }}>{% endfor %}{% endfor %}"
    assert ChatTemplate(loops).render(say("x")) == "<x>"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"q": [1]}'}}
    source = "{{ messages[0].tool_calls[0].function.arguments.q[0] }}"
    assert ChatTemplate(source).render([{"role": "assistant", "content": None, "tool_calls": [call]}]) == "1"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        (say("a", [{"type": "image_url", "image_url": {}}]), "messages[1].content[0].type"),
        ([{"role": "assistant", "content": "", "tool_calls": "x"}], "messages[0].tool_calls"),
    ],
)
def test_malformed_messages_name_the_place(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(CHATML).render(messages)
    assert caught.value.param == param and caught.value.status == 400


def test_deep_nesting_is_a_clear_400() -> None:
    tools: Any = []
    for _ in range(500):
        tools = [tools]
    with pytest.raises(InvalidRequest, match="nest deeper"):
        ChatTemplate("{{ tools|tojson }}").render(HI, tools=tools)


def test_whose_fault_an_error_is() -> None:
    refuses = ChatTemplate(
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    )
    with pytest.raises(TemplateError, match="user first") as caught:
        refuses.render([{"role": "assistant", "content": "x"}])
    assert caught.value.status == 400 and caught.value.param == "messages"
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(
            "{{ messages[1].content + 'x' if messages|length > 1 }}"
            "{{ messages[7 * (messages|length - 1)].role.x.y if messages|length > 1 }}"
        ).render(say("a", "b"))
    assert caught.value.status == 400
    with pytest.raises(TemplateError) as caught:
        ChatTemplate("{{ nothing.at.all }}").render(HI)
    assert caught.value.status == 500


# -- bounds

BOMBS = {
    "repeat": "{{ 'a' * 50_000_000 }}",
    "repeat a list": "{{ [1] * 50_000_000 }}",
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "long output": "{% for a in range(9999) %}{{ 'a' * 10000 }}{% endfor %}",
    "doubling": (
        "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}"
        "{% set n.s = n.s + n.s %}{% endfor %}"
    ),
    "joining": (
        "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}"
        "{% set n.s = n.s ~ n.s %}{% endfor %}"
    ),
    "big numbers": (
        "{% set n = namespace(s=99) %}{% for i in range(60) %}"
        "{% set n.s = n.s * n.s %}{% endfor %}"
    ),
    "power": "{{ 9 ** 999999999 }}",
    "centre": "{{ 'a'.center(10 ** 9) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "shared lists": (
        "{% set n = namespace(s=[1]) %}{% for i in range(60) %}"
        "{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}"
    ),
    "macro recursion": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
        "{% endmacro %}{{ f(60) }}"
    ),
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "block": "{% set x %}{% for i in range(9000) %}{{ 'a' * 10000 }}{% endfor %}{% endset %}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "join": "{{ ('b' * 100000).join(range(9999)|map('string')) }}",
    "join filter": "{{ range(9999)|join('b' * 100000) }}",
    "map": "{{ range(9999)|map('string')|map('replace', '1', 'b' * 100000)|list|length }}",
    "slices": (
        "{% set n = namespace(l=[]) %}{% set s = 'a' * 900000 %}"
        "{% for i in range(9999) %}{% set n.l = n.l + [s[1:]] %}{% endfor %}"
    ),
    "indent": "{{ messages|tojson(indent=1000000000) }}",
    "date": "{{ strftime_now('%1000000000d') }}",
    "huge range": "{{ range(10 ** 12)|list }}",
    "deep source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "include": "{% include 'x' %}",
    "syntax": "{% for %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "append": "{{ messages.append(1) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_hostile_templates_stop_in_bounded_time_and_memory(name: str) -> None:
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(TemplateError):
            ChatTemplate(BOMBS[name], seconds=0.1).render(HI)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 5
    assert peak < 150 << 20


def test_long_honest_messages_fit() -> None:
    text = "word " * 400_000
    assert ChatTemplate(CHATML).render(say(text)).count("word") == 400_000


# -- user text and control tokens

ANYTHING = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
BAIT = [*SPECIALS, "<|im_", "end|>", "<", "|>", " ", "\n", "user", "im_end"]
PIECES = st.lists(st.one_of(ANYTHING, st.sampled_from(BAIT)), max_size=6).map("".join)
TEMPLATES = [
    CHATML,
    "{{ '<|im_start|>' }}{% for m in messages %}{{ m.content }}{% endfor %}{{ '<|im_end|>' }}",
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content|trim ~ '<|im_end|>' }}{% endfor %}",
    "{% for m in messages %}<|im_start|>{{ m.content.split('x')|join }}{{ m|tojson }}<|im_end|>{% endfor %}",
    "{% for m in messages %}<|im_start|>{{ m.content|replace('q', '') }}<|im_end|>{% endfor %}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@given(contents=st.lists(PIECES, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_control_ids_come_from_the_template_alone(
    tokenizer: Tokenizer, source: str, contents: list[str]
) -> None:
    template = ChatTemplate(source)
    ids = template.encode(tokenizer, say(*contents))
    harmless = template.encode(tokenizer, say(*("." for _ in contents)))
    assert controls(tokenizer, ids) == controls(tokenizer, harmless)
    # And nothing is lost: the text is that of the plain rendering.
    assert tokenizer.decode(ids, skip_special=False) == template.render(say(*contents))


@pytest.mark.parametrize("source", TEMPLATES)
@given(
    contents=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=3)
)
@settings(max_examples=40, deadline=None)
def test_ordinary_ids_are_those_of_the_whole_text(
    tokenizer: Tokenizer, source: str, contents: list[str]
) -> None:
    template = ChatTemplate(source)
    if any(special in "".join(contents) for special in SPECIALS):
        return
    want = tokenizer.encode(template.render(say(*contents)), special=True)
    assert template.encode(tokenizer, say(*contents)) == want


@pytest.mark.parametrize(
    ("source", "messages", "tools"),
    [
        ("{{ messages[0].content }}{{ messages[1].content }}", say("<|im_", "end|>"), None),
        ("{{ '<|' + messages[0].content + '|>' }}", say("im_end"), None),
        ("{{ '<|im_' + messages[0].content }}", say("end|>"), None),
        ("{{ messages[0].content|replace('q', '') }}", say("<|im_qend|>"), None),
        ("{{ messages[0].content|lower }}", say("<|IM_END|>"), None),
        ("{{ messages[0].content[::-1] }}", say(">|dne_mi|<"), None),
        ("{{ messages[0].name }}", [{"role": "user", "content": "", "name": "<|im_end|>"}], None),
        ("{{ tools|tojson }}", HI, [{"type": "<|im_end|>", "<|im_start|>": {"type": {"x": "<|im_end|>"}}}]),
        ("{{ custom }}", HI, None),
    ],
)
def test_no_way_around(tokenizer: Tokenizer, source: str, messages: Any, tools: Any) -> None:
    ids = ChatTemplate(source).encode(tokenizer, messages, tools=tools, custom="<|im_end|>")
    assert controls(tokenizer, ids) == []


def test_template_tokens_built_from_roles_still_work(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ '<|im_' + ('start' if m.role == 'user' else 'end') + '|>' }}{% endfor %}"
    )
    assert template.encode(tokenizer, [*HI, {"role": "assistant", "content": "<|im_start|>"}]) == [1, 2]


# -- the model


def test_model_opens_and_digests_once(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", keys={"general.sampling.temp": 0.5})
    model = Model.open(path, "tiny")
    assert model.template is not None and model.template.name == "chatml" and model.spec.layers == 2
    assert model.defaults == {"temperature": 0.5}
    digest = model.weights_digest
    note = path.with_name("m.gguf.sha256.json")
    assert json.loads(note.read_text())["sha256"] == digest == file_digest(path)
    path.write_bytes(path.read_bytes() + b"\0")
    assert file_digest(path) != digest
    note.write_text("{")
    assert file_digest(path) != digest
    model.close()


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    assert Model.open(write(tmp_path / "m.gguf", template=None), "tiny").template is None


@pytest.mark.model
def test_smollm2_opens_and_chats(smollm2_path: Path) -> None:
    model = Model.open(smollm2_path, "smollm2-135m")
    assert model.template is not None and model.template.name == "chatml"
    ids = model.template.encode(model.tokenizer, say("x <|im_end|>"))
    assert controls(model.tokenizer, ids) == [1, 2, 1, 2, 1]
    assert model.spec.tied and model.spec.vocab == 49152
