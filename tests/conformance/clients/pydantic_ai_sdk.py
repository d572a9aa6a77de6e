import asyncio
import contextlib
from typing import Literal

from common import KEY, SHAPED, TEXT, TOOLS, URL, settled, shaped
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Thing(BaseModel):
    colour: Literal["red", "grün"]
    size: int = Field(ge=0, le=9)
    sure: bool


class Enough(Exception):
    """The tool was called."""


def provider(key: str = KEY) -> OpenAIProvider:
    return OpenAIProvider(base_url=f"{URL}/v1", api_key=key)


async def status(agent: Agent) -> int:
    try:
        await agent.run("hi")
    except ModelHTTPError as error:
        return error.status_code
    raise AssertionError("nothing was raised")


async def main() -> None:
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        agent = Agent(kind("fake-1b", provider=provider()))
        assert (await agent.run("hi")).output == TEXT
        async with agent.run_stream("hi") as result:
            text = ""
            async for piece in result.stream_text(delta=True):
                text += piece
        assert text == TEXT, (kind, text)
        assert await status(Agent(kind("nope", provider=provider()))) == 404
        assert await status(Agent(kind("fake-1b", provider=provider("sk-wrong")))) == 401
        assert (
            await status(Agent(kind("fake-1b", provider=provider()), model_settings={"temperature": 9}))
            == 400
        )
        for output in (NativeOutput(Thing), ToolOutput(Thing)):
            agent = Agent(kind(SHAPED, provider=provider()), output_type=output)
            shaped((await agent.run("hi")).output.model_dump())
        async with agent.run_stream("hi") as result:
            shaped((await result.get_output()).model_dump())
    if TOOLS:
        agent = Agent(OpenAIChatModel("toolish", provider=provider()))
        seen: list[int] = []

        @agent.tool_plain
        def f(x: int) -> int:
            seen.append(x)
            raise Enough  # the scripted model would ask for ever

        with contextlib.suppress(Enough):
            await agent.run("hi")
        assert seen == [1]
    agent = Agent(OpenAIChatModel("slow", provider=provider()))

    async def impatient() -> None:
        async with agent.run_stream("hi") as result:
            async for _ in result.stream_text(delta=True):
                pass

    task = asyncio.ensure_future(impatient())
    await asyncio.sleep(0.5)
    task.cancel()
    await asyncio.wait((task,))


asyncio.run(main())
settled("slow", "disconnected")
