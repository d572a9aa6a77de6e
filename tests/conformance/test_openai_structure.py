"""The official ``openai`` client and a real engine: structured output, tools, tool choice, streamed and not.

The model is tiny and random, so it says nothing sensible; but what a grammar enforces it must say.
"""

import json
from collections.abc import Iterator
from enum import Enum
from typing import Any

import openai
import pydantic
import pytest

from galley.audit.receipts import ReceiptStore
from galley.endpoint.app import build_app
from galley.model.model import Model
from galley.providers.local import LocalProvider
from galley.router.router import Router
from galley.runtime.backend import open_backend
from galley.runtime.engine import Engine
from tests.e2e.served import Served
from tests.tiny import CHATML, tiny_gguf

pytest.importorskip("llguidance")

HI = [{"role": "user", "content": "hi"}]
HERMES = (
    "{% if tools %}{{ '<|im_start|>system\n<tools>' + (tools | tojson) + '<tool_call><|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ '<tool_call>\n' + (c['function'] | tojson) + '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Zürich", "Bern"]},
                    "days": {"type": "integer", "maximum": 9},
                },
                "required": ["city", "days"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
CLOSE = {str(3 + ord(char)): 4 for char in '"]}0123456789'} | {"2": 9}
"""Bias that lets a random model come to an end; byte b has the id 3 + b, and 2 is the end token."""


class Colour(Enum):
    red = "red"
    blue = "blue"


class Thing(pydantic.BaseModel):
    name: str
    colours: list[Colour]
    size: int


class House:
    """A tiny model behind a real server."""

    def __init__(self, folder: Any, template: str) -> None:
        self.model = Model.open(
            tiny_gguf(folder / "m.gguf", vocab=420, context=2048, template=template), "tiny"
        )
        backend = open_backend("auto", self.model.gguf, self.model.spec, threads=1, num_blocks=512).backend
        self.engine = Engine(backend, eos_ids=self.model.tokenizer.eos_ids)
        self.engine.start()
        self.backend = backend
        self.store = ReceiptStore(folder / "receipts.db", batch_s=0.001)
        router = Router([LocalProvider(self.model, self.engine)], self.store)
        self.served = Served(build_app(router, self.store))

    def close(self) -> None:
        self.engine.close()
        self.backend.close()
        self.model.close()
        self.store.close()


@pytest.fixture(scope="module", params=["hermes", "none"])
def house(request, tmp_path_factory) -> Iterator[House]:
    """With a template that shows tools, and with one that knows nothing of them."""
    made = House(tmp_path_factory.mktemp("house"), HERMES if request.param == "hermes" else CHATML)
    with made.served:
        yield made
    made.close()


@pytest.fixture
def client(house) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{house.served.url}/v1", api_key="x", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, **more: Any) -> Any:
    body = {"model": "tiny", "messages": HI, "seed": 3, "max_tokens": 400, "logit_bias": CLOSE} | more
    return client.chat.completions.create(**body)


def test_parse_into_a_pydantic_model(client):
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="tiny", messages=HI, seed=seed, max_tokens=600, logit_bias=CLOSE, response_format=Thing
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Thing)


def test_streamed_structure_is_the_same_as_whole(client):
    shape = {
        "type": "json_schema",
        "json_schema": {"name": "t", "strict": True, "schema": Thing.model_json_schema()},
    }
    whole = ask(client, response_format=shape).choices[0].message.content
    chunks = list(ask(client, response_format=shape, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    Thing.model_validate_json(whole)


def test_several_choices_each_have_their_own_grammar(client):
    shape = {
        "type": "json_schema",
        "json_schema": {"name": "t", "strict": True, "schema": Thing.model_json_schema()},
    }
    answer = ask(client, n=3, response_format=shape, logprobs=True, top_logprobs=1, temperature=1.5)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) > 1
    for choice in answer.choices:
        if choice.finish_reason == "stop":
            Thing.model_validate_json(choice.message.content)
        raw = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        assert raw.decode() == choice.message.content, "a log-probability for every token, forced ones too"


def test_max_tokens_within_an_object_is_length(client):
    shape = {
        "type": "json_schema",
        "json_schema": {"name": "t", "strict": True, "schema": Thing.model_json_schema()},
    }
    cut = ask(client, response_format=shape, max_tokens=3).choices[0]
    assert cut.finish_reason == "length" and cut.message.content.startswith('{"')
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="tiny", messages=HI, max_tokens=3, response_format=Thing)


def test_vllm_fields(client):
    for extra, check in (
        ({"guided_choice": ["ja", "nein"]}, lambda t: t in ("ja", "nein")),
        ({"guided_regex": "[0-9]{4}"}, lambda t: len(t) == 4 and t.isdigit()),
        ({"structured_outputs": {"grammar": 'start: "a" "b"+ "c"'}}, lambda t: t.startswith("ab")),
        ({"structured_outputs": {"json": Thing.model_json_schema()}}, Thing.model_validate_json),
    ):
        assert check(ask(client, extra_body=extra).choices[0].message.content)
    done = client.completions.create(model="tiny", prompt="x", extra_body={"guided_choice": ["ja"]})
    assert done.choices[0].text == "ja" and done.choices[0].finish_reason == "stop"


