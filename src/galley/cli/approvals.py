"""`galley approvals`: what waits for somebody's yes."""

import getpass
import time
from typing import TYPE_CHECKING, Any

import click

from galley.cli.session import Session
from galley.cli.terminal import print_json, print_table

if TYPE_CHECKING:
    from galley.audit.approvals import Approvals

JSON = click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
NAME = click.option("--as", "approver", metavar="NAME", help="Who decides; default: your login name.")
CALL = click.option("--call", metavar="SHA256", help="Decide only if it is this call (as `list` shows it).")
REASON = click.option("--reason", metavar="TEXT", help="Why.")


@click.group()
def approvals() -> None:
    """List, approve and deny the calls that wait.

    A destructive call takes two approvers, neither of whom asked for it. An approval is for exactly one call,
    once, until it expires. Who may write the queue's file decides: it is for the operators of this machine;
    others use /v1/admin/approvals.
    """


@approvals.command("list")
@click.option("--all", "every", is_flag=True, help="Decided and expired ones too.")
@JSON
@click.pass_obj
def list_approvals(session: Session, *, every: bool, as_json: bool) -> None:
    """List what waits, oldest first."""
    queue = opened(session)
    try:
        found = queue.list(None if every else "pending", limit=1000)
    finally:
        queue.close()
    if as_json:
        print_json(found)
        return
    rows = [
        (
            each.id,
            each.state,
            each.tier,
            f"{sum(d.approve for d in each.decisions)}/{each.needed}",
            f"{max(0, each.expires - time.time()):.0f} s",
            f"{each.name} {each.arguments if each.arguments is not None else ''}".strip(),
            each.call,
        )
        for each in found
    ]
    print_table(("ID", "STATE", "TIER", "YES", "LEFT", "WHAT", "CALL"), rows)


@approvals.command()
@click.argument("id", metavar="ID")
@NAME
@CALL
@REASON
@JSON
@click.pass_obj
def approve(session: Session, /, **given: Any) -> None:
    """Say yes."""
    decide(session, approve=True, **given)


@approvals.command()
@click.argument("id", metavar="ID")
@NAME
@CALL
@REASON
@JSON
@click.pass_obj
def deny(session: Session, /, **given: Any) -> None:
    """Say no; that ends it."""
    decide(session, approve=False, **given)


def decide(
    session: Session,
    *,
    id: str,
    approve: bool,
    approver: str | None,
    call: str | None,
    reason: str | None,
    as_json: bool,
) -> None:
    """Decide and show what came of it."""
    queue = opened(session)
    try:
        found = queue.decide(
            id, approver=approver or getpass.getuser(), approve=approve, reason=reason, call=call
        )
    finally:
        queue.close()
    if as_json:
        print_json(found)
    else:
        said = sum(d.approve for d in found.decisions)
        click.echo(f"{found.id} {found.state} ({said} of {found.needed})")


def opened(session: Session) -> "Approvals":
    """The queue of this home."""
    from galley.audit.approvals import Approvals

    return Approvals(session.config.home / "approvals.db")
