"""The page of ``galley cost --html``: the tables of a report, and plots of it. One file, nothing fetched."""

import calendar
from collections.abc import Iterator
from datetime import date
from html import escape

from galley.bench.plot import Chart, Series, svg
from galley.economics.report import Report
from galley.economics.sheet import Sheet, sheets

__all__ = ["page"]

STYLE = (
    "body{font:14px/1.4 sans-serif;margin:2em auto;max-width:72em;color:#222}"
    "table{border-collapse:collapse;margin:0 0 1.5em}"
    "th,td{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}"
    "tr.total td{font-weight:bold;border-top:2px solid #222}"
    "td{font-variant-numeric:tabular-nums}svg{max-width:100%;height:auto}"
)
DOLLAR = 10**12


def page(report: Report) -> str:
    """An HTML document. The tables hold the exact figures of ``sheets``; only the plots are rounded."""
    title = f"Cost from {report.since} to before {report.until}"
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *(svg(chart) for chart in charts(report)),
            *(line for each in sheets(report) for line in table(each)),
            "</body></html>",
            "",
        ]
    )


def table(sheet: Sheet) -> Iterator[str]:
    """A table with its heading; whatever came from a request is escaped."""
    yield f"<h2>{escape(sheet.title)}</h2>"
    if sheet.note:
        yield f"<p>{escape(sheet.note)}</p>"
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in sheet.head)
    yield f"<table><thead><tr>{cells}</tr></thead><tbody>"
    for number, row in enumerate(sheet.rows):
        kind = ' class="total"' if number >= len(sheet.rows) - sheet.totals else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        yield f"<tr{kind}>{cells}</tr>"
    yield "</tbody></table>"


def charts(report: Report) -> Iterator[Chart]:
    """Money by day, and the month's spending added up with where it may end; what has no data is left out."""
    first = date.fromisoformat(report.since)

    def place(day: object) -> int:
        return (date.fromisoformat(str(day)) - first).days + 1

    shown = [each for each in report.days if report.since <= str(each.key[0]) < report.until]
    if shown:
        lines = {
            "cost": [(float(place(e.key[0])), e.cost_pico / DOLLAR) for e in shown],
            "revenue": [(float(place(e.key[0])), e.revenue_pico / DOLLAR) for e in shown],
            "saved": [(float(place(e.key[0])), e.saved_pico / DOLLAR) for e in shown],
        }
        yield Chart(
            title="Dollars a day",
            x=f"day, {report.since} is 1",
            y="USD",
            series=[Series(name, points) for name, points in lines.items()],
        )
    ahead = report.forecast
    if ahead is not None:
        spent, so_far = 0, []
        for each in report.days:
            day = str(each.key[0])
            if day[:7] == ahead.month:
                spent += each.cost_pico
                so_far.append((float(day[8:]), spent / DOLLAR))
        end = float(calendar.monthrange(int(ahead.month[:4]), int(ahead.month[5:]))[1])
        begin = so_far[-1] if so_far else (1.0, 0.0)
        ends = (("estimate", ahead.estimate), ("low, 90 %", ahead.low), ("high, 90 %", ahead.high))
        yield Chart(
            title=f"Spending of {ahead.month}, added up",
            x="day of the month",
            y="USD",
            series=[
                Series("spent", so_far or [begin]),
                *(Series(name, [begin, (end, pico / DOLLAR)], dashed=True) for name, pico in ends),
            ],
        )
