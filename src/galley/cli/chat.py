"""`galley chat`: a conversation, turn by turn, each turn with its receipt."""

import asyncio
import contextlib
import importlib
import sys
from typing import TYPE_CHECKING, Any

import click

from galley.cli.log import summary
from galley.cli.sampling import left_open, params_of, sampling_options
from galley.cli.session import ENGINE_FLAGS, Session, capture_option, render, settings_options
from galley.cli.terminal import echo_delta
from galley.errors import GalleyError
from galley.types import SamplingParams

if TYPE_CHECKING:
    from galley.cli.house import House

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


@click.command()
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--system", metavar="TEXT", help="System message of the conversation.")
@click.option("--quiet", "-q", is_flag=True, help="No summary lines.")
@sampling_options
@settings_options(ENGINE_FLAGS)
@capture_option
@click.pass_obj
def chat(session: Session, /, model: str | None, system: str | None, quiet: bool, **sampling: Any) -> None:
    """Talk to a model, turn by turn.

    Without MODEL it is the setting ``model``: see galley config show.

    /reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer. With piped input each
    line is a turn, and the first turn that fails ends the command with its exit code.
    """
    name = model or session.config.model
    session.store.resolve(name)
    from galley.cli.house import House

    with House(session.config, name) as house, asyncio.Runner() as runner:
        Conversation(
            house, runner, params_of(sampling), left_open=left_open(sampling), system=system, quiet=quiet
        ).talk()


class Conversation:
    """The messages so far. A turn that fails or is stopped leaves them as they were."""

    def __init__(
        self,
        house: "House",
        runner: asyncio.Runner,
        params: SamplingParams,
        *,
        left_open: list[str],
        system: str | None,
        quiet: bool,
    ) -> None:
        self._house = house
        self._runner = runner
        self._params = params
        self._left_open = left_open
        self._opening: list[dict[str, Any]] = (
            [{"role": "system", "content": system}] if system is not None else []
        )
        self._messages = list(self._opening)
        self._quiet = quiet
        self._live = sys.stdin.isatty()

    def talk(self) -> None:
        """Read turns until /exit or the end of input."""
        if self._live:
            with contextlib.suppress(ImportError):  # a Python built without it reads plain lines
                importlib.import_module("readline")  # makes input() edit lines and remember them
            click.echo(f"{self._house.model.name} · {HELP}", err=True)
        while True:
            try:
                line = input("> " if self._live else "")
            except EOFError:
                return
            match line.strip():
                case "":
                    continue
                case "/exit" | "/quit" | "/bye":
                    return
                case "/reset":
                    self._messages = list(self._opening)
                    click.echo("Forgotten.", err=True)
                case "/help" | "/?":
                    click.echo(HELP, err=True)
                case _:
                    self._turn(line)

    def _turn(self, text: str) -> None:
        try:
            self._messages = self._runner.run(self._ask([*self._messages, {"role": "user", "content": text}]))
        except KeyboardInterrupt:
            if not self._live:
                raise
            click.echo("\n(stopped; this turn is forgotten)", err=True)
        except GalleyError as error:
            if not self._live:
                raise
            render(error)

    async def _ask(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One turn; returns the conversation with the answer in it."""
        pieces: list[str] = []
        thinking = False
        async with self._house.open(
            self._params, api="cli.chat", messages=messages, left_open=self._left_open
        ) as answer:
            async for delta in answer.deltas():
                pieces.append(delta.text)
                thinking = echo_delta(delta, thinking)
                sys.stdout.flush()
        click.echo()
        if not self._quiet and answer.receipt is not None:
            click.echo(f"[{summary(answer.receipt)}]", err=True)
        return [*messages, {"role": "assistant", "content": "".join(pieces)}]
