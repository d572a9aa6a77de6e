"""How a request was routed: parts of a receipt, named from ``galley.types``."""

from typing import Literal

import msgspec

from galley.usage import Resources, Usage

__all__ = ["Attempt", "Judgement", "Route"]


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Which model and provider, and why, in full."""

    model: str
    provider: str
    rule: str
    """The rule that chose, e.g. ``fixed``."""
    reason: str = ""
    location: str = "local"
    scores: dict[str, float] = {}
    propensity: float = 1.0
    price_version: str | None = None
    candidates: list[str] = []
    """What was eligible, ``model@provider``, in the order it would be tried."""
    refused: dict[str, str] = {}
    """What was not eligible, and why."""
    quote_pico: int | None = None
    """Most pico-dollars the chosen offer may cost."""
    asked: str = ""
    """The name that was asked for: a model, an alias or a route."""
    kind: str = ""
    """Kind of work that the policy saw in the prompt, where it looked for one."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One call made for a request. All of them are on the receipt, the hedged loser's too."""

    provider: str
    model: str
    outcome: Literal["won", "failed", "lost", "cancelled", "escalated"]
    """``lost``: cancelled because another attempt was faster; ``escalated``: it answered, but a cascade was
    not sure enough of the answer."""
    at_s: float
    """Seconds after arrival."""
    took_s: float
    """Until its commit point, failure or cancellation."""
    kind: str = ""
    """Class of the failure."""
    status: int | None = None
    """HTTP status, when one came."""
    hedge: bool = False
    probe: bool = False
    """It also tested whether a failed upstream is back."""
    pico: int = 0
    """Pico-dollars it is taken to have cost without serving; of the one that served, see the price lines."""


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """What a cascade made of its first model's answer.

    Attributes:
        first: the offer that answered first, ``model@provider``.
        confidence: calibrated probability that its answer is good; None when it could not be judged.
        needed: the least that was enough.
        escalated: whether another model's answer was given instead; ``to`` is its offer.
        reason: in words; also why an unsure answer was kept, or a sure one was not.
        signals: what was read off its log-probabilities, by name.
        tokens: completion tokens that were read.
        took_s: seconds from its commit to the decision.
        usage, resources: of the first attempt when it was not the answer; zeros when it was.
    """

    first: str
    confidence: float | None
    needed: float
    escalated: bool
    to: str = ""
    reason: str = ""
    signals: dict[str, float] = {}
    tokens: int = 0
    took_s: float = 0.0
    usage: Usage = Usage()
    resources: Resources = Resources()
