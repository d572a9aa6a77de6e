"""`galley route feedback`: what an answer was worth, by its receipt."""

import click

from galley.cli.session import Session
from galley.cli.terminal import print_json
from galley.errors import NotFound

__all__ = ["feedback"]


@click.command()
@click.argument("receipt", metavar="RECEIPT")
@click.argument("reward", metavar="REWARD", type=click.FloatRange(0, 1))
@click.option("--comment", default="", metavar="TEXT", help="Why.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_obj
def feedback(session: Session, receipt: str, *, reward: float, comment: str, as_json: bool) -> None:
    """Say what an answer was worth: REWARD from 0 (nothing) to 1 (as good as can be).

    Bandits learn from it (a running server within a second or so), and `galley route eval --logs` estimates
    from it what other policies would have earned.
    """
    from galley.audit.feedback import FeedbackStore
    from galley.audit.receipts import ReceiptStore

    store = ReceiptStore(session.config.receipts.path)
    try:
        found = store.get(receipt)
    finally:
        store.close()
    if found is None:
        raise NotFound(
            f"There is no receipt {receipt!r} in {session.config.receipts.path}.", hint="galley log"
        )
    given = FeedbackStore(session.config.home / "feedback.db").add(receipt, reward, comment=comment)
    if as_json:
        print_json(given)
        return
    route = found.route
    whose = f" by {route.model} (propensity {route.propensity:g})" if route else ""
    click.echo(f"{receipt}: the answer{whose} is worth {given.reward:g}")
