"""The price curve, and the decision to buy or to wait."""

import msgspec

from galley.router.market.curve import Curve
from galley.router.market.need import Need
from galley.router.market.past import Past
from galley.router.market.planner import Buy, Decline, Planner, Wait
from tests.unit.router.market.lots import HOUR, desk, lot

REFERENCE = Need(model="", seconds=HOUR)
WORK = Need(model="m", seconds=HOUR, drain_s=20, redo_s=300)
DAY = 24 * HOUR


def watched(trade, prices, **settings):
    """A planner that saw these prices, five minutes apart, up to the moment that is returned."""
    planner = Planner(trade, REFERENCE, **settings)
    past = planner.pasts.setdefault("m", Past())
    for i, pico in enumerate(prices):
        past.note(i * 300, pico)
    return planner, len(prices) * 300


def daily(low, high, days=3):
    """Cheap for the last six hours of every day."""
    return [low if i % 288 >= 216 else high for i in range(288 * days)]


def test_the_past_knows_the_cheapest_moment_of_a_stretch():
    past = Past()
    for i, pico in enumerate(daily(100, 200)):
        past.note(i * 300, pico)
    assert past.lowest(DAY, 3 * DAY) == 100
    assert past.lowest(300, 3 * DAY) == 200
    assert past.lowest(300, 3 * DAY, percent=10) == 100
    assert Past().lowest(DAY, 0) is None


def test_the_curve_never_rises_and_says_what_is_firm():
    trade = desk(
        lot("now", second_pico=1000), lot("later", second_pico=600, valid_from=3 * DAY + 5 * HOUR, start_s=0)
    )
    planner, at = watched(trade, daily(900 * HOUR, 1000 * HOUR))
    points = planner.curve(WORK, at).points
    assert [point.pico for point in points] == sorted((point.pico for point in points), reverse=True)
    assert [(point.within_s, point.firm, point.lot) for point in points] == [
        (0, True, "now"),
        (HOUR, True, "now"),
        (8 * HOUR, True, "later"),
        (DAY, True, "later"),
    ]
    assert points[2].pico == 600 * HOUR
    assert Curve.of(desk().book, None, None, WORK, 0).points == []


def test_a_forecast_is_marked_as_owed_by_nobody():
    planner, at = watched(desk(lot("now", second_pico=1000)), daily(500 * HOUR, 1000 * HOUR))
    last = planner.curve(WORK, at).points[-1]
    assert (last.pico, last.firm, last.lot) == (500 * HOUR, False, "")


def test_work_with_time_waits_for_the_cheap_hours_and_buys_in_them():
    trade = desk(lot("firm", second_pico=1000))
    planner, at = watched(trade, daily(500 * HOUR, 1000 * HOUR))
    need = msgspec.structs.replace(WORK, deadline=at + DAY)
    said = planner.plan(need, at)
    assert isinstance(said, Wait) and said.until == at + 300
    trade.offer(lot("firm", second_pico=500), at)
    assert isinstance(planner.plan(need, at), Buy)
    trade.offer(lot("firm", second_pico=1000), at)
    late = need.deadline - HOUR - 200
    assert isinstance(planner.plan(need, late), Buy), "no slack left"
    assert isinstance(planner.plan(WORK, at), Buy), "without a deadline it is interactive"
    impatient, at = watched(trade, daily(500 * HOUR, 1000 * HOUR), wait=False)
    assert isinstance(impatient.plan(need, at), Buy)


def test_what_may_be_taken_away_is_bought_only_where_a_deadline_bears_it():
    firm = lot("firm", second_pico=1000, start_s=90, capacity=10)
    brisk = lot("brisk", second_pico=400, preemptible=True, notice_s=60, start_s=60)
    fair = lot("fair", second_pico=500, preemptible=True, notice_s=120, start_s=60)
    planner = Planner(desk(firm, brisk, fair), REFERENCE)
    with_time = msgspec.structs.replace(WORK, deadline=3 * HOUR)
    without = msgspec.structs.replace(WORK, deadline=HOUR + 100)
    assert planner.plan(with_time, 0).match.lot.id == "brisk"
    # 120 s of notice cover 90 s of start and 20 s of leaving; 60 s do not
    assert planner.plan(without, 0).match.lot.id == "fair"
    assert planner.plan(WORK, 0).match.lot.id == "fair"
    assert Planner(desk(firm, brisk, fair), REFERENCE, spot=False).plan(WORK, 0).match.lot.id == "firm"
    assert planner.plan(msgspec.structs.replace(WORK, steady=True), 0).match.lot.id == "firm"


def test_what_would_be_late_by_itself_is_not_safe_for_having_notice():
    firm = lot("firm", second_pico=1000, start_s=10)
    loose = lot("loose", second_pico=10, preemptible=True, notice_s=600, start_s=60)
    planner = Planner(desk(firm, loose), REFERENCE)
    need = msgspec.structs.replace(WORK, deadline=HOUR + 59)
    assert planner.plan(need, 0).match.lot.id == "firm"
    assert planner.plan(need, 0, on="loose").match.lot.id == "loose"


def test_no_more_is_exposed_than_could_move_at_once():
    firm = lot("firm", second_pico=1000, capacity=1)
    cheap = lot("cheap", second_pico=10, preemptible=True, notice_s=3600, capacity=9)
    trade = desk(firm, cheap)
    planner = Planner(trade, REFERENCE)
    assert planner.plan(WORK, 0).match.lot.id == "cheap"
    trade.reserve(cheap, 0, 100)
    assert planner.plan(WORK, 0).match.lot.id == "firm"


def test_the_lot_it_runs_on_pays_no_second_start():
    here = lot("here", second_pico=1000, start_s=600)
    there = lot("there", second_pico=950, start_s=600)
    planner = Planner(desk(here, there), REFERENCE)
    assert planner.plan(WORK, 0).match.lot.id == "there"
    assert planner.plan(WORK, 0, on="here").match.lot.id == "here"


def test_nothing_within_the_limits_is_waited_for_as_long_as_there_is_time():
    one = lot("one", second_pico=1000, capacity=1)
    planner = Planner(desk(one), REFERENCE)
    poor = msgspec.structs.replace(WORK, max_pico=5, deadline=DAY)
    assert isinstance(planner.plan(poor, 0), Wait)
    assert isinstance(planner.plan(poor, DAY - 10), Decline)
    assert isinstance(planner.plan(msgspec.structs.replace(poor, deadline=None), 0), Decline)
    planner.desk.reserve(one, 0, 1000)
    assert planner.plan(WORK, 0) == Wait(300, "nothing on offer has room within its limits")


def test_all_late_takes_what_is_done_first():
    slow, fast = lot("slow", second_pico=1, start_s=900), lot("fast", second_pico=9, start_s=10)
    late = msgspec.structs.replace(WORK, deadline=HOUR)
    assert Planner(desk(slow, fast), REFERENCE).plan(late, 0).match.lot.id == "fast"
