"""`galley bench`: time Galley, in this process and over HTTP, beside what the machine can do."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from galley.cli.bench_compare import compare
from galley.cli.bench_report import Report, milliseconds, quartiles, report_options, seed_option
from galley.cli.bench_serve import serve
from galley.cli.session import ENGINE_FLAGS, Session, settings_options

if TYPE_CHECKING:
    from galley.providers.opened import Opened
    from galley.runtime.backend.base import Backend

MODEL_FLAG = {"model": ("--model", "MODEL", "Model to time: a name, an alias or a path.")}
POSITIVE = click.IntRange(min=1)


@click.group()
def bench() -> None:
    """Time Galley beside what the machine can do.

    Every result names processor, instruction set, versions, settings and commit, and the machine's limits are
    probed before and after it. Leave the machine alone meanwhile. docs/PERFORMANCE.md says how to read them.
    """


bench.add_command(serve)
bench.add_command(compare)


def numbers(context: click.Context, option: click.Parameter, value: str) -> list[int]:
    """``1,4,16`` as ascending numbers."""
    try:
        found = sorted({int(part) for part in value.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise click.BadParameter("numbers above zero, separated by commas, are wanted", context, option)
    return found


def prompt_options(prompt: int, output: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Lengths and seed."""

    def wrap(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            seed_option,
            click.option(
                "--shared-prefix", "shared", type=click.IntRange(min=0), default=0, metavar="N",
                help="Prompt tokens that all prompts have in common; else none are.",
            ),
            click.option(
                "--output-tokens", "output", type=POSITIVE, default=output, show_default=True, metavar="N"
            ),
            click.option(
                "--prompt-tokens", "prompt", type=POSITIVE, default=prompt, show_default=True, metavar="N"
            ),
        ):  # fmt: skip
            command = option(command)
        return command

    return wrap


@contextlib.contextmanager
def running(session: Session) -> "Iterator[Opened]":
    """The configured model on a started engine; its notes are told on stderr."""
    from galley.providers.opened import EngineOptions, Opened

    config = session.config
    entry = session.store.resolve(config.model)
    options = EngineOptions(**{key: getattr(config.engine, key) for key in EngineOptions.__struct_fields__})
    with contextlib.closing(Opened(entry.path, entry.name, options, costs=config.home / "cost")) as opened:
        for note in opened.notes:
            click.echo(f"galley: {note}", err=True)
        yield opened


def about(backend: "Backend", model: str, **more: Any) -> dict[str, Any]:
    """Settings of a measurement in this process."""
    return {
        "model": model,
        "backend": backend.name,
        "isa": backend.isa,
        "threads": backend.threads,
        "kernels": backend.fingerprint,
        "weight_bytes": backend.weight_bytes,
        **more,
    }


def drawn(opened: "Opened", **asked: Any) -> "Callable[[int], list[int]]":
    """Prompts as ids of the model's own vocabulary. Raises UsageError when they cannot share so much."""
    from galley.bench.prompts import Prompts

    if asked["shared"] >= asked["tokens"]:
        raise click.UsageError("--shared-prefix must be smaller than --prompt-tokens")
    prompts = Prompts(**asked)
    vocab = range(opened.engine.backend.spec.vocab)
    return lambda number: prompts.ids(number, vocab)


@bench.command()
@settings_options({**MODEL_FLAG, **ENGINE_FLAGS})
@prompt_options(128, 128)
@click.option("--repeats", type=POSITIVE, default=5, show_default=True)
@report_options
@click.pass_obj
def latency(
    session: Session,
    /,
    *,
    report: Report,
    prompt: int,
    output: int,
    shared: int,
    seed: int,
    repeats: int,
) -> None:
    """One stream through the engine: time to the first token and between tokens."""
    from galley.bench.offline import latency as measure
    from galley.bench.plot import Chart, cumulative

    with running(session) as opened:
        backend, draw = opened.engine.backend, drawn(opened, seed=seed, tokens=prompt, shared=shared)
        report.begin("latency", threads=backend.threads)
        measure(opened.engine, [draw(-1)], min(output, 4))
        found = measure(opened.engine, [draw(number) for number in range(repeats)], output)
        report.stop()
        settings = about(backend, opened.model.name, repeats=repeats, seed=seed, shared_prefix=shared)
    rows = [
        ("time to first token", milliseconds(found.ttft)),
        ("between tokens", milliseconds(found.itl)),
        ("whole answer", milliseconds(found.e2e)),
    ]
    report.table(
        "latency in ms", ("", "p50", "p90", "p95", "p99", "most"), [(n, *cells) for n, cells in rows]
    )
    report.table(
        "tokens a second",
        ("", "median", "quartiles"),
        [("prefill", *quartiles(found.prefill_tok_s)), ("decode", *quartiles(found.decode_tok_s))],
    )
    if found.cached_tokens:
        click.echo(f"{found.cached_tokens} prompt tokens came from the prefix cache", err=True)
    chart = None
    if found.gaps:
        title = f"{settings['model']}, {backend.threads} threads: time between tokens"
        line = cumulative("one stream", [1e3 * gap for gap in found.gaps])
        chart = Chart(title=title, x="ms", y="share of tokens", series=[line])
    report.end(chart, settings=settings, figures=found)


