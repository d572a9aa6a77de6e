"""Lots, what they cost, whom they refuse, and the order of the book."""

from galley.router.market.book import Book
from galley.router.market.need import Need
from tests.unit.router.market.lots import lot, price

NEED = Need(model="m", input=1000, cached=400, output=200)


def test_expected_price_counts_cached_tokens_at_their_own_price():
    by_token = lot(price=price())
    assert by_token.expected(NEED) == 600 * 1_000_000 + 400 * 100_000 + 200 * 4_000_000


def test_price_by_the_second_counts_start_up_and_the_least_billed():
    by_second = lot(second_pico=7, start_s=10, min_s=1)
    # 1 s to the first token, 600 / 1000 rounded up, 200 / 50
    assert by_second.lasts(NEED) == 1 + 1 + 4
    assert by_second.expected(NEED) == 7 * (6 + 10)
    assert lot(second_pico=7, min_s=60).expected(NEED) == 7 * 60
    assert by_second.lasts(Need(model="m", seconds=99)) == 99


def test_risk_of_interruption_raises_the_price_unless_notice_suffices():
    work = Need(model="m", seconds=1800, redo_s=600, drain_s=30)
    sure = lot(second_pico=1000)
    risky = lot(second_pico=1000, preemptible=True, interrupt_ppm=200_000, notice_s=5)
    # within half an hour one in ten; a third of the work again
    assert risky.expected(work) == sure.expected(work) + sure.expected(work) // 10 // 3
    assert lot(second_pico=1000, preemptible=True, interrupt_ppm=200_000, notice_s=30).expected(
        work
    ) == sure.expected(work)


def test_token_price_of_capacity_by_the_second_is_never_below_its_cost():
    priced = lot(second_pico=100_001, prefill_tps=1000, decode_tps=50).tokens()
    assert (priced.input, priced.output, priced.quality) == (101, 2001, "estimated")


def test_every_limit_refuses_with_its_reason():
    here = lot(price=price(), region="eu", preemptible=True, valid_from=100, valid_to=200)
    reasons = [
        (Need(model="other"), 150, "it serves m"),
        (NEED, 99, "not offered"),
        (NEED, 200, "not offered"),
        (Need(model="m", regions=frozenset(["us"])), 150, "region eu"),
        (Need(model="m", steady=True), 150, "taken away"),
        (Need(model="m", max_ttft_ms=199), 150, "promises 200 ms"),
        (Need(model="m", output=100, deadline=152), 150, "after the deadline"),
        (Need(model="m", input=10, max_pico=9_999_999), 150, "limit is 9999999"),
    ]
    for need, at, words in reasons:
        assert words in here.refuses(need, at)
    assert here.refuses(Need(model="m", input=10, max_pico=10_000_000, max_ttft_ms=200), 150) is None
    assert "promises nothing" in lot(ttft_ms=None).refuses(Need(model="m", max_ttft_ms=1), 1)


def test_price_then_time_then_id():
    book = Book()
    for each in (
        lot("dear", price=price(input=2_000_000), listed=1),
        lot("late", price=price(), listed=9),
        lot("early", price=price(), listed=5),
        lot("also-early", price=price(), listed=5),
    ):
        book.put(each)
    assert [match.lot.id for match in book.matches(NEED, 10)] == ["also-early", "early", "late", "dear"]


def test_a_lot_keeps_its_place_until_its_price_moves():
    book = Book()
    book.put(lot("a", price=price(), listed=5))
    book.put(lot("a", price=price(), listed=8, capacity=1))
    assert (book.find("a").listed, book.find("a").capacity) == (5, 1)
    book.put(lot("a", price=price(input=999_999), listed=9))
    assert book.find("a").listed == 9


def test_expired_lots_leave_and_a_lot_may_change_its_model():
    book = Book()
    book.put(lot("a", valid_to=50))
    book.put(lot("b", valid_to=51))
    assert [each.id for each in book.expire(50)] == ["a"]
    book.put(lot("b", model="n"))
    assert book.of("m") == [] and [each.id for each in book.of("n")] == ["b"]
    assert len(book) == 1 and book.withdraw("gone") is None
