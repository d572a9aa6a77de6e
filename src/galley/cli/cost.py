"""`galley cost`: what was spent, by whom and on what, and what our own engine's requests cost."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from galley.cli.budget import opened
from galley.cli.session import Session
from galley.cli.terminal import print_json, print_table
from galley.errors import ConfigError

if TYPE_CHECKING:
    from galley.economics.unit import Units


class Day(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """A UTC day such as 2026-11-01."""

    name = "DAY"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> date:
        if isinstance(value, date):
            return value
        try:
            return date.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no day such as 2026-11-01", param, ctx)


def period(since: date | None, until: date | None) -> tuple[date, date, date]:
    """Since, until (not included) and today, in UTC: by default this month up to and with today."""
    today = datetime.now(UTC).date()
    until = until or today + timedelta(days=1)
    since = since or (until - timedelta(days=1)).replace(day=1)
    if until <= since:
        raise click.UsageError("--until must come after --since")
    return since, until, today


SINCE = click.option("--since", type=Day(), help="First UTC day; default: the first of the month.")
UNTIL = click.option("--until", type=Day(), help="UTC day before which it ends; default: tomorrow.")


@click.group(invoke_without_command=True)
@click.option(
    "--by",
    metavar="NAMES",
    default="",
    help="Break down by any of day, month, tenant, org, team, user, key, session, plan, api, model, "
    "provider, tag, outcome, price_version; separated by commas.",
)
@SINCE
@UNTIL
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object on stdout.")
@click.option("--csv", "csv_file", metavar="FILE", help="The groups and their total as CSV; - is stdout.")
@click.option("--html", "html_file", metavar="FILE", help="Tables and plots as one page; - is stdout.")
@click.pass_context
def cost(
    ctx: click.Context,
    /,
    *,
    by: str,
    since: date | None,
    until: date | None,
    as_json: bool,
    csv_file: str | None,
    html_file: str | None,
) -> None:
    """Report spending, savings, margins, a forecast, and unit costs.

    Money is exact, to the last digit.

    Exit code 0 only when the totals are what the ledger's lines say, every request has a price, and the
    ledger adds up.
    """
    if ctx.invoked_subcommand is not None:
        if by or since or until or as_json or csv_file or html_file:
            raise click.UsageError(f"options of the report come without {ctx.invoked_subcommand}")
        return
    if [as_json, csv_file == "-", html_file == "-"].count(True) > 1:
        raise click.UsageError("only one of --json, --csv - and --html - has room on stdout")
    import msgspec

    from galley.economics.report import report
    from galley.economics.sheet import as_csv, sheets
    from galley.economics.sheet import as_json as plain

    session = ctx.find_object(Session)
    assert session is not None
    names = [name.strip() for name in by.split(",") if name.strip()]
    start, end, today = period(since, until)
    with opened(session) as store:
        try:
            found = report(store, names, since=start.isoformat(), until=end.isoformat(), today=today)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    found = msgspec.structs.replace(found, checkpoint=checkpoint(session.config.audit.folder))
    if csv_file is not None:
        put(csv_file, as_csv(found))
    if html_file is not None:
        from galley.cli.cost_page import page

        put(html_file, page(found))
    if as_json:
        print_json(plain(found))
    elif csv_file is None and html_file is None:
        for number, sheet in enumerate(sheets(found)):
            click.echo(("\n" if number else "") + sheet.title)
            print_table(sheet.head, sheet.rows)
            if sheet.note:
                click.echo(sheet.note)
    if not found.good:
        click.echo(f"galley: the report does not hold: {why(found)}", err=True)
    ctx.exit(0 if found.good else 1)


def checkpoint(folder: Path) -> dict[str, str] | None:
    """What the audit log last signed, as it says itself (``galley audit verify`` verifies it); None without
    a log. Raises BadNote for what is no checkpoint, ConfigError for what cannot be read."""
    import base64

    from galley.audit.note import parse_checkpoint

    try:
        note = (folder / "checkpoint").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder / 'checkpoint'}: cannot be read: {error}") from error
    said = parse_checkpoint(note)
    return {"origin": said.origin, "size": str(said.size), "root": base64.b64encode(said.root).decode()}


def why(found: Any) -> str:
    """What is wrong with a report, in words."""
    faults = []
    if not found.exact:
        faults.append("its totals are not those of the ledger's lines")
    if found.unpriced:
        faults.append(f"{found.unpriced} requests have no price")
    if not found.proof.good:
        faults.append(f"the ledger does not add up (galley ledger check): {found.proof.problems[0]}")
    return "; ".join(faults)


def put(place: str, text: str) -> None:
    """A file, or stdout for ``-``. Raises ConfigError where it cannot be written."""
    if place == "-":
        click.echo(text, nl=False)
        return
    try:
        # Without translation of line ends: CSV has its own.
        Path(place).write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise ConfigError(f"{place}: cannot be written: {error.strerror}") from error
    click.echo(f"galley: wrote {place}", err=True)


def divided(session: Session, since: date, until: date) -> "Units":
    """The machine's cost of a period, divided among its requests. Of a day that is not over, what has
    passed."""
    from galley.audit.receipts import ReceiptStore
    from galley.economics.unit import divide, work

    config = session.config
    machine = config.economics.machine.checked()
    since_us, until_us = (
        int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 10**6 for day in (since, until)
    )
    until_us = min(until_us, int(datetime.now(UTC).timestamp() * 10**6))
    if until_us <= since_us:
        raise click.UsageError("the period has not begun")
    receipts = ReceiptStore(config.receipts.path)
    day = 86_400  # one that waited over midnight belongs to the day it began to run on
    try:
        listed = receipts.list(2**62, since=since_us / 10**6 - day, before=until_us / 10**6)
        works = [found for each in listed if (found := work(each))]
    finally:
        receipts.close()
    return divide(machine, works, since_us=since_us, until_us=until_us)


@cost.command()
@SINCE
@UNTIL
@click.option(
    "--by", type=click.Choice(("request", "model", "user")), default="model", show_default=True,
    help="A row of these.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_obj
def units(session: Session, since: date | None, until: date | None, by: str, as_json: bool) -> None:
    """Divide what this machine cost among the requests it served, to the last pico-dollar.

    Needs to know what the machine costs: settings under economics.machine.
    """
    from galley.economics.sheet import money, paid

    found = divided(session, *period(since, until)[:2])
    names = ("prefill", "decode", "kv", "idle", "energy")
    groups: dict[str, dict[str, int]] = {}
    for job, parts in zip(found.works, found.parts, strict=True):
        key = {"request": job.id, "model": job.model, "user": job.user or "-"}[by]
        row = groups.setdefault(key, dict.fromkeys((*names, "total", "requests"), 0))
        for name in names:
            row[name] += getattr(parts, name) or 0
        row["total"] += parts.total
        row["requests"] += 1
    billed = found.energy is not None
    if as_json:

        def shown(row: dict[str, int]) -> dict[str, Any]:
            fields: dict[str, Any] = {f"{name}_pico": row[name] for name in (*names, "total")}
            if not billed:
                fields["energy_pico"] = None
            return {"requests": row["requests"], **paid(fields)}

        print_json(
            {
                "seconds": str(found.period_us / 10**6),
                "busy_seconds": str(found.busy_us / 10**6),
                "energy_measured": found.measured if billed else None,
                **paid(
                    {
                        "capital_pico": found.capital,
                        "energy_pico": found.energy,
                        "cost_pico": found.cost,
                        "unused_pico": found.unused,
                    }
                ),
                "by": by,
                "groups": [{"key": key, **shown(row)} for key, row in sorted(groups.items())],
            }
        )
        return

    def cells(key: str, row: dict[str, int]) -> tuple[str, ...]:
        shown = [money(row[name] if billed or name != "energy" else None) for name in names]
        return (key, str(row["requests"]), *shown, money(row["total"]))

    total = {name: sum(row[name] for row in groups.values()) for name in (*names, "total", "requests")}
    rows = [cells(key, row) for key, row in sorted(groups.items())]
    if found.unused:
        rows.append(("unused", "0", *["-"] * len(names), money(found.unused)))
    rows.append((*cells("total", total)[:-1], money(total["total"] + found.unused)))
    head = (by.upper(), "REQUESTS", "PREFILL", "DECODE", "KV", "IDLE", "ENERGY", "COST")
    print_table(head, rows, numbers=True)
    click.echo(
        f"the machine cost {money(found.cost)} in {found.period_us / 10**6:.0f} s, "
        f"of which {found.busy_us / 10**6:.1f} s were busy"
    )


@cost.command()
@SINCE
@UNTIL
@click.option(
    "--busy",
    metavar="SHARE",
    help="Price as though the machine were busy this share of the time, such as 0.5; default: as it was.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_obj
def prices(session: Session, since: date | None, until: date | None, busy: str | None, as_json: bool) -> None:
    """Derive a price list of our own, at which the period's requests pay for the machine.

    Cached tokens bear memory alone, which is their discount. Prices rest on how busy the machine was.
    """
    from galley.economics.ownprice import million, own_prices
    from galley.economics.price import points

    share = None if busy is None else points(busy, "--busy")
    if share == 0:
        raise click.UsageError("--busy must be above 0")
    found = own_prices(divided(session, *period(since, until)[:2]), busy_points=share)
    if as_json:
        print_json(
            {
                **{f"{name}_usd_per_million": million(getattr(found, name)) for name in KINDS},
                **{f"{name}_pico": str(getattr(found, name)) for name in KINDS},
                "cached_discount_points": found.discount_points,
                "busy_points": found.busy_points,
                "requests": found.requests,
                "setting": found.setting,
            }
        )
        return
    rows = [(name, "$" + million(getattr(found, name))) for name in KINDS]
    print_table(("TOKENS", "USD PER MILLION"), rows, numbers=True)
    was = "busy" if share is None else "taken as busy"
    click.echo(
        f"from {found.requests} requests, the machine {was} {found.busy_points / 100:.2f} % of the time; "
        f"a cached token is {found.discount_points / 100:.2f} % cheaper"
    )
    click.echo(f"to charge them: GALLEY_LOCAL_PRICE={found.setting}")


KINDS = ("input", "cached", "output")
