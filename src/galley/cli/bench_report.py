"""Report: how every `galley bench` shows and keeps what it found."""

import secrets
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from galley.cli.terminal import print_table
from galley.config import colour_wanted
from galley.errors import GalleyError

if TYPE_CHECKING:
    from galley.bench.plot import Chart
    from galley.bench.record import Recorder
    from galley.bench.stats import Latency, Spread


class Report:
    """Tables on stdout; a record and a plot in files, where asked for.

    Args:
        json_file, plot_file: None for none. A plot that cannot be drawn is a ConfigError at once.
    """

    def __init__(self, json_file: Path | None, plot_file: Path | None) -> None:
        self._json = json_file
        self._plot = plot_file
        self._recorder: Recorder | None = None
        if plot_file is not None:
            from galley.bench.plot import check_plot

            check_plot(plot_file)

    def begin(self, kind: str, *, threads: int, servers: Sequence[Callable[[], float]] | None = ()) -> None:
        """Probe the machine; what is measured comes next. See ``Recorder``."""
        from galley.bench.record import Recorder

        self._recorder = Recorder(kind, ["galley", *sys.argv[1:]], threads=threads, servers=servers)

    def stop(self) -> None:
        """What is measured is over: probe again, while servers still run but do nothing."""
        assert self._recorder is not None
        self._recorder.stop()

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """First column left, the others right aligned."""
        bold = sys.stdout.isatty() and colour_wanted()
        click.echo(f"\n{click.style(title, bold=True) if bold else title}\n")
        print_table(head, rows, numbers=True)
        click.echo()

    def end(self, chart: "Chart | None", *, settings: dict[str, Any], **body: Any) -> None:
        """Tell both readings of the limits, write the files. Raises GalleyError where one cannot be."""
        assert self._recorder is not None
        record = self._recorder.record(settings=settings, **body)
        click.echo(self._recorder.line())
        try:
            self._write(record, chart)
        except OSError as error:
            raise GalleyError(f"the result cannot be written: {error}", code="bench_result") from error

    def _write(self, record: dict[str, Any], chart: "Chart | None") -> None:
        from galley.bench.plot import draw
        from galley.bench.record import save

        if self._json is not None:
            save(self._json, record)
            click.echo(f"written: {self._json}", err=True)
        if self._plot is not None:
            if chart is None or not any(series.points for series in chart.series):
                click.echo(f"nothing to draw: {self._plot} is not written", err=True)
                return
            draw(chart, self._plot)
            click.echo(f"written: {self._plot}", err=True)


def report_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--json`` and ``--plot``; the command gets a ``report``."""

    @click.option(
        "--json",
        "json_file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Keep the result, with all it depends on, as JSON.",
    )
    @click.option(
        "--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
        help="Draw it: .svg, or .png with the extra galley[bench].",
    )  # fmt: skip
    @wraps(command)
    def wrapped(*arguments: Any, json_file: Path | None, plot_file: Path | None, **options: Any) -> Any:
        return command(*arguments, report=Report(json_file, plot_file), **options)

    return wrapped


def _seed(context: click.Context, option: click.Parameter, value: int | None) -> int:
    return secrets.randbits(31) if value is None else value


seed_option = click.option(
    "--seed",
    type=int,
    metavar="N",
    callback=_seed,
    help="Prompts are drawn from it; default: a new one, so that no server has seen them. Results name it.",
)


def milliseconds(found: "Latency | None") -> tuple[str, ...]:
    """p50, p90, p95, p99 and the longest."""
    if found is None:
        return ("-",) * 5
    return tuple(f"{1e3 * t:.2f}" for t in (found.p50, found.p90, found.p95, found.p99, found.most))


def quartiles(found: "Spread | None", digits: int = 1) -> tuple[str, str]:
    """Median, and first to third quartile."""
    if found is None:
        return "-", "-"
    return f"{found.median:.{digits}f}", f"{found.low:.{digits}f}–{found.high:.{digits}f}"
