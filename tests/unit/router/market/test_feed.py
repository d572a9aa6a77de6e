"""Sheets and feeds: what is not understood, not signed, stale, repeated or absurd changes nothing."""

import asyncio
import json

import pytest

from galley.errors import ConfigError, Upstream
from galley.router.market.feed import Feed, FeedRefused, sign
from galley.router.market.market import FeedTable, Market, MarketTable
from galley.router.market.sheet import read_sheet

KEY = b"sixteen bytes or more"
PRICE = {"input": "1", "output": "2"}
ROW = {"id": "v/1", "provider": "v", "model": "m", "capacity": 2, "to": 5000, "price": PRICE}


def message(seq=1, issued=1000, expires=1200, provider="v", rows=(ROW,)):
    return json.dumps(
        {"provider": provider, "seq": seq, "issued": issued, "expires": expires, "lots": list(rows)}
    ).encode()


def take(feed, body, now=1000, key=KEY):
    return feed.take(body, sign(key, body), now)


@pytest.fixture
def feed():
    return Feed("v", "http://127.0.0.1:9/lots", KEY, max_age_s=300)


def test_a_good_message_ends_its_lots_no_later_than_itself(feed):
    (found,) = take(feed, message())
    assert (found.valid_to, found.source, found.price.input) == (1200, "feed v", 1_000_000)
    assert take(feed, message(seq=1)), "the same again is fine"
    assert take(feed, message(seq=2, rows=[])) == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (message(provider="w"), "another provider"),
        (message(rows=[{**ROW, "provider": "w"}]), "another provider"),
        (message(issued=600), "until 1200"),
        (message(issued=1100), "until 1200"),
        (message(expires=1000), "until 1000"),
        (message(rows=[ROW, ROW]), "same id"),
        (message(rows=[{**ROW, "unknown": 1}]), "no sense"),
        (message(rows=[{**ROW, "price": {"input": 1.5, "output": "2"}}]), "floats"),
        (message(rows=[{**ROW, "price": {"input": "0", "output": "0"}}]), "for nothing"),
        (b"[]", "no sense"),
        (b"\xff", "no sense"),
    ],
)
def test_nothing_wrong_is_taken(feed, body, words):
    with pytest.raises(FeedRefused, match=words):
        take(feed, body)


def test_signature_order_and_jumps(feed):
    body = message(seq=5)
    for signature in ("", "sha256=00", sign(b"another key altogether", body), sign(KEY, body + b" ")):
        with pytest.raises(FeedRefused, match="signature"):
            feed.take(body, signature, 1000)
    take(feed, body)
    with pytest.raises(FeedRefused, match="old message"):
        take(feed, message(seq=4))
    for price, twice in (("10.1", "20.2"), ("0.09", "0.18")):
        with pytest.raises(FeedRefused, match="moved"):
            take(
                feed,
                message(seq=6, rows=[{**ROW, "price": {"input": price, "output": twice}}]),
            )
    assert take(feed, message(seq=6, rows=[{**ROW, "price": {"input": "9", "output": "18"}}]))
    with pytest.raises(ConfigError, match="16 bytes"):
        Feed("v", "http://127.0.0.1:9/lots", b"short")


SHEET = """
simulated = true
[[lot]]
id = "s1"
provider = "v"
model = "m"
capacity = 8
from = 2026-01-01T00:00:00Z
to = "2026-02-01T00:00:00+01:00"
second = "0.000691666666"
prefill_tps = 20000
decode_tps = 1000
preemptible = true
notice_s = 120
"""


def test_a_sheet_is_read_exactly(tmp_path):
    path = tmp_path / "lots.toml"
    path.write_text(SHEET)
    (found,) = read_sheet(path, 77)
    assert (found.second_pico, found.listed, found.simulated) == (691_666_666, 77, True)
    assert (found.valid_from, found.valid_to) == (1_767_225_600, 1_769_900_400)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('second = "0.000691666666"', 'second = "0.00069166666666666"', "twelve decimals"),
        ('second = "0.000691666666"', 'second = "2.5"', "twelve decimals"),
        ('second = "0.000691666666"', "", "one of them"),
        ("prefill_tps = 20000", "", "prefill_tps"),
        ("from = 2026-01-01T00:00:00Z", "from = 2026-01-01T00:00:00", "offset"),
        ("from = 2026-01-01T00:00:00Z", "from = 2027-01-01T00:00:00Z", "before it begins"),
        ("capacity = 8", "capacity = -1", "out of range"),
        ("preemptible = true", "", "preemptible lots"),
        ("capacity = 8", "capacity = 8\ncolour = 1", "colour"),
        ("[[lot]]", "[[lot]", "TOML"),
    ],
)
def test_a_wrong_sheet_names_its_fault(tmp_path, old, new, words):
    path = tmp_path / "lots.toml"
    path.write_text(SHEET.replace(old, new))
    with pytest.raises(ConfigError, match=words) as error:
        read_sheet(path, 0)
    assert "lots.toml" in error.value.message


class Venue:
    """A real HTTP server that answers with whatever ``body`` is."""

    def __init__(self):
        self.body, self.status = b"", 200

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1/lots"
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def _serve(self, reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 {self.status} OK\r\ncontent-length: {len(self.body)}\r\nconnection: close\r\n"
        writer.write(f"{head}x-galley-signature: {sign(KEY, self.body)}\r\n\r\n".encode() + self.body)
        await writer.drain()
        writer.close()


async def test_a_market_follows_its_feed_and_lets_it_go_stale(tmp_path):
    clock = [1000.0]
    async with Venue() as venue:
        table = MarketTable(feed=[FeedTable(provider="v", url=venue.url, key_env="K", every_s=10)])
        market = Market(table, tmp_path, {"K": KEY.decode()}.get, now=lambda: clock[0])
        with pytest.raises(ConfigError, match="no K"):
            Market(table, tmp_path, {}.get, now=lambda: clock[0])
        row = {**ROW, "preemptible": True, "notice_s": 30}
        venue.body = message(rows=[row])
        assert await market.refresh() == ([], [])
        lot = market.book.find("v/1")
        held = market.desk.reserve(lot, 1000, 1100)
        venue.body = message(seq=2, rows=[{**row, "capacity": 0}])
        assert await market.refresh() == ([], []), "not due yet"
        clock[0] = 1010.0
        taken, faults = await market.refresh()
        assert faults == [] and taken == [held] and held.end == 1040
        venue.status = 503
        clock[0] = 1020.0
        _, faults = await market.refresh()
        assert len(faults) == 1 and "503" in faults[0] and len(market.book) == 1
        clock[0] = 1200.0
        await market.refresh()
        assert len(market.book) == 0, "stale offers expire"
        market.close()


async def test_a_feed_that_is_down_is_an_upstream_fault(feed):
    with pytest.raises(Upstream):
        await feed.fetch(1000)


async def test_a_feed_takes_over_no_lot_of_another_source(tmp_path):
    (tmp_path / "s.toml").write_text(SHEET.replace('"s1"', '"v/1"'))
    clock = 1_768_000_000
    async with Venue() as venue:
        table = MarketTable(sheets=["s.toml"], feed=[FeedTable(provider="v", url=venue.url, key_env="K")])
        market = Market(table, tmp_path, {"K": KEY.decode()}.get, now=lambda: clock)
        venue.body = message(issued=clock, expires=clock + 60, rows=[{**ROW, "to": clock + 99}])
        assert (await market.refresh())[1] == []
        assert market.book.find("v/1").source == "s.toml"
        market.close()
