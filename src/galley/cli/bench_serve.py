"""`galley bench serve`: one server under load, this one's or anybody's."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from galley.cli.bench_load import (
    POSITIVE,
    asking,
    check,
    engine_flags,
    load_options,
    model_at,
    run_loop,
    server_flags,
    start_server,
    threads_of,
)
from galley.cli.bench_report import Report, milliseconds, report_options
from galley.cli.session import ENGINE_FLAGS, Session, settings_options

if TYPE_CHECKING:
    from galley.bench.client import Client
    from galley.bench.load import Figures


@click.command()
@click.option(
    "--url",
    metavar="URL",
    help="A running OpenAI-compatible server. Without it, galley serve is started with the flags below.",
)
@click.option("--rate", type=float, metavar="R", help="Open loop: R requests a second, Poisson arrivals.")
@click.option(
    "--trace", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help='Open loop: {"at": seconds, "prompt_tokens": n, "output_tokens": n} a line.',
)  # fmt: skip
@click.option("--clients", type=POSITIVE, metavar="N", help="Closed loop of N clients (default: 4).")
@click.option("--requests", type=POSITIVE, metavar="N", help="Requests in all; a trace has its own number.")
@click.option("--slo", multiple=True, metavar="PART=TIME", help="ttft=0.5, itl=50ms, e2e=10; repeatable.")
@load_options
@settings_options(
    {"model": ("--model", "MODEL", "Model to ask for; default at a URL: the first it lists."), **ENGINE_FLAGS}
)
@report_options
@click.pass_obj
def serve(
    session: Session,
    /,
    *,
    report: Report,
    url: str | None,
    rate: float | None,
    trace: Path | None,
    clients: int | None,
    requests: int | None,
    slo: tuple[str, ...],
    **asked: Any,
) -> None:
    """A server under load: latency percentiles, goodput, errors.

    Closed loop: so many clients, each waiting for its answer. Open loop (--rate, --trace): requests come when
    they come, and latency counts from then, however late the server or this client is.
    """
    from galley.bench.arrivals import Arrival, poisson, read_trace
    from galley.bench.client import Ask
    from galley.bench.load import Loaded, Slo, closed_loop, figures, open_loop
    from galley.bench.plot import Chart, cumulative
    from galley.bench.prompts import Prompts

    if sum(given is not None for given in (rate, trace, clients)) > 1:
        raise click.UsageError("--rate, --trace and --clients are three different loads: give one")
    if trace is not None and requests is not None:
        raise click.UsageError("a --trace has its own number of requests")
    if url is not None and (given := engine_flags(session)):
        raise click.UsageError(f"{given[0]} is for a server started here, not for --url")
    check(asked)
    objective = Slo.parse(slo)
    count = requests or 16 * (clients or 2)
    arrivals = None
    if trace is not None:
        arrivals = read_trace(trace)
    elif rate is not None:
        arrivals = list(poisson(rate, count, asked["seed"]))
    short = [a.prompt_tokens for a in arrivals or () if a.prompt_tokens is not None]
    if short and min(short) <= asked["shared"]:
        raise click.UsageError(f"the trace has a prompt of {min(short)} tokens, not above --shared-prefix")
    prompts = Prompts(seed=asked["seed"], tokens=asked["prompt"], shared=asked["shared"])

    def make(number: int, arrival: Arrival | None = None) -> Ask:
        length = arrival.prompt_tokens if arrival else None
        tokens = arrival.output_tokens if arrival else None
        return Ask(prompt=prompts.text(number, length), max_tokens=tokens or asked["output"], seed=number)

    async def run(client: "Client") -> Loaded:
        await closed_loop(client, 1, 1, lambda _: make(-1))
        if arrivals is not None:
            return await open_loop(client, arrivals, make)
        return await closed_loop(client, clients or 4, count, make)

    with contextlib.ExitStack() as stack:
        server = None if url is not None else start_server(session, stack, server_flags(session))
        place = server.url if server else str(url)
        key = session.config.server.api_key
        threads = threads_of(session)
        model = model_at(session, place, key, named=session.config.origin("model") != "default")
        report.begin("serve", threads=threads, servers=[server.cpu_seconds] if server else None)
        loaded = run_loop(lambda: asking(place, model, key, asked, run))
        report.stop()
        notes = server.notes if server else []
    found = figures(loaded, mode="open" if arrivals is not None else "closed", slo=objective)
    settings = {
        **asked,
        "url": url,
        "server_flags": server.flags if server else [],
        "server_notes": notes,
        "model": model,
        "rate": rate,
        "trace": trace,
        "clients": None if arrivals is not None else clients or 4,
        "slo": objective,
        "threads": threads,
    }
    _show(report, found)
    ended = [o for o in loaded.outcomes if o.error is None]
    chart = Chart(
        title=f"{model}: {found.output_tok_s:.0f} output tok/s",
        x="seconds",
        y="share at or below",
        log_x=True,
        series=[
            cumulative(name, values)
            for name, values in (
                ("first token", [o.ttft for o in ended if o.ttft]),
                ("between tokens", [gap for o in ended for gap in o.gaps if gap > 0]),
                ("whole answer", [o.e2e for o in ended]),
            )
            if values
        ],
    )
    report.end(chart, settings=settings, figures=found, outcomes=loaded.outcomes)
    if found.errors:
        click.get_current_context().exit(1)


def _show(report: Report, found: "Figures") -> None:
    report.table(
        f"latency in ms, {found.mode} loop",
        ("", "p50", "p90", "p95", "p99", "most"),
        [
            ("first token (TTFT)", *milliseconds(found.ttft)),
            ("between tokens (ITL)", *milliseconds(found.itl)),
            ("whole answer (E2E)", *milliseconds(found.e2e)),
            *([("sent late", *milliseconds(found.late))] if found.late else []),
        ],
    )
    rows = [
        ("requests", f"{found.ok} of {found.requests} answered, {found.requests_s:.2f} a second"),
        ("output", f"{found.output_tok_s:.1f} tok/s, {found.output_tokens} tokens"),
        ("tokens counted by", found.tokens_counted_by),
        ("prompt tokens", _told(found.prompt_tokens)),
        ("of them cached", _told(found.cached_tokens)),
        ("client", f"{found.client_cores:.2f} cores"),
    ]
    if found.client_us_per_token is not None:
        rows[-1] = ("client", f"{rows[-1][1]}, {found.client_us_per_token:.0f} µs a token")
    if found.goodput_share is not None:
        rows.append(("goodput", f"{100 * found.goodput_share:.1f} %, {found.goodput_rps:.2f} a second"))
    rows += [(f"failed: {what}", str(count)) for what, count in sorted(found.errors.items())]
    report.table("load", ("", ""), rows)


def _told(count: int | None) -> str:
    return "not told" if count is None else str(count)
