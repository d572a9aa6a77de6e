"""Lots and books for the tests."""

from galley.economics.price import PriceVersion
from galley.router.market.book import Book
from galley.router.market.desk import Desk
from galley.router.market.lot import Lot

HOUR = 3600


def price(input=1_000_000, output=4_000_000, cached=100_000, id="p"):
    return PriceVersion(id=id, input=input, output=output, cached=cached, cache_write=input)


def lot(id="a", **fields):
    base = {
        "provider": "cloud",
        "model": "m",
        "capacity": 4,
        "valid_from": 0,
        "valid_to": 10**9,
        "ttft_ms": 200,
        "prefill_tps": 1000,
        "decode_tps": 50,
    }
    if "price" not in fields and "second_pico" not in fields:
        fields["second_pico"] = 1000
    return Lot(id=id, **{**base, **fields})


def desk(*lots):
    made = Desk(Book())
    for each in lots:
        made.book.put(each)
    return made