@bench.command()
@settings_options({**MODEL_FLAG, **ENGINE_FLAGS})
@prompt_options(128, 64)
@click.option(
    "--streams", default="1,4,16", show_default=True, metavar="N,…", callback=numbers, help="Batch sizes."
)
@click.option("--repeats", type=POSITIVE, default=3, show_default=True)
@report_options
@click.pass_obj
def throughput(
    session: Session,
    /,
    *,
    report: Report,
    prompt: int,
    output: int,
    shared: int,
    seed: int,
    repeats: int,
    streams: list[int],
) -> None:
    """Many streams through the engine at once: tokens a second."""
    from galley.bench.offline import throughput as measure
    from galley.bench.plot import Chart, Series

    found = []
    with running(session) as opened:
        backend, draw = opened.engine.backend, drawn(opened, seed=seed, tokens=prompt, shared=shared)
        report.begin("throughput", threads=backend.threads)
        measure(opened.engine, [[draw(-1)]], min(output, 4))
        number = 0
        for count in streams:
            rounds = [[draw(number + r * count + k) for k in range(count)] for r in range(repeats)]
            number += repeats * count
            found.append(measure(opened.engine, rounds, output))
        report.stop()
        settings = about(backend, opened.model.name, repeats=repeats, seed=seed, shared_prefix=shared)
    head = ("streams", "output tok/s", "quartiles", "decode tok/s", "quartiles", "TTFT p50 ms")
    report.table(
        f"prompts of {prompt}, {output} tokens out",
        head,
        [
            (
                str(one.streams),
                *quartiles(one.output_tok_s),
                *quartiles(one.decode_tok_s),
                f"{1e3 * one.ttft.p50:.1f}",
            )
            for one in found
        ],
    )
    if cached := sum(one.cached_tokens for one in found):
        click.echo(f"{cached} prompt tokens came from the prefix cache", err=True)
    chart = Chart(
        title=f"{settings['model']}, {backend.threads} threads",
        x="streams at once",
        y="tokens a second",
        series=[
            Series("output", [(float(one.streams), one.output_tok_s.median) for one in found]),
            Series(
                "decode only",
                [(float(one.streams), one.decode_tok_s.median) for one in found if one.decode_tok_s],
            ),
        ],
    )
    report.end(chart, settings=settings, figures=found)


@bench.command()
@settings_options(
    {
        **MODEL_FLAG,
        **{
            key: ENGINE_FLAGS[key]
            for key in ("engine.backend", "engine.isa", "engine.kv_type", "engine.threads")
        },
    }
)
@click.option(
    "--sizes", default="1,2,4,8,16,32,64,512", show_default=True, metavar="N,…", callback=numbers,
    help="Tokens in a step; above 64 those of one prompt, else of as many sequences.",
)  # fmt: skip
@click.option("--repeats", type=POSITIVE, default=5, show_default=True)
@report_options
@click.pass_obj
def roofline(session: Session, /, *, report: Report, sizes: list[int], repeats: int) -> None:
    """Bytes and operations a second of single steps, beside the machine's limits."""
    from galley.bench.roofline import blocks_for, chart
    from galley.bench.roofline import roofline as measure
    from galley.model.model import Model
    from galley.runtime.backend import open_backend

    config = session.config
    entry = session.store.resolve(config.model)
    with contextlib.closing(Model.open(entry.path, entry.name)) as model:
        if max(sizes) > model.spec.context:
            raise click.UsageError(f"--sizes: the model's context is {model.spec.context} tokens")
        opened = open_backend(
            config.engine.backend,
            model.gguf,
            model.spec,
            threads=config.engine.threads,
            num_blocks=blocks_for(sizes, 16),
            isa=config.engine.isa,
            kv_type=config.engine.kv_type,
        )
        if opened.warning:
            click.echo(f"galley: warning: {opened.warning}", err=True)
        with contextlib.closing(opened.backend) as backend:
            report.begin("roofline", threads=backend.threads)
            points = measure(backend, sizes, repeats=repeats)
            report.stop()
            settings = about(backend, entry.name, repeats=repeats)
    head = (
        "tokens",
        "ms",
        "quartiles",
        "GB/s",
        "GOP/s",
        "limit",
        "of the limit",
        "GB/s there",
        "GOP/s there",
    )
    report.table(
        f"{settings['model']}, {backend.threads} threads, {backend.isa}",
        head,
        [
            (
                str(p.tokens),
                f"{1e3 * p.seconds.median:.2f}",
                f"{1e3 * p.seconds.low:.2f}–{1e3 * p.seconds.high:.2f}",
                f"{p.gb_s:.1f}",
                f"{p.gop_s:.0f}",
                p.limit,
                f"{100 * p.share:.0f} %",
                f"{p.read_gb_s:.1f}",
                f"{p.int8_gop_s:.0f}",
            )
            for p in points
        ],
    )
    report.end(chart(points, f"{settings['model']}: steps under the roof"), settings=settings, figures=points)
