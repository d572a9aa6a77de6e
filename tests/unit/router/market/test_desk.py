"""Buying by the second, giving back, and being taken away."""

import pytest

from galley.router.market.desk import NoTrade
from tests.unit.router.market.lots import desk, lot


def test_capacity_is_that_of_every_second():
    trade = desk(one := lot(capacity=2))
    trade.reserve(one, 0, 100)
    trade.reserve(one, 100, 200, units=2)
    assert trade.free(one, 0, 100) == 1 and trade.free(one, 50, 150) == 0 and trade.free(one, 200, 300) == 2
    with pytest.raises(NoTrade, match="no 1 units free") as error:
        trade.reserve(one, 99, 101)
    assert error.value.code == "no_capacity"


def test_no_trade_above_the_limit_nor_outside_the_offer_nor_at_an_old_price():
    trade = desk(one := lot(second_pico=10, valid_to=1000))
    with pytest.raises(NoTrade, match="limit is 999") as error:
        trade.reserve(one, 0, 100, limit_pico=999)
    assert error.value.code == "above_limit"
    with pytest.raises(NoTrade):
        trade.reserve(one, 950, 1050)
    trade.offer(lot(second_pico=11, valid_to=1000), 0)
    with pytest.raises(NoTrade, match="no longer"):
        trade.reserve(one, 0, 100)
    with pytest.raises(ValueError):
        trade.reserve(one, 5, 5)
    assert list(trade.held()) == [] and trade.spent_pico == 0


def test_seconds_not_used_are_not_paid_and_the_price_is_that_of_the_trade():
    trade = desk(one := lot(second_pico=10, min_s=60))
    held = trade.reserve(one, 0, 1000, units=2, limit_pico=20_000)
    trade.offer(lot(second_pico=99, min_s=60), 10)
    assert trade.release(held.id, 250) == 250 * 2 * 10
    assert trade.release(held.id, 999) == 0 and trade.spent_pico == 5000
    short = trade.reserve(trade.book.find("a"), 300, 1000)
    assert trade.release(short.id, 301) == 60 * 99


def test_what_shrinks_is_taken_from_the_youngest_with_notice():
    trade = desk(one := lot(capacity=3, preemptible=True, notice_s=30))
    old, young, youngest = (trade.reserve(one, 0, 1000) for _ in range(3))
    taken = trade.offer(lot(capacity=1, preemptible=True, notice_s=30), 100)
    assert [each.id for each in taken] == [youngest.id, young.id]
    assert young.taken and young.end == 130 and not old.taken and old.end == 1000
    assert trade.used("a", 129, 130) == 3 and trade.used("a", 130, 131) == 1
    # a second shrink takes nobody twice
    assert [each.id for each in trade.offer(lot(capacity=0, preemptible=True, notice_s=30), 110)] == [old.id]


def test_a_reservation_that_has_not_begun_is_taken_for_nothing():
    trade = desk(one := lot(capacity=1, preemptible=True, notice_s=10))
    now, then = trade.reserve(one, 0, 100), trade.reserve(one, 100, 200)
    assert {each.id for each in trade.withdraw("a", 20)} == {now.id, then.id}
    assert (now.end, then.end) == (30, 100) and trade.book.find("a") is None
    trade.lapse(500)
    assert trade.spent_pico == 30 * 1000


def test_firm_reservations_stay_when_their_lot_is_withdrawn():
    trade = desk(one := lot(capacity=1))
    held = trade.reserve(one, 0, 100)
    assert trade.withdraw("a", 20) == [] and held.end == 100
    assert trade.find(held.id) is held and trade.exposed() == 0
