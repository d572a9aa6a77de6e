"""`galley market`: what capacity is on offer, what waiting is worth, and a simulated week."""

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from galley.cli.session import Session
from galley.cli.terminal import print_json, print_table

if TYPE_CHECKING:
    from galley.router.market.market import Market
    from galley.router.market.need import Need

__all__ = ["market"]


@click.group()
def market() -> None:
    """Show offers of capacity and price curves; simulate a spot market."""


def need_options(command: Any) -> Any:
    """What is to be bought."""
    for option in reversed(
        (
            click.option(
                "--input", "tokens_in", default=3000, show_default=True, metavar="N", help="Prompt tokens."
            ),
            click.option(
                "--cached", default=0, show_default=True, metavar="N", help="Of them expected cached."
            ),
            click.option(
                "--output", "tokens_out", default=1000, show_default=True, metavar="N", help="Output tokens."
            ),
            click.option("--max-ttft-ms", type=int, metavar="MS", help="Slowest promised first token."),
            click.option("--region", "regions", multiple=True, help="Where it may run; may be repeated."),
            click.option("--max-usd", metavar="USD", help="Most it may cost in all."),
            click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
        )
    ):
        command = option(command)
    return command


@market.command()
@click.option("--model", metavar="NAME", help="Of this model only.")
@need_options
@click.pass_obj
def book(session: Session, /, *, model: str | None, as_json: bool, **wanted: Any) -> None:
    """List the lots on offer now, cheapest first by expected total price. Asks the feeds; buys nothing."""
    found, faults = _open(session)
    at = found.now
    rows: list[dict[str, Any]] = []
    for name in [model] if model else found.models():
        need = _need(name, **wanted)
        order = [match.lot.id for match in found.book.matches(need, at)]
        lots = sorted(
            found.book.of(name), key=lambda lot: order.index(lot.id) if lot.id in order else len(order)
        )
        for lot in lots:
            why = lot.refuses(need, at)
            rows.append(
                {
                    "lot": lot.id,
                    "offer": f"{lot.model}@{lot.provider}",
                    "expected_pico": str(lot.expected(need)),
                    "priced_by": "token" if lot.price is not None else "second",
                    "capacity": lot.capacity,
                    "free": found.desk.free(lot, at, at + 1),
                    "region": lot.region,
                    "ttft_ms": lot.ttft_ms,
                    "preemptible": lot.preemptible,
                    "notice_s": lot.notice_s,
                    "valid_from": lot.valid_from,
                    "valid_to": lot.valid_to,
                    "source": lot.source,
                    "simulated": lot.simulated,
                    "refused": why,
                }
            )
    if as_json:
        print_json(
            {"at": at, "lots": rows, "faults": faults, "simulation": any(r["simulated"] for r in rows)}
        )
        return
    _warn(faults, any(row["simulated"] for row in rows))
    print_table(
        ["LOT", "OFFER", "EXPECTED USD", "FREE", "REGION", "TTFT", "TAKEN AWAY", "UNTIL (UTC)", "WHY NOT"],
        [
            [
                row["lot"],
                row["offer"],
                usd(int(row["expected_pico"])),
                f"{row['free']}/{row['capacity']}",
                row["region"] or "-",
                "-" if row["ttft_ms"] is None else f"{row['ttft_ms']} ms",
                f"{row['notice_s']} s notice" if row["preemptible"] else "never",
                time.strftime("%Y-%m-%d %H:%M", time.gmtime(row["valid_to"])),
                row["refused"] or "",
            ]
            for row in rows
        ],
    )


@market.command()
@click.option("--model", required=True, metavar="NAME")
@need_options
@click.pass_obj
def curve(session: Session, /, *, model: str, as_json: bool, **wanted: Any) -> None:
    """Show what work costs when it begins now, or within 1, 8 or 24 hours.

    `firm` is offered by a lot; `expected` is what the past of this book suggests and nobody owes. A command
    sees one moment, so here all points are firm; a running server has the past.
    """
    found, faults = _open(session)
    points = found.planner.curve(_need(model, **wanted), found.now).points
    simulated = any(lot.simulated for lot in found.book.of(model))
    shown = [
        {
            "within_s": point.within_s,
            "pico": str(point.pico),
            "kind": "firm" if point.firm else "expected",
            "lot": point.lot,
            "yield": f"{1 - point.pico / points[0].pico:.4f}" if points[0].pico else "0.0000",
        }
        for point in points
    ]
    if as_json:
        print_json(
            {"model": model, "at": found.now, "points": shown, "faults": faults, "simulation": simulated}
        )
        return
    _warn(faults, simulated)
    if not shown:
        click.echo(f"nothing on the book can serve {model} within these limits")
        return
    print_table(
        ["BEGUN WITHIN", "USD", "KIND", "LOT", "SAVED BY WAITING"],
        [
            [
                "now" if not each["within_s"] else f"{int(str(each['within_s'])) // 3600} h",
                usd(int(str(each["pico"]))),
                str(each["kind"]),
                str(each["lot"]) or "-",
                f"{float(str(each['yield'])) * 100:.1f} %",
            ]
            for each in shown
        ],
    )


