"""From usage to money: what a request cost, what its tenant is charged, and what was saved against what."""

from collections.abc import Sequence

import msgspec

from galley.economics.acts import Entry, Subject, Sunk
from galley.economics.limits import revenue
from galley.economics.price import PriceVersion
from galley.types import Usage

__all__ = ["Bill", "Rival", "bill"]


class Rival(msgspec.Struct, frozen=True, kw_only=True):
    """The counterfactual of a routing choice: the dearest offer that was eligible (``model@provider``)."""

    name: str
    price: PriceVersion


class Bill(msgspec.Struct, frozen=True, kw_only=True):
    """The money of one request. Every part is the sum of its entries, to the last pico-dollar."""

    entries: tuple[Entry, ...]
    cost_pico: int
    revenue_pico: int
    saved: dict[str, int]


def bill(
    subject: Subject,
    provider: str,
    price: PriceVersion,
    usage: Usage,
    *,
    sunk: Sequence[Sunk] = (),
    rival: Rival | None = None,
    undiscounted: PriceVersion | None = None,
) -> Bill:
    """Entries of a settlement.

    Expense: a line for each kind of token, and one for each attempt that cost something without serving.
    Revenue: the cost over one minus the plan's margin. Savings, each against a counterfactual that its source
    account names: cached tokens at the input price; the same usage at the dearest eligible offer; the price
    before a batch's discount; accepted draft tokens at what the price says one saves.

    Args:
        undiscounted: the price had it been no line of a batch.
    """
    entries = [
        Entry(
            source=f"payable:{provider}",
            target=f"expense:{provider}",
            pico=line["pico"],
            version=line["price_version"],
            kind=line["kind"],
        )
        for line in price.lines(usage)
    ]
    entries += [
        Entry(
            source=f"payable:{lost.provider}",
            target=f"expense:{lost.provider}",
            pico=lost.pico,
            version=lost.version,
            kind="attempt",
        )
        for lost in sunk
        if lost.pico
    ]
    served = sum(entry.pico for entry in entries if entry.kind != "attempt")
    cost = sum(entry.pico for entry in entries)
    charged = revenue(cost, subject.margin)
    if charged:
        tenant = subject.party.tenant
        entries.append(
            Entry(
                source=f"revenue:{tenant}",
                target=f"receivable:{tenant}",
                pico=charged,
                version=price.id,
                kind="revenue",
            )
        )
    against = {
        "cache": ("uncached", usage.cached_tokens * (price.input - price.cached), price.id),
        "speculation": ("undrafted", usage.accepted_tokens * price.draft_saving, price.id),
    }
    if rival is not None:
        against["route"] = (rival.name, rival.price.price(usage) - served, rival.price.id)
    if undiscounted is not None:
        against["batch"] = ("interactive", undiscounted.price(usage) - served, undiscounted.id)
    saved = {what: pico for what, (_, pico, _) in against.items() if pico > 0}
    entries += [
        Entry(
            source=f"counterfactual:{against[what][0]}",
            target=f"saving:{what}",
            pico=pico,
            version=against[what][2],
            kind="saving",
        )
        for what, pico in saved.items()
    ]
    return Bill(entries=tuple(entries), cost_pico=cost, revenue_pico=charged, saved=saved)
