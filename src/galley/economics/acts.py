"""What can be done to the ledger: open, extend, renew, settle. Plain messages: many go in one commit."""

from typing import Any, Literal

import msgspec

from galley.economics.amount import Amount
from galley.economics.limits import Margin
from galley.economics.price import PriceVersion
from galley.economics.scope import Party
from galley.errors import GalleyError
from galley.types import Usage

__all__ = [
    "Act",
    "Entry",
    "Extension",
    "Grant",
    "Opening",
    "QuotaExceeded",
    "Rate",
    "RateExceeded",
    "Renewal",
    "Settlement",
    "Subject",
    "Sunk",
]


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """Who asked for what: the names that a charge is grouped by."""

    party: Party
    api: str = ""
    model: str = ""
    provider: str = ""
    local: bool = True
    """Whether that is an engine of this machine."""
    plan: str | None = None
    margin: Margin = Margin(0)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """Money that moves between two accounts outside any scope. ``pico`` is at least 0."""

    source: str
    target: str
    pico: int
    version: str
    kind: str


class Sunk(msgspec.Struct, frozen=True, kw_only=True):
    """What an attempt that did not serve has cost."""

    provider: str
    pico: int
    version: str


class Opening(msgspec.Struct, frozen=True, kw_only=True):
    """Reserve the most a request can cost, in all its scopes or in none.

    Attributes:
        id: the receipt's; one reservation a request.
        need: worst case.
        rate_tokens: the likely tokens, for the rates of a minute.
        owner: names the process and its board (``Board.owner``).
        enforce: False records it whatever the limits say: for what has run already.
    """

    id: str
    subject: Subject
    need: Amount
    rate_tokens: int
    price: PriceVersion
    owner: str
    now_us: int
    day: str
    lease_us: int
    prompt_tokens: int = 0
    enforce: bool = True


class Extension(msgspec.Struct, frozen=True, kw_only=True):
    """Reserve more for a request: another attempt at another price.

    Attributes:
        sunk: what the attempts so far have cost, as far as is known.
    """

    id: str
    number: int
    need: Amount
    price: PriceVersion
    provider: str
    model: str
    local: bool
    now_us: int
    sunk: tuple[Sunk, ...] = ()


class Renewal(msgspec.Struct, frozen=True, kw_only=True):
    """A longer lease, with the progress so far: what is billed should process and machine be gone."""

    id: str
    lease_us: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Settlement(msgspec.Struct, frozen=True, kw_only=True):
    """What a request really cost. Of several for one reservation the first counts.

    Attributes:
        entries: expense, revenue and savings.
        outcome: ``settled`` by its own process; ``expired`` by a reaper, on what was known.
        opening: recorded first, should there be no reservation.
        stale_us: only if the lease still ends before this: a reaper's.
    """

    id: str
    spent: Amount
    usage: Usage
    entries: tuple[Entry, ...]
    price: PriceVersion
    provider: str
    model: str
    now_us: int
    prices: tuple[PriceVersion, ...] = ()
    """Others that the entries name."""
    outcome: Literal["settled", "expired"] = "settled"
    estimated: bool = False
    status: str = "ok"
    opening: Opening | None = None
    stale_us: int | None = None


Act = Opening | Extension | Renewal | Settlement


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """For ``x-ratelimit-*``: the tightest limit on a resource after this request was let in."""

    resource: Literal["requests", "tokens"]
    scope: str
    limit: int
    remaining: int
    reset_s: float


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """The request may run.

    Attributes:
        txn: the ledger's transaction.
        scopes: where it is counted.
        warnings: soft limits that it crosses.
        left_pico: least money left in a hard money limit, worst cases taken off; None without one.
    """

    txn: str
    subject: Subject
    scopes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    rates: tuple[Rate, ...] = ()
    left_pico: int | None = None


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of a settlement: its transaction, and whether this call made it."""

    txn: str
    first: bool = True
    adjusted: bool = False


class QuotaExceeded(GalleyError):
    """A budget over a day, a month or for good does not cover the request's worst case. ``extra`` has scope,
    limit, window, what is spent and held, and what was asked for."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"
    retryable = False
    exit_code = 5


class RateExceeded(GalleyError):
    """A limit a minute, or on requests under way. ``extra`` names scope and limit."""

    rates: tuple[Rate, ...] = ()

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"
    retryable = True
    exit_code = 5


def quota_exceeded(
    *, scope: str, name: str, most: int, spent: int, held: int, asked: int, shown: Any, resets_s: float | None
) -> QuotaExceeded:
    """The refusal that names everything. ``shown`` writes an amount of the resource in words."""
    resource, _, window = name.partition("_")
    period = {"day": "today", "month": "this month", "total": "in all"}[window]
    return QuotaExceeded(
        f"The budget of {scope} is used up: {resource} {period} is limited to {shown(most)}; "
        f"{shown(spent)} are spent and {shown(held)} held for running requests, and this request may need "
        f"{shown(asked)}.",
        hint="Ask for fewer tokens (max_tokens), or raise it: galley budget set " + scope,
        extra={
            "scope": scope,
            "limit": name,
            "most": str(most),
            "spent": str(spent),
            "reserved": str(held),
            "asked": str(asked),
            **({} if resets_s is None else {"resets_s": round(resets_s)}),
        },
    )
