"""Capacity is conserved, no trade is above its limit, price-time priority holds, and replay is exact."""

from hypothesis import given, settings
from hypothesis import strategies as st

from galley.evals.scenario import SCENARIOS
from galley.evals.spot import Simulation
from galley.router.market.book import Book
from galley.router.market.desk import Desk, NoTrade
from galley.router.market.lot import Lot
from galley.router.market.need import Need
from galley.router.market.planner import Buy, Planner

IDS = ["a", "b", "c"]
acts = st.lists(
    st.one_of(
        st.tuples(
            st.just("offer"), st.sampled_from(IDS), st.integers(0, 5), st.integers(1, 9), st.booleans()
        ),
        st.tuples(st.just("plan"), st.integers(1, 400), st.integers(0, 3000), st.integers(1, 900)),
        st.tuples(
            st.just("reserve"),
            st.sampled_from(IDS),
            st.integers(0, 200),
            st.integers(1, 300),
            st.integers(1, 3),
        ),
        st.tuples(st.just("release"), st.integers(0, 30)),
        st.tuples(st.just("withdraw"), st.sampled_from(IDS)),
        st.tuples(st.just("pass"), st.integers(1, 100)),
    ),
    max_size=60,
)


def made(id, capacity, price, preemptible, at):
    return Lot(
        id=id,
        provider=id,
        model="m",
        capacity=capacity,
        valid_from=0,
        valid_to=10**9,
        listed=at,
        second_pico=price,
        prefill_tps=10,
        decode_tps=1,
        preemptible=preemptible,
        notice_s=20 if preemptible else 0,
    )


class Ledger:
    """Capacities and trades, counted a second time: second by second, in dictionaries."""

    def __init__(self):
        self.shrunk = {}
        self.most = {}

    def check(self, desk, at):
        for id in IDS:
            mine = [each for each in desk.held() if each.lot == id]
            lot = desk.book.find(id)
            for second in range(at, at + 500, 7):
                using = sum(e.units for e in mine if e.start <= second < e.end)
                assert using <= self.most.get(id, 0), "more than was ever on offer"
            if lot is None or not lot.preemptible:
                continue
            quiet = max(at, self.shrunk.get(id, 0))
            ends = max([each.end for each in mine], default=quiet)
            for second in range(quiet, min(ends, quiet + 400)):
                firm = sum(e.units for e in mine if not e.preemptible and e.start <= second < e.end)
                loose = sum(e.units for e in mine if e.preemptible and e.start <= second < e.end)
                assert loose + firm <= max(lot.capacity, firm), (id, second)
        for each in desk.held():
            assert each.limit_pico is None or each.cost(each.end) <= each.limit_pico


@given(acts)
@settings(max_examples=150, deadline=None)
def test_capacity_is_conserved_and_no_trade_is_above_its_limit(script):
    desk = Desk(Book())
    planner = Planner(desk, Need(model="", seconds=60))
    ledger, at, spent, known = Ledger(), 0, 0, []
    for act in script:
        match act:
            case ("offer", id, capacity, price, preemptible):
                before = desk.book.find(id)
                if before is not None and before.preemptible != preemptible:
                    continue
                desk.offer(made(id, capacity, price, preemptible, at), at)
                ledger.shrunk[id] = at + 20
                ledger.most[id] = max(capacity, ledger.most.get(id, 0))
            case ("reserve", id, start, length, units):
                lot = desk.book.find(id)
                if lot is None:
                    continue
                free = desk.free(lot, at + start, at + start + length)
                limit = 5 * length * units
                try:
                    held = desk.reserve(lot, at + start, at + start + length, units=units, limit_pico=limit)
                except NoTrade as error:
                    assert (error.code == "no_capacity") == (free < units)
                    assert error.code == "no_capacity" or lot.second_pico > 5
                    continue
                assert units <= free and lot.second_pico <= 5
                known.append(held)
            case ("plan", seconds, limit, ahead):
                need = Need(model="m", seconds=seconds, max_pico=limit or None, deadline=at + ahead)
                said = planner.plan(need, at, term_s=seconds)
                if isinstance(said, Buy):
                    lot = said.match.lot
                    assert said.match.pico == lot.expected(need)
                    # price-time priority: nothing cheaper that is never taken away was free
                    for other in desk.book:
                        better = (other.expected(need), other.listed, other.id) < (
                            said.match.pico,
                            lot.listed,
                            lot.id,
                        )
                        on_time = other.done(need, at) <= need.deadline
                        if better and not other.preemptible and on_time:
                            assert desk.free(other, at, at + seconds) == 0
                    held = desk.buy(lot, need, at, at + seconds)
                    assert held.cost(held.end) <= (limit or held.cost(held.end))
                    known.append(held)
            case ("release", index):
                if index < len(known):
                    each = known[index]
                    most = each.cost(each.end)
                    cost = desk.release(each.id, at)
                    assert 0 <= cost <= max(most, each.min_s * each.units * each.pico_s)
                    spent += cost
            case ("withdraw", id):
                desk.withdraw(id, at)
            case ("pass", seconds):
                at += seconds
                spent += sum(each.cost_pico for each in desk.lapse(at))
        ledger.check(desk, at)
    for each in known:
        spent += desk.release(each.id, at)
    assert spent == desk.spent_pico == sum(each.cost_pico for each in known)
    assert list(desk.held()) == []


@given(st.integers(0, 10**6), st.sampled_from(sorted(SCENARIOS)))
@settings(max_examples=2, deadline=None)
def test_a_simulated_day_misses_nothing_and_replays_exactly(seed, name):
    one = Simulation(SCENARIOS[name], seed, "planned", days=1)
    two = Simulation(SCENARIOS[name], seed, "planned", days=1)
    first, second = one.run(), two.run()
    assert first == second and one.events == two.events
    assert first.missed == 0
    # what the events say was paid is what the week says it cost
    paid = sum(event[4] for event in one.events if event[1] == "ended")
    assert paid <= first.pico == one.desk.spent_pico
    bought = {event[2]: event for event in one.events if event[1] == "bought"}
    for event in one.events:
        if event[1] == "ended":
            trade = bought[event[2]]
            length = max(60, event[3] - trade[0])
            assert event[4] <= length * trade[5]
