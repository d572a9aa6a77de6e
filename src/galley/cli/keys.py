"""`galley keys`: who may ask the endpoint."""

import time
from typing import Any

import click

from galley.cli.session import Session
from galley.cli.terminal import print_json, print_table


@click.group()
def keys() -> None:
    """Make, list and revoke API keys.

    From the first key on, the endpoint answers nobody without one. A running server sees changes at once.
    """


@keys.command()
@click.option("--name", default="", metavar="NAME", help="What it is for, or whose it is.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    default=("inference",),
    show_default=True,
    type=click.Choice(["inference", "batch", "receipts", "admin"]),
    help="What it may do; may be repeated.",
)
@click.option("--model", "models", multiple=True, metavar="MODEL", help="Only this model; may be repeated.")
@click.option("--days", type=float, metavar="N", help="Days until it expires; default: never.")
@click.option("--org", metavar="NAME", help="Organisation whose budgets its requests count in.")
@click.option("--team", metavar="NAME", help="Team whose budgets its requests count in.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_obj
def create(
    session: Session,
    *,
    name: str,
    scopes: tuple[Any, ...],
    models: tuple[str, ...],
    days: float | None,
    org: str | None,
    team: str | None,
    as_json: bool,
) -> None:
    """Make a key and show it, this once: only its digest is kept."""
    store = _store(session)
    try:
        key, secret = store.create(name, scopes=scopes, models=models, days=days, org=org, team=team)
    finally:
        store.close()
    if as_json:
        print_json({**_plain(key), "key": secret})
        return
    click.echo(secret)
    click.echo(f"galley: {key.id}: {', '.join(key.scopes)}; it is not shown again", err=True)


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
@click.pass_obj
def list_keys(session: Session, as_json: bool) -> None:
    """List all keys, revoked ones too."""
    store = _store(session)
    try:
        found = store.all()
    finally:
        store.close()
    if as_json:
        print_json([_plain(key) for key in found])
        return
    now = time.time()
    rows = [
        (
            key.id,
            key.name or "-",
            key.hint,
            ",".join(key.scopes),
            ",".join(key.models) or "all",
            time.strftime("%Y-%m-%d", time.localtime(key.created)),
            "revoked" if key.revoked else "good" if key.good(now) else "expired",
        )
        for key in found
    ]
    print_table(("ID", "NAME", "KEY", "SCOPES", "MODELS", "MADE", "STATE"), rows)


@keys.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="The revoked keys as a JSON array on stdout.")
@click.pass_obj
def revoke(session: Session, ids: tuple[str, ...], as_json: bool) -> None:
    """Refuse keys from now on."""
    store = _store(session)
    try:
        revoked = [store.revoke(id) for id in ids]
    finally:
        store.close()
    if as_json:
        print_json([_plain(key) for key in revoked])
        return
    for key in revoked:
        click.echo(f"{key.id} revoked")


def _store(session: Session) -> Any:
    from galley.endpoint.keys import KeyStore

    return KeyStore(session.config.home / "keys.db")


def _plain(key: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(key)
