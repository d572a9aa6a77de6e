"""List prices from the ``genai-prices`` package, which is offline and dated, as price versions of ours."""

from datetime import UTC, date, datetime, time
from decimal import ROUND_CEILING, Decimal
from typing import Any

from galley.economics.price import PriceVersion, Quality, Tier
from galley.errors import ConfigError

__all__ = ["packaged"]

FIELDS = (
    ("input", "input_mtok"),
    ("output", "output_mtok"),
    ("cached", "cache_read_mtok"),
    ("cache_write", "cache_write_mtok"),
    ("cache_write_1h", "cache_write_1h_mtok"),
)


def packaged(
    price_id: str, model: str, on: date, context: tuple[tuple[str, str], ...] = ()
) -> PriceVersion | None:
    """The price of a model at a provider on a day; None where the package has none.

    Prices by the length of the prompt become tiers, exactly. Prices that depend on the time of day are taken
    at their dearest and marked ``estimated``; so is a ``context`` for which the package has no price of its
    own, which gets the standard one. Raises ConfigError when the package is not installed.
    """
    try:
        from genai_prices.data_snapshot import get_snapshot
    except ImportError as error:
        raise ConfigError(
            "A provider of the catalog has a price_id, but the package genai-prices is not installed.",
            hint="pip install 'galley[prices]'",
        ) from error
    try:
        provider, info = get_snapshot().find_provider_model(model, None, price_id, None)
    except LookupError:
        return None
    how = dict(context)
    noon = datetime.combine(on, time(12), UTC)
    tables = [info.get_prices(noon, how or None)]
    quality: Quality = "exact"
    if how and not any(
        all(how.get(name) == value for name, value in variant.when.items())
        for variant in info.price_variants or ()
    ):
        quality = "estimated"
    if isinstance(info.prices, list) and any(hasattr(row.constraint, "start_time") for row in info.prices):
        tables += [row.prices for row in info.prices]
        quality = "estimated"
    starts = sorted(
        {
            tier.start
            for table in tables
            for _, field in FIELDS
            for tier in getattr(getattr(table, field, None), "tiers", ())
        }
    )
    base = units(tables, 0)
    if base is None:
        return None
    tiers = tuple(
        Tier(above=start, **found) for start in starts if (found := units(tables, start + 1)) is not None
    )
    request = [value for table in tables if (value := getattr(table, "requests_kcount", None)) is not None]
    suffix = "".join(f"#{name}={value}" for name, value in context)
    return PriceVersion(
        id=f"genai-prices/{provider.id}/{info.id}@{on.isoformat()}{suffix}",
        **base,
        request=max((whole(value, 1_000_000_000) for value in request), default=0),
        tiers=tiers,
        valid_from=on,
        quality=quality,
    )


def units(tables: list[Any], prompt_tokens: int) -> dict[str, Any] | None:
    """Pico-dollars a token for a prompt so long, the dearest of the tables; None without input and output."""
    found: dict[str, Any] = {}
    for name, field in FIELDS:
        amounts: list[Decimal] = []
        for table in tables:
            value = getattr(table, field, None)
            if value is None:
                continue
            amount = getattr(value, "base", value)
            for tier in getattr(value, "tiers", ()):
                if prompt_tokens > tier.start:
                    amount = tier.price
            amounts.append(amount)
        if amounts:
            found[name] = whole(max(amounts), 1_000_000)
    if "input" not in found or "output" not in found:
        return None
    found.setdefault("cached", found["input"])
    found.setdefault("cache_write", found["input"])
    return found


def whole(amount: Decimal, pico: int) -> int:
    """In pico-dollars, rounded up where a price is finer than that: never below the list."""
    return int((amount * pico).to_integral_value(ROUND_CEILING))
