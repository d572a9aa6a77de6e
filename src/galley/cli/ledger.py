"""`galley ledger`: does the money add up?"""

import click

from galley.cli.budget import opened
from galley.cli.session import Session
from galley.cli.terminal import print_json, print_table


@click.group()
def ledger() -> None:
    """Look into the ledger of every request's money."""


@ledger.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def check(ctx: click.Context, as_json: bool) -> None:
    """Compute everything again from the ledger's lines and compare, to the last pico-dollar.

    Exit code 0 only when all of it is right.
    """
    import msgspec

    from galley.economics.amount import dollars
    from galley.economics.check import check as audit

    session = ctx.find_object(Session)
    assert session is not None
    with opened(session) as store:
        found = audit(store)
    if as_json:
        print_json({**msgspec.to_builtins(found), "good": found.good})
    else:
        click.echo(
            f"{found.transactions} transactions, {found.lines} lines, {found.charges} charges, "
            f"{found.reservations_open} requests open"
        )
        if found.sums:
            rows = [(name, f"${dollars(int(pico))}") for name, pico in found.sums.items()]
            print_table(("ACCOUNTS", "SUM"), rows, numbers=True)
        for problem in found.problems:
            click.echo(f"wrong: {problem}")
        hidden = found.problem_count - len(found.problems)
        if hidden:
            click.echo(f"and {hidden} more")
        click.echo("everything adds up" if found.good else f"{found.problem_count} things are wrong")
    ctx.exit(0 if found.good else 1)


@ledger.command()
@click.argument("receipt")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
@click.pass_obj
def show(session: Session, receipt: str, as_json: bool) -> None:
    """Show every line of one request's transactions."""
    from galley.economics.amount import dollars
    from galley.economics.query import lines
    from galley.errors import NotFound

    with opened(session) as store:
        found = lines(store, receipt)
    if not found:
        raise NotFound(f"The ledger has nothing of {receipt!r}.", hint="galley log lists receipts.")
    if as_json:
        print_json([{**line, "pico": str(line["pico"])} for line in found])
        return
    rows = [
        (
            line["txn"].removeprefix(receipt + ":"),
            line["source"],
            line["target"],
            f"${dollars(line['pico'])}",
            str(line["tokens"]),
            line["kind"],
            line["price_version"],
        )
        for line in found
    ]
    print_table(("STEP", "FROM", "TO", "MONEY", "TOKENS", "KIND", "PRICE"), rows)
