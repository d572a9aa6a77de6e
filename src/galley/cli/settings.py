"""`galley config`: show, write and check settings."""

import click

from galley.cli.session import Session, WholeHelp
from galley.cli.terminal import print_json, print_table
from galley.config import template
from galley.errors import ConfigError


@click.group(cls=WholeHelp)
def config() -> None:
    """Show, write and check settings.

    A flag wins over the environment, which wins over the file, which wins over the default.
    """


@config.command()
@click.option("--origin", is_flag=True, help="Also say where each value comes from.")
@click.option("--json", "as_json", is_flag=True, help="A JSON array of {key, value, origin}.")
@click.pass_obj
def show(session: Session, origin: bool, as_json: bool) -> None:
    """Every setting and its value."""
    rows = session.config.rows()
    if as_json:
        print_json(rows)
        return

    def shown(value: object) -> str:
        if isinstance(value, list):
            return ",".join(value) or "-"
        return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    head = ("SETTING", "VALUE", "ORIGIN") if origin else ("SETTING", "VALUE")
    cells = [(row["key"], shown(row["value"]), row["origin"])[: len(head)] for row in rows]
    print_table(head, cells)


@config.command()
@click.pass_obj
def path(session: Session) -> None:
    """The file that is read, or would be if it existed."""
    click.echo(str(session.config.file or session.config.home / "config.toml"))


@config.command()
@click.pass_obj
def validate(session: Session) -> None:
    """Check file and environment; exit code 2 and the place when something is wrong."""
    read = session.config.file
    if session.config.warnings:
        raise ConfigError(session.config.warnings[0])
    click.echo(f"{read}: valid" if read else "no settings file; environment valid")


@config.command()
@click.pass_obj
def init(session: Session) -> None:
    """Write a settings file with every setting, commented out. Never overwrites one."""
    from pathlib import Path

    if session.file:
        target = Path(session.file).expanduser().absolute()
        session.file = None  # It need not exist yet.
    else:
        target = session.config.home / "config.toml"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(template())
    except OSError as error:
        if target.exists():
            raise ConfigError(f"{target} is there already.", hint="edit it, or move it away first") from error
        raise ConfigError(
            f"{target}: {error.strerror or error}",
            hint="name another place: galley --config FILE config init",
        ) from error
    click.echo(str(target))
