import openai
from common import KEY, TEXT, TOOL, TOOLS, URL, raises, settled
from langchain_openai import ChatOpenAI


def model(name: str, **more) -> ChatOpenAI:
    return ChatOpenAI(model=name, base_url=f"{URL}/v1", api_key=more.pop("key", KEY), max_retries=0, **more)


assert model("fake-1b").invoke("hi").content == TEXT
assert "".join(chunk.content for chunk in model("fake-1b").stream("hi")) == TEXT
assert model("fake-1b", use_responses_api=True).invoke("hi").text == TEXT
if TOOLS:
    answer = model("toolish").bind_tools([TOOL]).invoke("hi")
    assert answer.tool_calls[0]["args"] == {"x": 1}
raises(openai.BadRequestError, lambda: model("fake-1b", temperature=9).invoke("hi"))
raises(openai.NotFoundError, lambda: model("nope").invoke("hi"))
raises(openai.AuthenticationError, lambda: model("fake-1b", key="sk-wrong").invoke("hi"))
stream = model("slow").stream("hi")
for _, _chunk in zip(range(3), stream, strict=False):
    pass
stream.close()
settled("slow", "disconnected")
