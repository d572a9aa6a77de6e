"""Money is whole numbers, and an unknown price is never zero."""

from datetime import date

import pytest

from galley.economics.price import FREE, PriceBook, UnknownPrice, pico, version
from galley.errors import ConfigError
from galley.types import Usage

DAY = date(2026, 11, 1)


def test_pico_is_exact():
    assert pico("0.15", "x") == 150_000 and pico(3, "x") == 3_000_000 and pico("0.0028", "x") == 2_800
    for bad in (0.1, "-1", "nan", "inf", "0.0000001", "a", True):
        with pytest.raises(ConfigError):
            pico(bad, "x")


def test_lines_add_up_and_cached_tokens_are_not_charged_twice():
    price = version(
        {"input": "1", "cached": "0.1", "cache_write": "1.25", "output": "4", "request": "5"}, "p"
    )
    usage = Usage(prompt_tokens=100, cached_tokens=60, cache_write_tokens=10, completion_tokens=7)
    lines = {line["kind"]: (line["quantity"], line["pico"]) for line in price.lines(usage)}
    assert lines == {
        "input": (30, 30_000_000),
        "cached": (60, 6_000_000),
        "cache_write": (10, 12_500_000),
        "output": (7, 28_000_000),
        "request": (1, 5_000_000),
    }
    assert price.price(usage) == sum(amount for _, amount in lines.values())
    quote = price.quote(100, 7)
    assert quote.most == 100 * 1_250_000 + 28_000_000 + 5_000_000 >= quote.expected >= price.price(usage)
    with pytest.raises(ValueError, match="more cached"):
        price.lines(Usage(prompt_tokens=1, cached_tokens=2))
    assert FREE.lines(usage) == []


def test_unknown_is_refused_or_the_ceiling():
    with pytest.raises(UnknownPrice, match="gpt-x at cloud"):
        PriceBook().find("cloud", "gpt-x", None, DAY)
    book = PriceBook(ceiling=version({"input": "50", "output": "50"}, "ceiling", quality="ceiling"))
    assert book.find("cloud", "gpt-x", None, DAY).quality == "ceiling"


def test_declared_versions_by_day_and_no_two_on_one():
    book = PriceBook()
    prices = [
        version({"from": day, "input": amount, "output": "1"}, "p")
        for day, amount in (("2026-06-01", "2"), ("2026-01-01", "1"))
    ]
    book.declare("c", "m", prices)
    assert book.find("c", "m", None, date(2026, 5, 31)).input == 1_000_000
    assert book.find("c", "m", None, DAY).id == "p@2026-06-01"
    with pytest.raises(ConfigError, match="two prices"):
        book.declare("c", "m", [prices[0], prices[0]])
    with pytest.raises(ConfigError, match="not outptu"):
        version({"input": "1", "outptu": "1"}, "p")


def test_packaged_prices_are_dated_and_unknown_models_stay_unknown():
    pytest.importorskip("genai_prices")
    book = PriceBook()
    found = book.find("openai", "gpt-4o-mini", "openai", DAY)
    assert (found.input, found.output, found.quality) == (
        150_000,
        600_000,
        "exact",
    ) and "2026-11-01" in found.id
    assert found.cached < found.input
    with pytest.raises(UnknownPrice):
        book.find("openai", "no-such-model-at-all", "openai", DAY)
