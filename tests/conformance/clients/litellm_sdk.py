import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm
from common import KEY, SCHEMA, SHAPED, TEXT, TOOL, TOOLS, URL, raises, settled, shaped

HI = [{"role": "user", "content": "hi"}]
WAY = {"api_base": f"{URL}/v1", "api_key": KEY, "messages": HI, "max_retries": 0, "num_retries": 0}

answer = litellm.completion(model="openai/fake-1b", **WAY)
assert answer.choices[0].message.content == TEXT
stream = litellm.completion(model="openai/fake-1b", stream=True, **WAY)
assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == TEXT
if TOOLS:
    answer = litellm.completion(model="openai/toolish", tools=[TOOL], **WAY)
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"x":1}'
shape = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
answer = litellm.completion(model=f"openai/{SHAPED}", response_format=shape, **WAY)
shaped(json.loads(answer.choices[0].message.content))
stream = litellm.completion(model=f"openai/{SHAPED}", response_format=shape, stream=True, **WAY)
shaped(json.loads("".join(chunk.choices[0].delta.content or "" for chunk in stream)))
raises(litellm.BadRequestError, lambda: litellm.completion(model="openai/fake-1b", temperature=9, **WAY))
raises(litellm.NotFoundError, lambda: litellm.completion(model="openai/nope", **WAY))
raises(
    litellm.AuthenticationError,
    lambda: litellm.completion(model="openai/fake-1b", **WAY | {"api_key": "sk-wrong"}),
)
stream = litellm.completion(model="openai/slow", stream=True, **WAY)
for _, _chunk in zip(range(3), stream, strict=False):
    pass
stream.completion_stream.close()
settled("slow", "disconnected")
