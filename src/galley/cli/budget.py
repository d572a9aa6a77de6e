"""`galley budget`: what organisations, teams, users, keys, agents and tags may use."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from galley.cli.session import Session
from galley.cli.terminal import print_json, print_table
from galley.errors import NotFound

if TYPE_CHECKING:
    from galley.economics.limits import Rule
    from galley.economics.store import Store

LIMITS: dict[str, str] = {
    "money_day": "Dollars a UTC day, such as 2.50; none for no limit.",
    "money_month": "Dollars a month.",
    "money_total": "Dollars in all.",
    "tokens_day": "Prompt and completion tokens a day.",
    "tokens_month": "Tokens a month.",
    "tokens_total": "Tokens in all.",
    "requests_day": "Requests a day.",
    "requests_month": "Requests a month.",
    "requests_total": "Requests in all; of a session, the iterations of an agent.",
    "requests_minute": "Requests a minute.",
    "tokens_minute": "Tokens a minute.",
    "concurrency": "Requests under way at once.",
    "max_output": "Completion tokens of one choice.",
}


@click.group()
def budget() -> None:
    """Set and show limits on money, tokens, requests and concurrency.

    A scope is KIND:NAME: server:all, org:ACME, team:RED, user:ALICE, key:KEY_ID, session:RUN, tag:KEY=VALUE.
    KIND:* is for those of the kind without limits of their own. plan:NAME is a template for the users of a
    plan. A running server sees changes at once.
    """


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option a limit."""
    for name, text in reversed(LIMITS.items()):
        metavar = "USD" if name.startswith("money") else "N"
        command = click.option("--" + name.replace("_", "-"), name, metavar=metavar, help=text)(command)
    return command


@budget.command("set")
@click.argument("scope")
@limit_options
@click.option("--soft", is_flag=True, help="Only warn: a header and a line on the receipt.")
@click.option(
    "--plan", metavar="NAME", help="Plan of its users: free, saas, enterprise, or your own plan:NAME."
)
@click.option(
    "--margin", metavar="SHARE", help="Of a plan: share of what is charged, or 'free' for no charge."
)
@click.option("--json", "as_json", is_flag=True, help="The rule as JSON on stdout.")
@click.pass_obj
def set_budget(
    session: Session,
    /,
    *,
    scope: str,
    soft: bool,
    plan: str | None,
    margin: str | None,
    as_json: bool,
    **limits: str | None,
) -> None:
    """Set limits of a scope; those not named stay as they are."""
    from galley.economics.budget import changed, read_limits, read_margin
    from galley.economics.scope import check_scope

    check_scope(scope)
    wanted = read_limits(limits, soft=soft)
    share = read_margin(margin)
    if not wanted and plan is None and share is None:
        raise click.UsageError("name at least one limit, such as --money-month 20, or a --plan")
    with opened(session) as store:
        rules = store.refresh()

        def change(rule: "Rule | None") -> "Rule":
            return changed(rule, scope, rules, limits=wanted, soft=soft, plan=plan, margin=share)

        rule = store.set_rule(scope, change)
        assert rule is not None
        show_scope(store, scope, rule, as_json=as_json)


@budget.command("show")
@click.argument("scope")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_obj
def show_budget(session: Session, scope: str, as_json: bool) -> None:
    """Show the limits of a scope, what is used and what is left."""
    import msgspec

    from galley.economics.scope import check_scope

    check_scope(scope)
    with opened(session) as store:
        rules = store.refresh()
        plan = rules.plan((scope,))
        rule = rules.of(scope, plan) or rules.get(scope)
        if rule is not None and plan is not None:
            rule = msgspec.structs.replace(rule, plan=plan)
        if rule is None:
            raise NotFound(f"{scope} has no limits.", hint=f"galley budget set {scope} --money-month 20")
        show_scope(store, scope, rule, as_json=as_json)


@budget.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array on stdout.")
@click.pass_obj
def list_budgets(session: Session, as_json: bool) -> None:
    """List every limit that is set, with what is used of it, and the plans built in."""
    from galley.economics.budget import standing
    from galley.economics.limits import PLANS

    with opened(session) as store:
        rules = {**PLANS, **store.rule_rows()}
        found = [(scope, rule, standing(store, scope, rule)) for scope, rule in sorted(rules.items())]
    if as_json:
        print_json([plain(*each) for each in found])
        return
    rows = []
    for scope, rule, limits in found:
        rows += [(scope, *cells(each)) for each in limits]
        if not limits or rule.plan or rule.margin:
            rows.append((scope, about(rule), "", "", "", "", ""))
    print_table(("SCOPE", "LIMIT", "KIND", "MOST", "SPENT", "HELD", "LEFT"), rows)


@budget.command()
@click.argument("scopes", metavar="SCOPE...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="The scopes as a JSON array on stdout.")
@click.pass_obj
def remove(session: Session, scopes: tuple[str, ...], as_json: bool) -> None:
    """Take all limits of a scope away. What it has spent stays in the ledger."""
    with opened(session) as store:
        known = store.rule_rows()
        for scope in scopes:
            if scope not in known:
                raise NotFound(f"{scope} has no limits of its own.", hint="galley budget list")
        for scope in scopes:
            store.set_rule(scope, lambda _: None)
    if as_json:
        print_json(list(scopes))
        return
    for scope in scopes:
        click.echo(f"{scope} has no limits of its own any more")


@contextmanager
def opened(session: Session) -> "Iterator[Store]":
    """The ledger's database, as the settings say."""
    from galley.economics.store import Store, ledger_url

    store = Store(ledger_url(session.config.ledger.url, session.config.home))
    try:
        yield store
    finally:
        store.close()


def show_scope(store: "Store", scope: str, rule: "Rule", *, as_json: bool) -> None:
    """A table, or an object."""
    from galley.economics.budget import standing

    limits = standing(store, scope, rule)
    if as_json:
        print_json(plain(scope, rule, limits))
        return
    if rule.plan or rule.margin:
        click.echo(f"{scope}: {about(rule)}")
    if limits:
        print_table(("LIMIT", "KIND", "MOST", "SPENT", "HELD", "LEFT"), [cells(each) for each in limits])


def about(rule: "Rule") -> str:
    """Its plan and margin in words."""
    words = [f"plan {rule.plan}"] if rule.plan else []
    if rule.margin is not None:
        points = rule.margin.points
        words.append("not charged" if points is None else f"margin {points / 100:g} %")
    return ", ".join(words) or "no limits"


def cells(each: Any) -> tuple[str, ...]:
    """A row: money in dollars to the last digit."""
    from galley.economics.amount import dollars

    def show(value: int | None) -> str:
        if value is None:
            return "-"
        return "$" + dollars(value) if each.limit.startswith("money") else str(value)

    return (each.limit, each.kind, show(each.most), show(each.spent), show(each.reserved), show(each.left))


def plain(scope: str, rule: "Rule", limits: list[Any]) -> dict[str, Any]:
    """As JSON: money as strings of pico-dollars, because few readers keep 64 bits."""
    import msgspec

    def shown(each: Any) -> dict[str, Any]:
        fields = msgspec.to_builtins(each)
        if each.limit.startswith("money"):
            fields |= {
                name: str(fields[name])
                for name in ("most", "spent", "reserved", "left")
                if fields[name] is not None
            }
        return dict(fields)

    margin = None if rule.margin is None else msgspec.to_builtins(rule.margin)
    return {"scope": scope, "plan": rule.plan, "margin": margin, "limits": [shown(each) for each in limits]}
