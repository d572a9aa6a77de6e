import openai
from common import KEY, SCHEMA, SHAPED, TEXT, TOOL, TOOLS, URL, raises, settled, shaped
from langchain_openai import ChatOpenAI


def model(name: str, **more) -> ChatOpenAI:
    return ChatOpenAI(model=name, base_url=f"{URL}/v1", api_key=more.pop("key", KEY), max_retries=0, **more)


assert model("fake-1b").invoke("hi").content == TEXT
assert "".join(chunk.content for chunk in model("fake-1b").stream("hi")) == TEXT
assert model("fake-1b", use_responses_api=True).invoke("hi").text == TEXT
if TOOLS:
    answer = model("toolish").bind_tools([TOOL]).invoke("hi")
    assert answer.tool_calls[0]["args"] == {"x": 1}
for method in ("json_schema", "function_calling"):
    structured = model(SHAPED).with_structured_output(
        {"title": "thing", "description": "A thing.", **SCHEMA}, method=method, strict=True
    )
    shaped(structured.invoke("hi"))
structured = model(SHAPED, use_responses_api=True).with_structured_output(
    {"title": "thing", "description": "A thing.", **SCHEMA}, method="json_schema", strict=True
)
shaped(structured.invoke("hi"))
raises(openai.BadRequestError, lambda: model("fake-1b", temperature=9).invoke("hi"))
raises(openai.NotFoundError, lambda: model("nope").invoke("hi"))
raises(openai.AuthenticationError, lambda: model("fake-1b", key="sk-wrong").invoke("hi"))
stream = model("slow").stream("hi")
for _, _chunk in zip(range(3), stream, strict=False):
    pass
stream.close()
settled("slow", "disconnected")
