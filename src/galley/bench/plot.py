"""Plots: SVG written here, PNG by matplotlib where the extra ``bench`` is installed."""

import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import msgspec

from galley.errors import ConfigError

__all__ = ["Chart", "Series", "check_plot", "cumulative", "draw", "svg"]

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 44, 56
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8f5db7", "#c98a1b", "#4d4d4d")


class Series(msgspec.Struct, frozen=True):
    """A line of (x, y), in order of x."""

    name: str
    points: list[tuple[float, float]]
    dashed: bool = False


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """What to draw. On a logarithmic axis values must be above zero."""

    title: str
    x: str
    y: str
    series: list[Series]
    log_x: bool = False
    log_y: bool = False


def check_plot(path: Path) -> None:
    """Whether ``draw`` can write there, told before anything is measured.

    Raises ConfigError: neither .svg nor .png, or PNG without matplotlib.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise ConfigError(f"{path}: a plot is a .svg or a .png file", param="plot")
    if path.suffix.lower() == ".png":
        try:
            import_module("matplotlib")
        except ImportError as error:
            raise ConfigError(
                "PNG plots are drawn by matplotlib, which is not installed.",
                param="plot",
                hint="pip install 'galley[bench]', or name an .svg file",
            ) from error


def draw(chart: Chart, path: Path) -> None:
    """Write the chart. Raises what ``check_plot`` raises, ValueError for a chart without points, OSError."""
    check_plot(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".svg":
        path.write_text(svg(chart), encoding="utf-8")
    else:
        _png(chart, path)


def svg(chart: Chart) -> str:
    """The chart as an SVG document. Raises ValueError when there is nothing to draw."""
    across = [x for s in chart.series for x, _ in s.points]
    up = [y for s in chart.series for _, y in s.points]
    xs = Axis.over(across, log=chart.log_x, low=LEFT, high=WIDTH - RIGHT)
    ys = Axis.over(up, log=chart.log_y, low=HEIGHT - BOTTOM, high=TOP)
    return "\n".join(_lines(chart, xs, ys)) + "\n"


class Axis:
    """Values to places in pixels, linear or logarithmic, and where the ticks go."""

    def __init__(self, least: float, most: float, *, log: bool, low: float, high: float) -> None:
        self.log = log
        self._low, self._high = low, high
        if log:
            first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
            steps = (1,) if last - first > 3 else (1, 2, 5)
            marks = [k * 10.0**power for power in range(first - 1, last + 2) for k in steps]
            below = max(mark for mark in marks if mark <= least)
            above = min(mark for mark in marks if mark >= most and mark > below)
            self.ticks = [mark for mark in marks if below <= mark <= above]
            least, most = below, above
        else:
            step = _step((most - least) or abs(most) or 1.0)
            first, last = math.floor(least / step), math.ceil(most / step)
            last += first == last
            self.ticks = [step * k for k in range(first, last + 1)]
            least, most = self.ticks[0], self.ticks[-1]
        self._least, self._most = self._scale(least), self._scale(most)

    @classmethod
    def over(cls, values: Sequence[float], *, log: bool, low: float, high: float) -> "Axis":
        """An axis that shows all values; a linear one of positive values begins at zero."""
        if not values or not all(math.isfinite(v) for v in values):
            raise ValueError("nothing to draw, or a value that is not finite")
        if log and min(values) <= 0:
            raise ValueError("a logarithmic axis has no place for zero")
        least = min(values) if log else min(0.0, *values)
        return cls(least, max(values), log=log, low=low, high=high)

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def at(self, value: float) -> float:
        """Pixels."""
        share = (self._scale(value) - self._least) / (self._most - self._least)
        return self._low + share * (self._high - self._low)


def _step(span: float) -> float:
    """A round step that gives four to eight ticks: 1, 2 or 5 times a power of ten."""
    rough = span / 6
    power = 10.0 ** math.floor(math.log10(rough))
    return next(k * power for k in (1.0, 2.0, 5.0, 10.0) if k * power >= rough)


def _text(x: float, y: float, words: str, *, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'


def _lines(chart: Chart, xs: Axis, ys: Axis) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="#222">'
    )
    yield f"<title>{escape(chart.title)}</title>"
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    yield _text(LEFT, 24, chart.title, anchor="start", more=' font-size="15" font-weight="bold"')
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    for tick in xs.ticks:
        x = xs.at(tick)
        yield f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>'
        yield _text(x, bottom + 18, f"{tick:g}")
    for tick in ys.ticks:
        y = ys.at(tick)
        yield f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>'
        yield _text(left - 8, y + 4, f"{tick:g}", anchor="end")
    yield f'<polyline points="{left},{top} {left},{bottom} {right},{bottom}" fill="none" stroke="#222"/>'
    yield _text((left + right) / 2, HEIGHT - 14, chart.x)
    middle = (top + bottom) / 2
    yield _text(18, middle, chart.y, more=f' transform="rotate(-90 18 {middle:.1f})"')
    for number, series in enumerate(chart.series):
        colour = COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="6 4"' if series.dashed else ""
        places = [(xs.at(x), ys.at(y)) for x, y in series.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        if len(places) <= 30 and not series.dashed:
            for x, y in places:
                yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
        y = top + 10 + 20 * number
        yield (
            f'<line x1="{right + 14}" y1="{y}" x2="{right + 38}" y2="{y}" stroke="{colour}" '
            f'stroke-width="2"{dash}/>'
        )
        yield _text(right + 44, y + 4, series.name, anchor="start")
    yield "</svg>"


def _png(chart: Chart, path: Path) -> None:
    # The object interface: no window system, no global state.
    backend: Any = import_module("matplotlib.backends.backend_agg")
    figure: Any = import_module("matplotlib.figure").Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=150)
    backend.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, series in enumerate(chart.series):
        axes.plot(
            [x for x, _ in series.points],
            [y for _, y in series.points],
            label=series.name,
            color=COLOURS[number % len(COLOURS)],
            linestyle="--" if series.dashed else "-",
            marker="" if series.dashed or len(series.points) > 30 else "o",
        )
    axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    axes.grid(visible=True, color="#ddd")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})


def cumulative(name: str, values: Sequence[float], *, most: int = 200) -> Series:
    """The share of values at or below each, as a line of at most ``most`` points."""
    ordered = sorted(values)
    count = len(ordered)
    picked: Sequence[int] = range(count)
    if count > most:
        picked = sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})
    return Series(name, [(ordered[k], (k + 1) / count) for k in picked])
