import json

import ollama
from common import KEY, SCHEMA, SHAPED, TEXT, URL, raises, settled, shaped, tried_once

client = ollama.Client(host=URL, headers={"authorization": f"Bearer {KEY}"})
HI = [{"role": "user", "content": "hi"}]

# chat and generate, whole and streamed
answer = client.chat("fake-1b", HI)
assert answer.message.content == TEXT and answer.done and answer.done_reason == "stop"
assert answer.eval_count == 3 and answer.total_duration > 0
parts = list(client.chat("fake-1b", HI, stream=True))
assert "".join(part.message.content for part in parts) == TEXT and parts[-1].done
assert client.generate("fake-1b", "hi", system="be kind").response == TEXT
assert "".join(part.response for part in client.generate("fake-1b", "hi", stream=True)) == TEXT
limited = client.chat("fake-1b", HI, options=ollama.Options(num_predict=1, temperature=0.2, seed=3))
assert limited.done_reason == "length" and limited.eval_count == 1
assert client.generate("fake-1b", "").done_reason == "load"


# tools
def f(x: int) -> int:
    """Doubles x.

    Args:
        x: what to double.
    """
    return 2 * x


turns = list(HI)
for _ in range(3):
    answer = client.chat("toolish-once", turns, tools=[f])
    turns.append(answer.message)
    if not answer.message.tool_calls:
        break
    for call in answer.message.tool_calls:
        assert call.function.name == "f" and call.function.arguments == {"x": 1}
        turns.append({"role": "tool", "tool_name": "f", "content": str(f(**call.function.arguments))})
assert answer.message.content == "The tool said so"
parts = list(client.chat("toolish", HI, stream=True))
assert "".join(part.message.thinking or "" for part in parts) == "Hm."
assert [call.function.name for part in parts for call in part.message.tool_calls or ()] == ["f"]

# structured output
shaped(json.loads(client.chat(SHAPED, HI, format=SCHEMA).message.content))
parts = client.chat(SHAPED, HI, format=SCHEMA, stream=True)
shaped(json.loads("".join(part.message.content for part in parts)))
shaped(json.loads(client.generate(SHAPED, "hi", format=SCHEMA).response))

# pages
assert "fake-1b" in [model.model for model in client.list().models]
assert SHAPED in [model.model for model in client.ps().models]
assert "completion" in client.show("fake-1b").capabilities

# errors
error = raises(ollama.ResponseError, lambda: client.chat("nope", HI))
assert error.status_code == 404 and "does not exist here" in error.error
error = raises(ollama.ResponseError, lambda: client.chat("fake-1b", HI, options={"mirostat": 1}))
assert error.status_code == 400 and "options.mirostat" in error.error
stranger = ollama.Client(host=URL, headers={"authorization": "Bearer sk-wrong"})
assert raises(ollama.ResponseError, lambda: stranger.chat("fake-1b", HI)).status_code == 401
assert raises(ollama.ResponseError, lambda: client.chat("busy", HI)).status_code == 503
tried_once(lambda: client.chat("broken", HI))

# disconnect
stream = client.chat("slow", HI, stream=True)
for _, _part in zip(range(3), stream, strict=False):
    pass
stream.close()
settled("slow", "disconnected")
