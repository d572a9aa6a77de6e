"""Fifty and more worked examples: our pico-dollars against the package's own decimal arithmetic."""

import itertools
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import pytest
from genai_prices import Usage as TheirUsage
from genai_prices.data_snapshot import get_snapshot

from galley.economics.packaged import packaged
from galley.economics.price import PriceBook, UnknownPrice
from galley.usage import Usage

DAY = date(2026, 11, 1)
PROVIDERS = ("openai", "anthropic", "google", "groq", "mistral", "deepseek", "fireworks", "x-ai", "together")
OURS = {"input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok", "cache_write_1h_mtok"}
PLAIN = Usage(prompt_tokens=12_345, completion_tokens=678)
CACHED = Usage(prompt_tokens=50_000, cached_tokens=30_001, cache_write_tokens=0, completion_tokens=77)
WRITTEN = Usage(prompt_tokens=9_000, cached_tokens=2_000, cache_write_tokens=3_001, completion_tokens=10)
HOUR = Usage(
    prompt_tokens=9_000,
    cached_tokens=2_000,
    cache_write_tokens=3_001,
    cache_write_ttl={"1h": 1_000},
    completion_tokens=10,
)


def theirs(price_id: str, model: str, usage: Usage, context: dict[str, str] | None = None) -> Decimal:
    """What the package makes of it, in dollars."""
    provider, info = get_snapshot().find_provider_model(model, None, price_id, None)
    given: dict[str, Any] = {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
    if usage.cached_tokens:
        given["cache_read_tokens"] = usage.cached_tokens
    if usage.cache_write_tokens:
        given["cache_write_tokens"] = usage.cache_write_tokens
    if usage.cache_write_ttl.get("1h"):
        given["cache_write_1h_tokens"] = usage.cache_write_ttl["1h"]
    at = datetime.combine(DAY, time(12), UTC)
    found = info.calc_price(TheirUsage(**given), provider, genai_request_timestamp=at, price_context=context)
    return Decimal(found.total_price)


def models(price_id: str) -> list[Any]:
    """Those of a provider that are found by their own name."""
    snapshot = get_snapshot()
    found = []
    for provider in snapshot.providers:
        for info in provider.models if provider.id == price_id else ():
            try:
                if snapshot.find_provider_model(info.id, None, price_id, None)[1] is info:
                    found.append(info)
            except LookupError:
                continue
    return found


def known(
    price_id: str, *wanted: str, tiered: bool = False, context: dict[str, str] | None = None
) -> list[str]:
    """Models there with a price for all of ``wanted``, on the day."""
    found = []
    for info in models(price_id):
        if isinstance(info.prices, list) and any(
            hasattr(row.constraint, "start_time") for row in info.prices
        ):
            continue
        row = info.get_prices(datetime.combine(DAY, time(12), UTC), context)
        fields = {name for name, value in row.__dict__.items() if value is not None}
        if not {"input_mtok", "output_mtok", *wanted} <= fields:
            continue
        if fields - {
            "input_mtok",
            "output_mtok",
            "cache_read_mtok",
            "cache_write_mtok",
            "cache_write_1h_mtok",
        }:
            continue
        tiers = any(hasattr(value, "tiers") for value in row.__dict__.values())
        if tiers != tiered:
            continue
        if context is not None and not any(
            all(context.get(k) == v for k, v in each.when.items()) for each in info.price_variants or ()
        ):
            continue
        found.append(info.id)
    return found


def examples() -> list[tuple[str, str, Usage, dict[str, str] | None]]:
    """At most a dozen models a provider and kind."""
    found: list[tuple[str, str, Usage, dict[str, str] | None]] = []

    def add(
        price_id: str, names: list[str], usages: list[Usage], context: dict[str, str] | None = None
    ) -> None:
        found.extend((price_id, name, usage, context) for name in names[:4] for usage in usages)

    for price_id in PROVIDERS:
        add(price_id, known(price_id), [PLAIN])
        add(price_id, known(price_id, "cache_read_mtok"), [CACHED])
        add(price_id, known(price_id, "cache_read_mtok", "cache_write_mtok"), [WRITTEN])
        add(price_id, known(price_id, "cache_read_mtok", "cache_write_1h_mtok"), [HOUR])
        for name in known(price_id, tiered=True)[:4]:
            price = packaged(price_id, name, DAY)
            assert price is not None and price.tiers, name
            sizes = itertools.chain.from_iterable((t.above, t.above + 1, 2 * t.above) for t in price.tiers)
            add(price_id, [name], [Usage(prompt_tokens=size, completion_tokens=321) for size in sizes])
        for context in ({"processing": "batch"}, {"service_tier": "flex"}):
            add(price_id, known(price_id, context=context), [PLAIN], context)
    return found


EXAMPLES = examples()


def test_the_examples_cover_every_kind() -> None:
    assert len(EXAMPLES) >= 50
    assert sum(context == {"processing": "batch"} for *_, context in EXAMPLES) >= 5
    assert sum(usage.cached_tokens > 0 for *_, usage, _ in EXAMPLES) >= 10
    assert sum(usage.completion_tokens == 321 for *_, usage, _ in EXAMPLES) >= 9, "tiers"
    assert len({price_id for price_id, *_ in EXAMPLES}) >= 5


@pytest.mark.parametrize(
    ("price_id", "model", "usage", "context"),
    EXAMPLES,
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_worked_example(price_id: str, model: str, usage: Usage, context: dict[str, str] | None) -> None:
    price = packaged(price_id, model, DAY, tuple((context or {}).items()))
    assert price is not None and price.quality == "exact"
    ours = price.price(usage)
    dollars = theirs(price_id, model, usage, context) * 10**12
    # Never below the list; above it by less than a pico-dollar a token, where the list is finer than that.
    assert dollars <= ours < dollars + usage.total_tokens
    if all(amount * 10**6 % 1 == 0 for amount in unit_prices(price_id, model, context)):
        assert ours == dollars, "exactly"
    assert price.quote(usage.prompt_tokens, usage.completion_tokens).most >= ours


def unit_prices(price_id: str, model: str, context: dict[str, str] | None) -> list[Decimal]:
    """Every list price of a token there."""
    _, info = get_snapshot().find_provider_model(model, None, price_id, None)
    row = info.get_prices(datetime.combine(DAY, time(12), UTC), context)
    found = []
    for name, value in row.__dict__.items():
        if value is not None and name.endswith("_mtok"):
            found += [getattr(value, "base", value), *(tier.price for tier in getattr(value, "tiers", ()))]
    return [Decimal(amount) for amount in found]


def test_unknown_is_refused_and_an_unmatched_context_is_an_estimate() -> None:
    with pytest.raises(UnknownPrice):
        PriceBook().find("openai", "no-such-model", "openai", DAY)
    name = known("openai")[0]
    odd = packaged("openai", name, DAY, (("processing", "overnight"),))
    assert odd is not None and odd.quality == "estimated"
    assert packaged("no-such-provider", name, DAY) is None
