"""`galley`: the command line. Subcommands are imported when they run, so that `--version` stays quick."""

import importlib
import sys
from typing import Any

import click

from galley import __version__
from galley.cli.session import Session, render
from galley.errors import GalleyError

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("galley.cli.run:run", "Answer one prompt on this machine; no server needed."),
    "chat": ("galley.cli.chat:chat", "Talk to a model, turn by turn."),
    "embed": ("galley.cli.embed:embed", "Turn texts into vectors."),
    "serve": ("galley.cli.serve:serve", "Serve a model through an OpenAI-compatible endpoint."),
    "pull": ("galley.cli.models:pull", "Bring a model to this machine, verified."),
    "list": ("galley.cli.models:list_models", "List the models on this machine (also: ls)."),
    "show": ("galley.cli.show:show", "Show what a model is made of."),
    "rm": ("galley.cli.models:remove", "Remove models from this machine."),
    "route": ("galley.cli.route:route", "Explain, train and measure the choice of a model."),
    "market": (
        "galley.cli.market:market",
        "Show offers of capacity and price curves; simulate a spot market.",
    ),
    "log": ("galley.cli.log:log", "List receipts, newest last; -f follows."),
    "receipt": ("galley.cli.log:receipt", "Show one receipt in full."),
    "replay": ("galley.cli.replay:replay", "Run a captured request again and compare the token ids."),
    "ps": ("galley.cli.ps:ps", "Show which models a running server has in memory."),
    "fit": ("galley.cli.fit:fit", "Say what context and concurrency of a model fit, before loading it."),
    "cache": ("galley.cli.cache:cache", "Pin, list and drop prompt prefixes kept on disk."),
    "approvals": ("galley.cli.approvals:approvals", "List, approve and deny the calls that wait."),
    "audit": ("galley.cli.audit:audit", "Verify, prove from, export and erase in the audit log."),
    "budget": ("galley.cli.budget:budget", "Set and show limits on money, tokens, requests and concurrency."),
    "ledger": ("galley.cli.ledger:ledger", "Look into the ledger of every request's money."),
    "keys": ("galley.cli.keys:keys", "Make, list and revoke API keys."),
    "doctor": ("galley.cli.doctor:doctor", "Measure this machine and say what fits."),
    "bench": ("galley.cli.bench:bench", "Time Galley beside what the machine can do."),
    "config": ("galley.cli.settings:config", "Show, write and check settings."),
}
"""Name to where it is and its short help (kept equal to the command's own by a test)."""

SHORTHANDS = {"ls": "list"}

EXIT_CODES = """\b
Exit codes:
  0    done
  1    a fault of Galley or of this machine
  2    wrong usage, setting or request
  3    the model is missing or its file is bad
  4    the prompt does not fit the context
  5    not allowed
  6    an upstream (package index, model hub) failed
  130  stopped by Ctrl-C
"""


class ReaderLeft(Exception):
    """Standard output was closed by whoever read it."""


class LazyGroup(click.Group):
    """Imports a subcommand's module when that subcommand is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        where = COMMANDS.get(SHORTHANDS.get(cmd_name, cmd_name))
        if where is None:
            return None
        module, _, attribute = where[0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderLeft from error  # click would make it a failure, with exit code 1

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="galley", message="%(prog)s %(version)s")
@click.option("--home", metavar="DIR", help="Models, receipts and settings live here ($GALLEY_HOME).")
@click.option(
    "--config", "file", metavar="FILE", help="Settings file ($GALLEY_CONFIG; default: HOME/config.toml)."
)
@click.option("--debug", is_flag=True, help="Show the traceback of a fault.")
@click.pass_context
def galley(ctx: click.Context, home: str | None, file: str | None, debug: bool) -> None:
    """Galley runs language models on this machine. Every answer leaves a receipt.

    Nothing is downloaded except by `galley pull`, which first says what, how large and from where.
    """
    ctx.obj = Session(flags={"home": home}, file=file, debug=debug)


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exits with a documented code; shows a traceback only with ``--debug``."""
    sys.exit(invoke(sys.argv[1:] if argv is None else argv))


def invoke(argv: list[str]) -> int:
    """Run a command line and return its exit code."""
    # Before parsing, because the fault may lie in the parsing.
    debug = "--debug" in argv
    try:
        result: Any = galley.main(args=argv, prog_name="galley", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except GalleyError as error:
        if debug:
            raise
        render(error)
        return error.exit_code
    except (BrokenPipeError, ReaderLeft):
        # The reader (head, less) left: not a fault, and there is nobody to tell. Without this the
        # interpreter would complain once more while flushing stdout on its way out.
        sys.stdout = None
        return 0
    except Exception as error:
        if debug:
            raise
        click.echo(f"galley: internal fault: {type(error).__name__}: {error}", err=True)
        click.echo("  hint: run again with galley --debug … and report what it prints", err=True)
        return 1
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    main()
