import json
from typing import Literal

import openai
from common import KEY, SCHEMA, SHAPED, TEXT, TOOL, TOOLS, URL, raises, settled, shaped, tried_once
from pydantic import BaseModel, Field


class Thing(BaseModel):
    colour: Literal["red", "grün"]
    size: int = Field(ge=0, le=9)
    sure: bool


CALLED = {"type": "function", "function": {"name": "f", "strict": True, "parameters": SCHEMA}}
UNENFORCEABLE = {
    "type": "json_schema",
    "json_schema": {
        "name": "x",
        "strict": True,
        "schema": {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
    },
}

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)
HI = [{"role": "user", "content": "hi"}]

# chat completions
stream = client.chat.completions.create(model="fake-1b", messages=HI, stream=True)
assert "".join(c.choices[0].delta.content or "" for c in stream) == TEXT
if TOOLS:
    answer = client.chat.completions.create(model="toolish", messages=HI, tools=[TOOL])
    call = answer.choices[0].message.tool_calls[0]
    assert (call.function.name, call.function.arguments) == ("f", '{"x":1}')
    assert answer.choices[0].finish_reason == "tool_calls"

# structured output
thing = client.chat.completions.parse(model=SHAPED, messages=HI, response_format=Thing)
shaped(thing.choices[0].message.parsed.model_dump())
with client.chat.completions.stream(model=SHAPED, messages=HI, response_format=Thing) as events:
    for _ in events:
        pass
    shaped(events.get_final_completion().choices[0].message.parsed.model_dump())
shaped(client.responses.parse(model=SHAPED, input="hi", text_format=Thing).output_parsed.model_dump())
with client.responses.stream(model=SHAPED, input="hi", text_format=Thing) as events:
    for _ in events:
        pass
    shaped(events.get_final_response().output_parsed.model_dump())
named = {"type": "function", "function": {"name": "f"}}
called = client.chat.completions.create(model=SHAPED, messages=HI, tools=[CALLED], tool_choice=named)
shaped(json.loads(called.choices[0].message.tool_calls[0].function.arguments))
error = raises(
    openai.BadRequestError,
    lambda: client.chat.completions.create(model=SHAPED, messages=HI, response_format=UNENFORCEABLE),
)
assert error.code == "invalid_json_schema" and error.param.endswith("schema.properties.a.uniqueItems"), (
    error.body
)

# responses
answer = client.responses.create(model="fake-1b", input="hi")
assert answer.output_text == TEXT and answer.usage.total_tokens > 0
more = client.responses.create(model="fake-1b", input="more", previous_response_id=answer.id)
assert client.responses.retrieve(more.id).previous_response_id == answer.id
assert [i.type for i in client.responses.input_items.list(more.id)] == ["message"]
with client.responses.stream(model="fake-1b", input="hi") as events:
    kinds = [event.type for event in events]
    assert events.get_final_response().output_text == TEXT
assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
calls = client.responses.create(model="toolish", input="hi")
assert [item.type for item in calls.output] == ["reasoning", "message", "function_call"]
with client.responses.stream(model="toolish", input="hi") as events:
    for _ in events:
        pass
    assert events.get_final_response().output[2].arguments == '{"x":1}'
background = client.responses.create(model="slow", input="hi", background=True)
assert client.responses.cancel(background.id).status == "cancelled"
client.responses.delete(more.id)
raises(openai.NotFoundError, lambda: client.responses.retrieve(more.id))
assert client.responses.input_tokens.count(model="fake-1b", input="hi").input_tokens == 8

# stored completions, files, batches
kept = client.chat.completions.create(model="fake-1b", messages=HI, store=True, metadata={"a": "b"})
assert client.chat.completions.retrieve(kept.id).choices[0].message.content == TEXT
assert [c.id for c in client.chat.completions.list(metadata={"a": "b"})] == [kept.id]
line = b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"fake-1b","prompt":"x"}}\n'
file = client.files.create(file=("in.jsonl", line), purpose="batch")
batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
import time  # noqa: E402

for _ in range(500):
    batch = client.batches.retrieve(batch.id)
    if batch.status == "completed":
        break
    time.sleep(0.02)
assert batch.request_counts.completed == 1, batch
assert TEXT in client.files.content(batch.output_file_id).content.decode().encode().decode()
assert batch.id in [b.id for b in client.batches.list()]

# errors
error = raises(
    openai.BadRequestError, lambda: client.responses.create(model="fake-1b", input="hi", temperature=9)
)
assert error.param == "temperature"
raises(openai.NotFoundError, lambda: client.responses.create(model="nope", input="hi"))
stranger = openai.OpenAI(base_url=f"{URL}/v1", api_key="sk-wrong")
raises(openai.AuthenticationError, lambda: stranger.responses.create(model="fake-1b", input="hi"))
busy = client.with_options(max_retries=0)
raises(openai.InternalServerError, lambda: busy.responses.create(model="busy", input="hi"))
tried_once(lambda: client.responses.create(model="broken", input="hi"))

# disconnect
stream = client.responses.create(model="slow", input="hi", stream=True)
for _, _event in zip(range(6), stream, strict=False):
    pass
stream.close()
settled("slow", "disconnected")
