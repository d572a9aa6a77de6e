"""The catalog's file, table by table, as TOML gives it. What they mean together is ``catalog.Catalog``'s."""

from typing import Any, Literal

import msgspec

from galley.router.market.market import MarketTable

__all__ = [
    "Document",
    "Location",
    "Logical",
    "OfferTable",
    "PolicyTable",
    "ProviderTable",
    "RouteTable",
    "ShadowTable",
]

Location = Literal["local", "site", "cloud"]
"""``local``: this machine; ``site``: ours, elsewhere; ``cloud``: somebody else's."""
BASIC = ("chat", "completion")


class Logical(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[model]]``: what can be asked for.

    Attributes:
        quality: 0..1, the operator's or an evaluation's word; used to rank, never to exclude.
        tags: what it is good at (``code``, ``summary``, ``creative`` …).
        weights: sha256 that a local engine must serve, or empty.
        price: what it costs on this machine; default: the setting ``ledger.local_price``.
        fallback: logical models to go on with when no offer of this one answers, in order.
    """

    id: str
    aliases: list[str] = []
    capabilities: list[str] = msgspec.field(default_factory=lambda: list(BASIC))
    context: int = 4096
    max_output: int | None = None
    quality: float = 0.5
    tags: list[str] = []
    weights: str = ""
    fallback: list[str] = []
    price: list[dict[str, Any]] = []


class OfferTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[provider.offer]]``."""

    model: str
    name: str = ""
    """On the wire; default: the logical id."""
    context: int | None = None
    price: list[dict[str, Any]] = []


class ProviderTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[provider]]``: somebody who serves models. Keys come from ``key_env`` or ``key_file``, never from
    here."""

    name: str
    kind: Literal["openai", "anthropic"]
    url: str
    offer: list[OfferTable]
    location: Location = "cloud"
    region: str = ""
    key_env: str = ""
    key_file: str = ""
    price_id: str = ""
    """Provider id in genai-prices, e.g. ``openai``."""
    price_context: dict[str, str] = {}
    """How it is used, where that changes its prices: ``{ service_tier = "flex" }``, as genai-prices says."""
    extended: bool = False
    newer_limit: bool = False
    headers: dict[str, str] = {}
    connect_s: float = 5.0
    first_s: float = 60.0
    idle_s: float = 30.0
    slow_chars: int = 0
    slow_s: float = 5.0
    health_path: str = "/models"
    lacks: list[str] = []
    """Capabilities that this server cannot carry, though its kind can."""


class RouteTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[route]]``: a name that stands for a choice among models, by a policy."""

    name: str
    policy: Literal["fixed", "rules", "specialised", "learned", "cascade", "bandit", "factors"]
    models: list[str]
    options: dict[str, Any] = {}


class ShadowTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[shadow]]``: a share of finished requests is asked of another model too, and the answer thrown away.

    Attributes:
        of: a name that requests ask for (a model, an alias or a route).
        to: the logical model that is tried out.
        share: of the requests, 0..1.
        max_usd_day: most USD a day (UTC) that all mirrored requests of this table may cost.
        at_once: most of them at the same time; what comes beyond is not mirrored.
    """

    of: str
    to: str
    share: float
    max_usd_day: str = "0"
    at_once: int = 2


class PolicyTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[policy]``: what holds for every request. Nothing leaves the machine unless this says it may."""

    location: Literal["local-only", "local-first", "any"] = "local-only"
    regions: list[str] = []
    """Regions where a request may be served; empty is all. Local engines are always in region."""
    ceiling: dict[str, Any] | None = None
    """Price assumed of the unknown; without one they are refused."""
    max_usd: str | None = None
    """Most a single request may cost, in USD."""
    retries: int = 3
    """Most attempts after the first."""
    patience_s: float = 2.5
    """Longest wait, in all, while every eligible provider is rate-limited or its breaker is open; when it
    would take longer, the answer is a 503 with Retry-After at once."""
    retry_share: float = 0.2
    """Retries per request, over time, per upstream."""
    hedge_share: float = 0.05
    """Hedged requests per request, over time; 0 is off."""
    hedge_after_s: float | None = None
    """When to hedge; default: the 95th percentile of the time to the first output, once 50 are known."""
    deadline_s: float = 300.0


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    policy: PolicyTable = PolicyTable()
    model: list[Logical] = []
    provider: list[ProviderTable] = []
    route: list[RouteTable] = []
    shadow: list[ShadowTable] = []
    market: MarketTable | None = None