def test_what_cannot_be_enforced_is_a_bad_request_naming_its_path(client, house):
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    shape = {"type": "json_schema", "json_schema": {"name": "t", "strict": True, "schema": schema}}
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, response_format=shape)
    assert bad.value.code == "invalid_json_schema"
    assert bad.value.param == "response_format.json_schema.schema.properties.a.not"
    shape["json_schema"]["strict"] = False
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=HI, max_tokens=5, response_format=shape
    )
    assert "properties.a.not: not enforced" in raw.headers["x-galley-clamped"]
    receipt = client.get(f"/receipts/{raw.headers['x-galley-receipt']}", cast_to=dict)
    assert receipt["clamped"]["response_format.json_schema.schema.properties.a.not"] == "not enforced"
    assert set(receipt["params"]["structured_outputs"]) == {"sha256"}
    for more in ({"guided_regex": "("}, {"guided_regex": "a", "guided_choice": ["a"]}, {"guided_json": 3}):
        with pytest.raises(openai.BadRequestError):
            ask(client, extra_body=more)
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, response_format={"type": "json_object"}, extra_body={"min_tokens": 3})
    assert bad.value.param == "min_tokens"


def check_call(call: Any) -> None:
    arguments = json.loads(call.function.arguments)
    if call.function.name == "now":
        assert arguments == {}
    else:
        assert call.function.name == "weather"
        assert arguments["city"] in ("Zürich", "Bern") and arguments["days"] <= 9


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_that_is_required_comes_and_fits_its_schema(client, choice, parallel):
    for seed in range(3):
        answer = ask(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel, seed=seed)
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls" and message.content is None
        calls = message.tool_calls
        assert len({call.id for call in calls}) == len(calls) and all(c.id.startswith("call_") for c in calls)
        if not parallel or choice != "required":
            assert len(calls) == 1
        if choice != "required":
            assert calls[0].function.name == "weather"
        for call in calls:
            check_call(call)


def test_streamed_calls_come_as_openai_sends_them(client):
    whole = ask(client, tools=TOOLS, tool_choice="required").choices[0].message
    chunks = list(ask(client, tools=TOOLS, tool_choice="required", stream=True))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    told: dict[int, list] = {}
    for chunk in chunks:
        assert not chunk.choices[0].delta.content
        for piece in chunk.choices[0].delta.tool_calls or ():
            told.setdefault(piece.index, []).append(piece)
    assert sorted(told) == list(range(len(whole.tool_calls)))
    for index, pieces in told.items():
        first, *rest = pieces
        assert first.id and first.type == "function" and first.function.name
        assert all(piece.id is None and piece.function.name is None for piece in rest)
        arguments = "".join(piece.function.arguments for piece in pieces)
        assert arguments == whole.tool_calls[index].function.arguments
        assert first.function.name == whole.tool_calls[index].function.name


def test_the_stream_helper_assembles_the_calls(client):
    with client.chat.completions.stream(
        model="tiny",
        messages=HI,
        seed=3,
        max_tokens=400,
        logit_bias=CLOSE,
        tools=TOOLS,
        tool_choice="required",
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    for call in final.choices[0].message.tool_calls:
        check_call(call)


def test_auto_and_none_leave_the_answer_free(client, house):
    for choice in ("auto", "none"):
        answer = ask(client, tools=TOOLS, tool_choice=choice, max_tokens=30, logit_bias={}).choices[0]
        assert not answer.message.tool_calls and isinstance(answer.message.content, str)


def test_auto_with_a_form_gives_a_call_or_the_form(client):
    shape = {
        "type": "json_schema",
        "json_schema": {"name": "t", "strict": True, "schema": {"enum": ["a", "b"]}},
    }
    for seed in range(6):
        message = ask(client, tools=TOOLS, response_format=shape, seed=seed).choices[0].message
        if message.tool_calls:
            assert message.content is None
            check_call(message.tool_calls[0])
        else:
            assert json.loads(message.content) in ("a", "b")


def test_a_conversation_with_calls_and_results_goes_on(client, house):
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    turns = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=turns, tools=TOOLS, max_tokens=5
    )
    assert raw.parse().usage.prompt_tokens > 100
    clamped = raw.headers.get("x-galley-clamped", "")
    spoken = house.model.template.source == CHATML
    assert ("tools: described in the system message" in clamped) == spoken
    assert ("messages: tool calls and results put in words" in clamped) == spoken


@pytest.mark.parametrize(
    ("more", "param"),
    [
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}},
            "tool_choice",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [*TOOLS, TOOLS[1]]}, "tools[2].function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
    ],
)
def test_bad_tools_are_bad_requests(client, more, param):
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, **more)
    assert bad.value.param == param


def test_reasoning_is_bounded_and_the_answer_goes_on(tmp_path):
    """The same tokens, whether the closing marker is forced or, for its log-probability, drawn."""
    house = House(tmp_path, CHATML.replace("assistant\n", "assistant\n<think>\n"))
    with house.served, openai.OpenAI(base_url=f"{house.served.url}/v1", api_key="x", max_retries=0) as client:
        body = {"model": "tiny", "messages": HI, "seed": 3, "max_tokens": 60}
        extra = {"thinking_token_budget": 5, "return_token_ids": True, "ignore_eos": True}
        raw = client.chat.completions.with_raw_response.create(**body, extra_body=extra)
        answer = raw.parse()
        close = len(house.model.tokenizer.encode("</think>"))
        assert answer.usage.completion_tokens_details.reasoning_tokens == 5 + close
        assert answer.choices[0].message.content and answer.choices[0].message.reasoning_content
        assert "at most 5 reasoning tokens" in raw.headers["x-galley-clamped"]
        drawn = client.chat.completions.create(**body, logprobs=True, extra_body=extra)
        assert drawn.choices[0].token_ids == answer.choices[0].token_ids
        none = client.chat.completions.create(
            **body, reasoning_effort="none", extra_body={"ignore_eos": True}
        )
        assert (
            not getattr(none.choices[0].message, "reasoning_content", None)
            and none.choices[0].message.content
        )
    house.close()
