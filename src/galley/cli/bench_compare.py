"""`galley bench compare`: several servers on the same load, taking turns."""

import contextlib
import shlex
from typing import TYPE_CHECKING, Any

import click

from galley.cli.bench_load import (
    POSITIVE,
    check,
    load_options,
    model_at,
    run_loop,
    start_server,
    target_of,
    threads_of,
)
from galley.cli.bench_report import Report, quartiles, report_options
from galley.cli.session import Session, settings_options

if TYPE_CHECKING:
    from galley.bench.launch import Launched
    from galley.bench.stats import Spread


@click.command()
@click.option(
    "--target", "targets", multiple=True, metavar="NAME=WHAT",
    help="A URL, with #MODEL where it serves several; or galley: followed by flags of galley serve.",
)  # fmt: skip
@click.option("--rounds", type=POSITIVE, default=3, show_default=True, help="Every target once in each.")
@click.option("--clients", type=POSITIVE, default=4, show_default=True, help="At a time, on one target.")
@click.option("--requests", type=POSITIVE, default=16, show_default=True, help="In each round, for each.")
@load_options
@settings_options({"model": ("--model", "MODEL", "Model of the servers started here.")})
@report_options
@click.pass_obj
def compare(
    session: Session,
    /,
    *,
    report: Report,
    targets: tuple[str, ...],
    rounds: int,
    clients: int,
    requests: int,
    **asked: Any,
) -> None:
    """Two or more servers on the same load, taking turns.

    \b
    galley bench compare --target two=galley: --target one=galley:--threads=1
    galley bench compare --target galley=galley: --target other=http://127.0.0.1:8080/v1

    The first target is what the others are held against, round by round: ratios above 1 are in its favour.
    """
    from galley.bench.client import Ask, Client
    from galley.bench.compare import compare as measure
    from galley.bench.compare import summarise
    from galley.bench.plot import Chart, Series
    from galley.bench.prompts import Prompts

    named = dict(target.partition("=")[::2] for target in targets)
    if len(named) < 2 or len(named) != len(targets) or not all(named) or not all(named.values()):
        raise click.UsageError("give two or more --target NAME=WHAT, each with a name of its own")
    check(asked)
    each = {
        number: Prompts(seed=asked["seed"] + number, tokens=asked["prompt"], shared=asked["shared"])
        for number in range(-1, rounds)
    }

    def make(number: int, k: int) -> Ask:
        return Ask(prompt=each[number].text(k), max_tokens=asked["output"], seed=k)

    with contextlib.ExitStack() as stack:
        places: dict[str, tuple[str, str]] = {}
        started: dict[str, Launched] = {}
        key = session.config.server.api_key
        for name, what in named.items():
            place, _, model = what.partition("#")
            if what.startswith("galley:"):
                started[name] = start_server(session, stack, shlex.split(what[7:]))
                place, model = started[name].url, ""
            places[name] = (place, model or model_at(session, place, key, named=False))
        own = [server.cpu_seconds for server in started.values()]
        servers = own if len(own) == len(places) else None
        report.begin("compare", threads=threads_of(session), servers=servers)

        async def run() -> Any:
            async with contextlib.AsyncExitStack() as clients_open:
                opened = {
                    name: await clients_open.enter_async_context(
                        Client(target_of(place, model, key, asked), timeout_s=asked["timeout_s"])
                    )
                    for name, (place, model) in places.items()
                }
                return await measure(
                    opened, make, rounds=rounds, clients=clients, requests=requests,
                    threads=threads_of(session), told=lambda line: click.echo(line, err=True),
                )  # fmt: skip

        taken = run_loop(run)
        report.stop()
        notes = {name: server.notes for name, server in started.items()}
    rows = summarise(taken, list(named))

    def ms(found: "Spread | None") -> str:
        return f"{1e3 * found.median:.1f}" if found else "-"

    def times(found: "Spread | None") -> str:
        return f"{found.median:.2f}× ({found.low:.2f}–{found.high:.2f})" if found else ""

    first = rows[0].name
    head = ("", "tok/s", "quartiles", "TTFT p50 ms", "ITL p50 ms", "ITL p99 ms", "errors")
    report.table(
        f"{clients} clients, {rounds} rounds; ratios within rounds, above 1 in favour of {first}",
        (*head, f"{first} / it", "TTFT", "ITL"),
        [
            (
                row.name,
                *quartiles(row.output_tok_s),
                ms(row.ttft_p50),
                ms(row.itl_p50),
                ms(row.itl_p99),
                str(row.errors),
                times(row.rate_ratio),
                times(row.ttft_ratio),
                times(row.itl_ratio),
            )
            for row in rows
        ],
    )
    chart = Chart(
        title="output tokens a second, round by round",
        x="round",
        y="tok/s",
        series=[
            Series(
                name, [(float(k), one.figures[name].output_tok_s) for k, one in enumerate(taken, 1)]
            )
            for name in named
        ],
    )  # fmt: skip
    settings = {
        **asked,
        "targets": named,
        "server_notes": notes,
        "models": {name: model for name, (_, model) in places.items()},
        "rounds": rounds,
        "clients": clients,
        "requests": requests,
    }
    report.end(chart, settings=settings, figures=rows, rounds=taken)
    if any(row.errors for row in rows):
        click.get_current_context().exit(1)