@market.command()
@click.option(
    "--scenario", default="ordinary", show_default=True, type=click.Choice(["calm", "ordinary", "tight"])
)
@click.option("--seed", default=0, show_default=True, help="The first of --seeds.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1, 1000), metavar="N")
@click.option("--days", default=7, show_default=True, type=click.IntRange(1, 21))
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def simulate(*, scenario: str, seed: int, seeds: int, days: int, as_json: bool) -> None:
    """SIMULATION: buy a week of work on a made-up spot market, by the rules of the live server.

    The same seed is the same week, event for event, on every machine.
    """
    from galley.evals.scenario import SCENARIOS
    from galley.evals.spot import LABEL, compare

    report = compare(SCENARIOS[scenario], range(seed, seed + seeds), days=days)
    if as_json:
        print_json(report)
        return
    click.echo(LABEL)
    click.echo(f"scenario {scenario}: {report['words']}; {days} days")
    rows = []
    for run in report["runs"]:
        for rule in ("on-demand", "no-waiting", "planned"):
            week = run[rule]
            rows.append(
                [
                    str(run["seed"]),
                    rule,
                    f"{int(week['pico']) / 1e12:.2f}",
                    f"{week['saving'] * 100:.1f} %",
                    f"{week['saving_interactive'] * 100:.1f} %",
                    f"{week['saving_deferrable'] * 100:.1f} %",
                    str(week["missed"]),
                    str(week["interruptions"]),
                    week["digest"][:12],
                ]
            )
    print_table(
        ["SEED", "RULE", "SIM. USD", "SAVED", "INTERACTIVE", "DEFERRABLE", "MISSED", "TAKEN AWAY", "EVENTS"],
        rows,
    )
    saving = report["saving"]
    click.echo(
        f"planned, simulated: {saving['median'] * 100:.1f} % below on-demand "
        f"({saving['least'] * 100:.1f} to {saving['most'] * 100:.1f} % over {seeds} seeds), "
        f"{report['missed']} deadlines missed"
    )


def _open(session: Session) -> "tuple[Market, list[str]]":
    """The market of the catalog, its feeds asked once. Raises ConfigError when the catalog has none."""
    from galley.config import secret
    from galley.errors import ConfigError
    from galley.router.catalog import Catalog
    from galley.router.market.market import Market

    path: Path | None = session.config.router.catalog
    table = None if path is None else Catalog.read(path).document.market
    if path is None or table is None:
        raise ConfigError(
            "The catalog has no [market].", hint="docs/ROUTING.md, Market", param="router.catalog"
        )
    found = Market(table, path.parent, secret, now=time.time)

    async def ask() -> list[str]:
        try:
            return (await found.refresh())[1]
        finally:
            found.close()

    return found, asyncio.run(ask())


def _need(
    model: str,
    *,
    tokens_in: int,
    cached: int,
    tokens_out: int,
    max_ttft_ms: int | None,
    regions: tuple[str, ...],
    max_usd: str | None,
) -> "Need":
    from decimal import Decimal, InvalidOperation

    from galley.router.market.need import Need

    limit = None
    if max_usd is not None:
        try:
            limit = int(Decimal(max_usd) * 10**12)
        except (InvalidOperation, ValueError, OverflowError) as error:
            raise click.BadParameter(f"{max_usd!r} is no amount", param_hint="--max-usd") from error
    if not 0 <= cached <= tokens_in or tokens_out < 0:
        raise click.BadParameter("0 <= cached <= input, and output >= 0")
    return Need(
        model=model,
        input=tokens_in,
        cached=cached,
        output=tokens_out,
        max_ttft_ms=max_ttft_ms,
        regions=frozenset(regions),
        max_pico=limit,
    )


def _warn(faults: list[str], simulated: bool) -> None:
    if simulated:
        click.echo("SIMULATED lots are among these: they can be bought nowhere")
    for fault in faults:
        click.echo(f"galley: {fault}", err=True)


def usd(pico: int) -> str:
    """Pico-dollars as dollars, exactly."""
    whole, rest = divmod(pico, 10**12)
    return f"{whole}.{rest:012d}".rstrip("0").ljust(len(str(whole)) + 3, "0")
