"""Session: what one command line knows before it acts. Its flags, and the settings they resolve to."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from galley.errors import GalleyError

if TYPE_CHECKING:
    from galley.config import Config
    from galley.model.store import Store


class Session:
    """Flags of the group and of the subcommand, read together with environment and file on first use."""

    def __init__(self, *, flags: dict[str, Any], file: str | None, debug: bool) -> None:
        self.flags = flags
        self.file = file
        self.debug = debug
        self._config: Config | None = None

    def add(self, flags: dict[str, Any]) -> None:
        """More flags, of a subcommand. Only before ``config`` is first read."""
        assert self._config is None
        self.flags.update(flags)

    @property
    def config(self) -> "Config":
        """The settings. Raises ConfigError; misspelt environment names are told on stderr."""
        if self._config is None:
            from galley.config import load

            self._config = load(flags=self.flags, file=Path(self.file) if self.file else None)
            for warning in self._config.warnings:
                click.echo(f"galley: warning: {warning}", err=True)
        return self._config

    @property
    def store(self) -> "Store":
        """The models of this home."""
        from galley.model.store import Store

        pull = self.config.pull
        return Store(self.config.home, hf_endpoint=pull.hf_endpoint, hf_token=pull.hf_token)


class WholeHelp(click.Group):
    """A group whose list of commands has the whole first paragraph of each one's help, not its start."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            firsts = {name: (each.help or "").partition("\n\n")[0] for name, each in self.commands.items()}
            formatter.write_dl([(name, " ".join(first.split())) for name, first in firsts.items()])


def render(error: GalleyError) -> None:
    """One line, and one for what to do about it; on stderr."""
    click.echo(f"galley: {error.message}", err=True)
    if error.hint:
        click.echo(f"  hint: {error.hint}", err=True)


ENGINE_FLAGS: dict[str, tuple[str, str, str]] = {
    "engine.backend": ("--backend", "KIND", "auto, native or reference."),
    "engine.isa": ("--isa", "NAME", "Instruction set of the native backend; default: the best here."),
    "engine.threads": ("--threads", "N", "Kernel threads; default: the physical cores this process may use."),
    "engine.kv_type": ("--kv-type", "NAME", "How KV is kept: f16, or int8 in half the memory."),
    "engine.kv_memory": ("--kv-memory", "SIZE", "Memory for KV, such as 512MiB; default: what fits."),
    "engine.context": ("--context", "TOKENS", "Context, such as 4096 or 8K; default: the model's own."),
    "engine.token_budget": ("--token-budget", "N", "Most tokens computed in one step."),
    "engine.max_jobs": ("--max-jobs", "N", "Most choices running at once."),
    "kv.disk_bytes": ("--disk-bytes", "SIZE", "KV kept on disk, such as 2GiB; 0 for none."),
}


def settings_options(
    rows: dict[str, tuple[str, str, str]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options that are settings: passed on as text, so that config.py checks them and names the flag."""

    def keep(ctx: click.Context, option: click.Parameter, value: str | None) -> None:
        ctx.find_object(Session).add({str(option.name).replace("__", "."): value})  # type: ignore[union-attr]

    def wrap(command: Callable[..., Any]) -> Callable[..., Any]:
        for key, (flag, metavar, text) in reversed(rows.items()):
            name = key.replace(".", "__")
            command = click.option(flag, name, metavar=metavar, help=text, callback=keep, expose_value=False)(
                command
            )
        return command

    return wrap


def capture_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--capture``: store prompt and output in the receipt; ``--no-capture`` wins over the settings."""

    def keep(ctx: click.Context, _option: click.Parameter, value: bool | None) -> None:
        ctx.find_object(Session).add({"receipts.capture": value})  # type: ignore[union-attr]

    return click.option(
        "--capture/--no-capture",
        default=None,
        expose_value=False,
        callback=keep,
        help="Store prompts and outputs in receipts, or not; default: the setting, else not.",
    )(command)
