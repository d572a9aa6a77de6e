from typing import Literal

import anthropic
from common import KEY, SCHEMA, SHAPED, TEXT, TOOL, TOOLS, URL, raises, settled, shaped, tried_once
from pydantic import BaseModel


class Thing(BaseModel):
    colour: Literal["red", "grün"]
    size: Literal[0, 1, 2]
    sure: bool


client = anthropic.Anthropic(base_url=URL, api_key=KEY)
HI = [{"role": "user", "content": "hi"}]
ASK = {"max_tokens": 20, "messages": HI}

message = client.messages.create(model="fake-1b", system="be kind", stop_sequences=["END"], **ASK)
assert message.content[0].text == TEXT and message.stop_reason == "end_turn"
assert message.usage.output_tokens == 3 and message._request_id
with client.messages.stream(model="fake-1b", **ASK) as stream:
    assert "".join(stream.text_stream) == TEXT
    final = stream.get_final_message()
assert final.stop_reason == "end_turn" and final.usage.output_tokens == 3
assert client.messages.count_tokens(model="fake-1b", messages=HI).input_tokens == 8
with client.messages.stream(model="toolish", **ASK) as stream:
    for _ in stream:
        pass
    final = stream.get_final_message()
assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
assert final.content[2].input == {"x": 1} and final.stop_reason == "tool_use"
if TOOLS:
    tool = {"name": "f", "input_schema": TOOL["function"]["parameters"]}
    final = client.messages.create(model="toolish", tools=[tool], **ASK)
    assert final.content[2].name == "f"
# structured output, and a call that must be made
ONE = {"type": "any", "disable_parallel_tool_use": True}
roomy = ASK | {"max_tokens": 200}
shaped(client.messages.parse(model=SHAPED, output_format=Thing, **roomy).parsed_output.model_dump())
with client.messages.stream(model=SHAPED, output_format=Thing, **roomy) as stream:
    for _ in stream:
        pass
    shaped(stream.get_final_message().parsed_output.model_dump())
made = client.messages.create(
    model=SHAPED, tools=[{"name": "f", "input_schema": SCHEMA}], tool_choice=ONE, **roomy
)
assert made.stop_reason == "tool_use" and made.content[-1].name == "f", made
shaped(made.content[-1].input)
assert next(iter(client.models.list())).id == "fake-1b"

error = raises(
    anthropic.BadRequestError,
    lambda: client.messages.create(model="fake-1b", extra_body={"temperature": 1.5}, **ASK),
)
assert error.body["error"]["type"] == "invalid_request_error"
raises(anthropic.NotFoundError, lambda: client.messages.create(model="nope", **ASK))
stranger = anthropic.Anthropic(base_url=URL, api_key="sk-wrong")
raises(anthropic.AuthenticationError, lambda: stranger.messages.create(model="fake-1b", **ASK))
error = raises(
    anthropic.APIStatusError, lambda: client.with_options(max_retries=0).messages.create(model="busy", **ASK)
)
assert error.status_code == 529
tried_once(lambda: client.messages.create(model="broken", **ASK))

stream = client.messages.create(model="slow", stream=True, **ASK)
for _, _event in zip(range(4), stream, strict=False):
    pass
stream.close()
settled("slow", "disconnected")
