"""What `galley bench serve` and `compare` have in common: options, targets and servers of our own."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from galley.cli.bench_report import seed_option
from galley.cli.session import ENGINE_FLAGS, Session

if TYPE_CHECKING:
    from galley.bench.launch import Launched

POSITIVE = click.IntRange(min=1)


def load_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What both commands ask of a server."""
    for option in (
        click.option("--timeout", "timeout_s", type=float, default=600.0, show_default=True, metavar="S"),
        click.option(
            "--extra", multiple=True, metavar="NAME=JSON",
            help="A further field of every request; NAME= leaves one out. Default: ignore_eos=true.",
        ),
        click.option("--chat", is_flag=True, help="/chat/completions instead of /completions."),
        seed_option,
        click.option(
            "--shared-prefix", "shared", type=click.IntRange(min=0), default=0, metavar="N",
            help="Prompt tokens that all prompts have in common; else none are.",
        ),
        click.option(
            "--output-tokens", "output", type=POSITIVE, default=64, show_default=True, metavar="N"
        ),
        click.option(
            "--prompt-tokens", "prompt", type=POSITIVE, default=128, show_default=True, metavar="N",
            help="About so many: one frequent English word each.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def check(asked: dict[str, Any]) -> None:
    if asked["shared"] >= asked["prompt"]:
        raise click.UsageError("--shared-prefix must be smaller than --prompt-tokens")
    extra_fields(asked["extra"])


def extra_fields(given: tuple[str, ...]) -> dict[str, Any]:
    """Further fields of a request. Raises UsageError."""
    import msgspec

    found: dict[str, Any] = {"ignore_eos": True}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise click.UsageError(f"--extra {text}: NAME=JSON is wanted")
        if not value:
            found.pop(name, None)
            continue
        try:
            found[name] = msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            raise click.UsageError(f"--extra {text}: {error}") from error
    return found


def target_of(place: str, model: str, key: str | None, asked: dict[str, Any]) -> Any:
    from galley.bench.client import Target

    return Target(url=place, model=model, key=key, chat=asked["chat"], extra=extra_fields(asked["extra"]))


async def asking(place: str, model: str, key: str | None, asked: dict[str, Any], run: Any) -> Any:
    from galley.bench.client import Client

    async with Client(target_of(place, model, key, asked), timeout_s=asked["timeout_s"]) as client:
        return await run(client)


def run_loop(work: Callable[[], Any]) -> Any:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work())


def model_at(session: Session, place: str, key: str | None, *, named: bool) -> str:
    """The model asked for, else the first that the server lists. Raises GalleyError."""
    from galley.bench.client import Client, Target
    from galley.errors import GalleyError

    if named:
        return session.config.model

    async def first() -> list[str]:
        async with Client(Target(url=place, model="", key=key), timeout_s=30) as client:
            return await client.models()

    found: list[str] = run_loop(first)
    if not found:
        raise GalleyError(f"{place} serves no model", code="bench_target")
    return found[0]


def threads_of(session: Session) -> int:
    from galley.runtime.processors import Processors

    return Processors.read().threads(session.config.engine.threads).count


def engine_flags(session: Session) -> list[str]:
    return [ENGINE_FLAGS[key][0] for key in ENGINE_FLAGS if session.config.origin(key).startswith("flag:")]


def server_flags(session: Session) -> list[str]:
    """The engine's settings, as flags of the server to be started."""
    found = []
    for name, (flag, _, _) in ENGINE_FLAGS.items():
        value = session.config.value(name)
        if value is not None:
            found += [flag, str(value)]
    return found


def start_server(session: Session, stack: contextlib.ExitStack, flags: list[str]) -> "Launched":
    from galley.bench.launch import Launched

    config = session.config
    session.store.resolve(config.model)  # A missing model is told at once, with its own exit code.
    model = [] if "--model" in flags else ["--model", config.model]
    return stack.enter_context(Launched(config.home, [*model, *flags], key=config.server.api_key))
