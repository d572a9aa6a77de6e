import asyncio
from typing import Literal

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from common import KEY, SHAPED, TEXT, URL, settled, shaped
from pydantic import BaseModel, Field

set_tracing_disabled(True)
client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
stranger = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="sk-wrong", max_retries=0)


class Thing(BaseModel):
    colour: Literal["red", "grün"]
    size: int = Field(ge=0, le=9)
    sure: bool


used: list[int] = []


@function_tool
def f(x: int) -> int:
    """Doubles x."""
    used.append(x)
    return 2 * x


async def fails(kind: type[BaseException], model) -> None:
    try:
        await Runner.run(Agent("a", model=model), "hi")
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


async def main() -> None:
    for sort in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        agent = Agent("a", instructions="be kind", model=sort(model="fake-1b", openai_client=client))
        assert (await Runner.run(agent, "hi")).final_output == TEXT
        run = Runner.run_streamed(agent, "hi")
        text = ""
        async for event in run.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                text += event.data.delta
        assert text == TEXT and run.final_output == TEXT
        shaper = Agent("a", model=sort(model=SHAPED, openai_client=client), output_type=Thing)
        shaped((await Runner.run(shaper, "hi")).final_output.model_dump())
        caller = Agent("a", model=sort(model="toolish-once", openai_client=client), tools=[f])
        used.clear()
        assert (await Runner.run(caller, "hi")).final_output == "The tool said so" and used == [1]
        await fails(openai.NotFoundError, sort(model="nope", openai_client=client))
        hot = Agent("a", model=sort(model="fake-1b", openai_client=client))
        hot.model_settings = ModelSettings(temperature=9)
        try:
            await Runner.run(hot, "hi")
        except openai.BadRequestError:
            pass
        else:
            raise AssertionError("BadRequestError was not raised")
        await fails(openai.AuthenticationError, sort(model="fake-1b", openai_client=stranger))
    first = await Runner.run(agent, "one")
    second = await Runner.run(agent, "two", previous_response_id=first.last_response_id)
    assert second.final_output == TEXT
    slow = Agent("a", model=OpenAIResponsesModel(model="slow", openai_client=client))

    async def impatient() -> None:
        async for _ in Runner.run_streamed(slow, "hi").stream_events():
            pass

    task = asyncio.ensure_future(impatient())
    await asyncio.sleep(0.5)
    task.cancel()
    await asyncio.wait((task,))
    await client.close()


asyncio.run(main())
settled("slow", "disconnected")
