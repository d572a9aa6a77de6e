"""Several servers under the same load, taking turns: a machine that changes is fair to all."""

from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from galley.bench.client import Ask, Client
from galley.bench.load import Figures, closed_loop, figures
from galley.bench.machine import Placement
from galley.bench.stats import Latency, Spread, spread

__all__ = ["Round", "Row", "compare", "summarise"]


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """Every contestant once, on the same prompts, in the order of ``figures``."""

    before: Placement | None
    after: Placement | None
    figures: dict[str, Figures]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One contestant over all rounds; ratios are taken within rounds and say how much better the first is.

    Attributes:
        rate_ratio: the first's output rate over this one's.
        ttft_ratio, itl_ratio: this one's median over the first's. All None for the first itself, and where
            one of the two gave no figure in some round.
        errors: answers that failed, of all rounds.
    """

    name: str
    output_tok_s: Spread
    ttft_p50: Spread | None
    itl_p50: Spread | None
    itl_p99: Spread | None
    e2e_p50: Spread | None
    errors: int
    rate_ratio: Spread | None
    ttft_ratio: Spread | None
    itl_ratio: Spread | None


async def compare(
    contestants: dict[str, Client],
    make: Callable[[int, int], Ask],
    *,
    rounds: int,
    clients: int,
    requests: int,
    threads: int,
    told: Callable[[str], None] = lambda line: None,
) -> list[Round]:
    """Closed loop of ``clients`` on each contestant in turn; the order turns round after every round.

    Args:
        make: request of (round, number): the same for all contestants, never the same in two rounds. Round
            -1 is for warming up.
        threads: for the probes around a round.
        told: a line of progress.
    """
    for client in contestants.values():
        await closed_loop(client, clients, min(2, requests), lambda number: make(-1, number))
    found = []
    names = list(contestants)
    for number in range(rounds):
        before = Placement.probe(threads, seconds=0.2)
        taken: dict[str, Figures] = {}
        for name in names if number % 2 == 0 else reversed(names):
            loaded = await closed_loop(contestants[name], clients, requests, partial(make, number))
            taken[name] = figures(loaded, mode="closed")
            told(f"round {number + 1} of {rounds}: {name}: {taken[name].output_tok_s:.1f} tok/s")
        found.append(Round(before=before, after=Placement.probe(threads, seconds=0.2), figures=taken))
    return found


def summarise(rounds: Sequence[Round], names: Sequence[str]) -> list[Row]:
    """Rows in the order of ``names``; the first is what the others are held against."""
    first = names[0]
    rows = []
    for name in names:
        own = [r.figures[name] for r in rounds]
        other = [r.figures[first] for r in rounds]
        rates = [(a.output_tok_s, b.output_tok_s) for a, b in zip(other, own, strict=True)]
        itl = [f.itl for f in own]
        again = name == first
        counts = not again and all(b > 0 for _, b in rates)
        rows.append(
            Row(
                name=name,
                output_tok_s=spread(f.output_tok_s for f in own),
                ttft_p50=_middle([f.ttft for f in own], "p50"),
                itl_p50=_middle(itl, "p50"),
                itl_p99=_middle(itl, "p99"),
                e2e_p50=_middle([f.e2e for f in own], "p50"),
                errors=sum(f.requests - f.ok for f in own),
                rate_ratio=spread(a / b for a, b in rates) if counts else None,
                ttft_ratio=None if again else _ratio([f.ttft for f in own], [f.ttft for f in other]),
                itl_ratio=None if again else _ratio(itl, [f.itl for f in other]),
            )
        )
    return rows


def _middle(found: Sequence[Latency | None], name: str) -> Spread | None:
    values = [getattr(one, name) for one in found if one is not None]
    return spread(values) if values and len(values) == len(found) else None


def _ratio(own: Sequence[Latency | None], first: Sequence[Latency | None]) -> Spread | None:
    pairs = [(a.p50, b.p50) for a, b in zip(own, first, strict=True) if a is not None and b is not None]
    if len(pairs) != len(own) or any(b <= 0 for _, b in pairs):
        return None
    return spread(a / b for a, b in pairs)
