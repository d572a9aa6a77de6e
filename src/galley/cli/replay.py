"""`galley replay`: is the answer still the same?"""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click

from galley.cli.session import ENGINE_FLAGS, Session, settings_options
from galley.cli.terminal import print_json
from galley.errors import NotFound

if TYPE_CHECKING:
    from galley.cli.house import House
    from galley.types import Receipt, Request


@click.command()
@click.argument("id", metavar="RECEIPT", required=False)
@click.option(
    "--plans",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Play a scheduler's journal instead and compare its plans; no model is needed.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@settings_options(ENGINE_FLAGS)
@click.pass_obj
def replay(session: Session, id: str | None, plans: Path | None, as_json: bool) -> int:
    """Run a captured request again and compare the token ids.

    Exit code 0 when they are the same, 1 when they differ. The receipt must hold prompt and output
    (--capture).
    """
    if (id is None) == (plans is None):
        raise click.UsageError("Give a RECEIPT, or --plans FILE.")
    if plans is not None:
        return _play(plans, as_json=as_json)
    from galley.audit.receipts import ReceiptStore
    from galley.audit.replay import captured

    store = ReceiptStore(session.config.receipts.path)
    try:
        then = store.get(str(id))
    finally:
        store.close()
    if then is None:
        raise NotFound(f"There is no receipt {id!r} in {session.config.receipts.path}.", hint="galley log")
    request = captured(then)
    session.store.resolve(then.model)  # before the heavy imports: a missing model is told at once
    from galley.cli.house import House

    with House(session.config, then.model) as house:
        now = asyncio.run(_again(house, request))
    return _report(then, now, as_json=as_json)


async def _again(house: "House", request: "Request") -> "Receipt":
    async with house.router.open(request) as answer:
        async for _ in answer.deltas():
            pass
    assert answer.receipt is not None
    return answer.receipt


def _report(then: "Receipt", now: "Receipt", *, as_json: bool) -> int:
    from galley.audit.replay import compare

    choices = compare(then.output_ids or [], now.output_ids or [])
    same = all(choice.same for choice in choices)
    changed = [
        name
        for name in then.digests.__struct_fields__
        if getattr(then.digests, name) != getattr(now.digests, name)
    ]
    if as_json:
        print_json(
            {"receipt": then.id, "again": now.id, "same": same, "changed": changed, "choices": choices}
        )
        return 0 if same else 1
    for choice in choices:
        if choice.same:
            click.echo(f"choice {choice.index}: the same {len(choice.now)} tokens")
        else:
            click.echo(
                f"choice {choice.index}: differs from token {choice.place} on"
                f" ({len(choice.then)} tokens then, {len(choice.now)} now)"
            )
    if changed:
        click.echo(f"changed since: {', '.join(changed)}")
    click.echo(f"[receipt {now.id}]", err=True)
    return 0 if same else 1


def _play(path: Path, *, as_json: bool) -> int:
    from galley.runtime.journal import replay as play

    with path.open("rb") as lines:
        found = play(lines)
    if as_json:
        print_json({"plans": found.plans, "same": found.same, "difference": found.difference})
    else:
        click.echo(f"{found.plans} plans: {found.difference or 'the same'}")
    return 0 if found.same else 1
