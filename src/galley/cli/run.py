"""`galley run`: one prompt, one answer, no server."""

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import click

from galley.cli.log import summary
from galley.cli.sampling import left_open, params_of, sampling_options
from galley.cli.session import ENGINE_FLAGS, Session, capture_option, settings_options
from galley.cli.terminal import echo_delta, print_json
from galley.providers.messages import check_text
from galley.types import Delta, SamplingParams

if TYPE_CHECKING:
    from galley.cli.house import House


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("prompt", metavar="[PROMPT]", required=False)
@click.option("--system", metavar="TEXT", help="System message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the text as it is: no chat template.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end instead of streamed text.")
@click.option("--quiet", "-q", is_flag=True, help="No summary line.")
@click.option("-n", "--choices", "n", type=int, metavar="N", help="Answers to write.")
@click.option(
    "--logprobs", type=int, metavar="K", help="With --json: log-probabilities and K alternatives a token."
)
@sampling_options
@settings_options(ENGINE_FLAGS)
@capture_option
@click.pass_obj
def run(
    session: Session,
    /,
    *,
    model: str,
    prompt: str | None,
    system: str | None,
    raw: bool,
    as_json: bool,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Answer one prompt on this machine; no server needed.

    Without PROMPT, or with -, the prompt is read from standard input. The answer goes to standard output as
    it is written; one summary line goes to standard error.
    """
    params = params_of(sampling)
    if params.logprobs is not None and not as_json:
        raise click.UsageError("--logprobs needs --json: text has no room for them.")
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template that --raw switches off.")
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("Give a PROMPT, or pipe one in. To talk: galley chat " + model)
    if prompt is None or prompt == "-":
        prompt = sys.stdin.read()
    check_text(prompt, "PROMPT")
    if not prompt.strip():
        raise click.UsageError("The prompt is empty.")
    session.store.resolve(model)  # Before the heavy imports: a missing model is told at once.
    from galley.cli.house import House

    asked: dict[str, Any] = {"prompts": [prompt]}
    if not raw:
        messages = [{"role": "system", "content": system}] if system is not None else []
        asked = {"messages": [*messages, {"role": "user", "content": prompt}]}
    asked["left_open"] = left_open(sampling)
    with House(session.config, model) as house:
        asyncio.run(_answer(house, params, asked, as_json=as_json, quiet=quiet))


async def _answer(
    house: "House", params: SamplingParams, asked: dict[str, Any], *, as_json: bool, quiet: bool
) -> None:
    choices: dict[int, list[Delta]] = {index: [] for index in range(max(1, params.n))}
    streamed = not as_json and len(choices) == 1
    thinking = False
    try:
        async with house.open(params, api="cli.run", **asked) as answer:
            async for delta in answer.deltas():
                choices.setdefault(delta.index, []).append(delta)
                if streamed:
                    thinking = echo_delta(delta, thinking)
                    sys.stdout.flush()
    finally:
        if streamed and any(delta.text or delta.reasoning for delta in choices[0]):
            click.echo()
    receipt = answer.receipt
    assert receipt is not None
    if as_json:
        print_json(
            {
                "model": receipt.model,
                "choices": [_choice(index, deltas) for index, deltas in sorted(choices.items())],
                "usage": receipt.usage,
                "times": receipt.times,
                "receipt": receipt.id,
            }
        )
    elif not streamed:
        for index, deltas in sorted(choices.items()):
            click.echo(f"--- {index + 1} of {len(choices)}")
            thinking = False
            for delta in deltas:
                thinking = echo_delta(delta, thinking)
            click.echo()
    if not quiet and not as_json:
        click.echo(f"[{summary(receipt)}]", err=True)


def _choice(index: int, deltas: list[Delta]) -> dict[str, Any]:
    return {
        "index": index,
        "text": "".join(delta.text for delta in deltas),
        "reasoning": "".join(delta.reasoning for delta in deltas) or None,
        "token_ids": [token for delta in deltas for token in delta.token_ids],
        "logprobs": [one for delta in deltas for one in delta.logprobs or ()] or None,
        "finish_reason": next((delta.finish for delta in deltas if delta.finish), None),
    }
