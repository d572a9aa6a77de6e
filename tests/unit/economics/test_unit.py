"""What the machine cost is divided among its requests to the last pico-dollar."""

import json
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galley import values
from galley.audit.receipts import ReceiptStore
from galley.cli.main import invoke
from galley.config import load
from galley.economics.apportion import apportion
from galley.economics.ownprice import own_prices
from galley.economics.price import own_price
from galley.economics.unit import Work, divide, work
from galley.errors import ConfigError
from galley.machine import Machine
from galley.types import Digests, Receipt, Resources, Route, Times, Usage

HOUR = 3600 * 10**6
USD = 10**12
BOUGHT = Machine(price_usd=2400 * USD, lifetime_days=1460, watts=65_000, electricity_usd=USD * 3 // 10)
MONEY = st.integers(0, 10**16)
COUNT = st.integers(0, 10**15)
SPAN = st.integers(0, HOUR // 4)
WORKS = st.lists(
    st.builds(
        Work, id=st.just("r"), began_us=st.integers(0, HOUR), prefill_us=SPAN, decode_us=SPAN, queue_us=SPAN,
        flop=COUNT, bytes=COUNT, kv_byte_us=COUNT, millijoules=st.none() | COUNT,
        fresh_tokens=st.integers(0, 10**6), cached_tokens=st.integers(0, 10**6),
        completion_tokens=st.integers(0, 10**6),
    ),
    max_size=20,
)  # fmt: skip
MACHINES = st.builds(
    lambda capital, power, points: Machine(
        **capital, **power, memory_points=points
    ),
    st.fixed_dictionaries({"rent": st.tuples(MONEY, st.sampled_from((1, 3600)))})
    | st.fixed_dictionaries({"price_usd": MONEY, "lifetime_days": st.integers(1, 4000)}),
    st.just({}) | st.fixed_dictionaries({"watts": st.integers(0, 10**6), "electricity_usd": MONEY}),
    st.integers(0, 10_000),
)  # fmt: skip


@given(st.integers(0, 10**30), st.lists(st.integers(0, 10**20), min_size=1, max_size=50))
def test_shares_add_up_and_are_within_one_of_the_proportion(total: int, weights: list[int]) -> None:
    whole = sum(weights)
    if not whole:
        weights[0] = whole = 1
    shares = apportion(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - Fraction(total * weight, whole)) < 1
        assert weight or not share


def test_nothing_is_divided_among_nobody() -> None:
    assert apportion(0, [0, 0]) == [0, 0] and apportion(0, []) == []
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    for total, weights in ((1, []), (1, [0]), (-1, [1]), (1, [-1, 2])):
        with pytest.raises(ValueError):
            apportion(total, weights)


@settings(max_examples=300, deadline=None)
@given(MACHINES, WORKS, st.integers(1, 2 * HOUR))
def test_parts_add_up_to_what_the_machine_cost(machine: Machine, works: list[Work], until: int) -> None:
    found = divide(machine, works, since_us=0, until_us=until)
    assert found.capital == round(machine.capital(until))
    power = machine.electricity(until)
    assert found.energy == (None if power is None else round(power))
    names = ("prefill", "decode", "kv", "idle", "energy")
    assert sum(found.part(name) for name in names) + found.unused == found.cost
    assert sum(each.total for each in found.parts) + found.unused == found.cost
    assert found.part("energy") == (0 if found.energy is None or not found.works else found.energy)
    assert len(found.parts) == sum(each.began_us < until for each in works)
    assert (
        0 <= found.busy_us <= until
        and min((min(e.prefill, e.decode, e.kv, e.idle) for e in found.parts), default=0) >= 0
    )
    assert all((each.energy is None) == (found.energy is None) for each in found.parts)
    if any(each.fresh_tokens for each in found.works) and any(e.completion_tokens for e in found.works):
        listed = own_prices(found)
        paid = sum(
            e.fresh_tokens * listed.input
            + e.cached_tokens * listed.cached
            + e.completion_tokens * listed.output
            for e in found.works
        )
        tokens = sum(e.fresh_tokens + e.cached_tokens + e.completion_tokens for e in found.works)
        assert found.cost <= paid < found.cost + max(1, tokens)
        assert listed.cached <= listed.input


def test_each_part_goes_by_what_it_is_of() -> None:
    machine = Machine(rent=(3600 * 10**9, 3600))
    first = Work(id="a", began_us=0, prefill_us=10**6, decode_us=3 * 10**6, flop=3, bytes=1, kv_byte_us=1)
    other = Work(id="b", began_us=0, prefill_us=10**6, decode_us=3 * 10**6, flop=1, bytes=3, kv_byte_us=1)
    found = divide(machine, [first, other], since_us=0, until_us=8 * 10**6)
    a, b = found.parts
    assert (found.capital, found.busy_us, found.energy) == (8 * 10**9, 4 * 10**6, None)
    # 8 s at 1e9: half of it idle; a tenth of the busy half is memory's, the rest 1 : 3.
    assert (a.prefill, a.decode, a.kv, a.idle) == (675 * 10**6, 675 * 10**6, 2 * 10**8, 2 * 10**9)
    assert (b.prefill, b.decode, b.kv, b.idle) == (225 * 10**6, 2025 * 10**6, 2 * 10**8, 2 * 10**9)


def test_energy_is_null_unless_declared_and_follows_joules_where_measured() -> None:
    jobs = [Work(id=n, decode_us=HOUR // 2, bytes=1, millijoules=j) for n, j in (("a", 1), ("b", 3))]
    found = divide(BOUGHT, jobs, since_us=0, until_us=HOUR)
    assert found.energy == 65 * USD * 3 // 10_000 and found.measured
    assert [each.energy for each in found.parts] == [found.energy // 4, found.energy * 3 // 4]
    unmeasured = divide(BOUGHT, [*jobs, Work(id="c", decode_us=HOUR // 2)], since_us=0, until_us=HOUR)
    assert not unmeasured.measured and [e.energy for e in unmeasured.parts] == [found.energy // 3] * 3
    bare = divide(Machine(rent=(1, 1)), jobs, since_us=0, until_us=HOUR)
    assert bare.energy is None and all(each.energy is None for each in bare.parts)


def test_a_machine_that_nobody_used_cost_all_the_same() -> None:
    found = divide(BOUGHT, [], since_us=0, until_us=HOUR)
    assert found.unused == found.cost == found.capital + (found.energy or 0) > 0
    with pytest.raises(ConfigError, match="cannot be derived"):
        own_prices(found)
    with pytest.raises(ValueError):
        divide(BOUGHT, [], since_us=1, until_us=1)


@pytest.mark.parametrize(
    "machine",
    [
        Machine(),
        Machine(price_usd=1),
        Machine(lifetime_days=1),
        Machine(rent=(1, 1), price_usd=1, lifetime_days=1),
        Machine(rent=(1, 1), watts=1),
        Machine(rent=(1, 1), electricity_usd=1),
        Machine(rent=(1, 1), lifetime_days=3),
    ],
)
def test_a_machine_half_declared_is_refused(machine: Machine) -> None:
    with pytest.raises(ConfigError):
        machine.capital(1)


def test_settings_of_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        '[economics.machine]\nprice_usd = "2400"\nlifetime_days = 1460\n'
        'watts = 65\nelectricity_usd = "0.30"\n'
    )
    assert load(env={}, file=file).economics.machine == BOUGHT
    assert load(env={"GALLEY_MACHINE_RENT": "0.80/h"}).economics.machine.rent == (8 * 10**11, 3600)
    assert values.rent("0.0002/s") == (2 * 10**8, 1) and values.milliwatts("12.5") == 12_500
    for bad in ("0.80", "x/h", "1/fortnight", "-1/h"):
        with pytest.raises(ValueError):
            values.rent(bad)
    for bad in ("x", "-1", "0.0001", "nan"):
        with pytest.raises(ValueError):
            values.milliwatts(bad)
    file.write_text("[economics.machine]\nrnet = 3\n")
    with pytest.raises(ConfigError, match=r"economics\.machine\.rent"):
        load(env={}, file=file)
    file.write_text("[economics]\nmachine = 3\n")
    with pytest.raises(ConfigError, match="unknown setting"):
        load(env={}, file=file)


def receipt(number: int, created: float, *, location: str = "local") -> Receipt:
    return Receipt(
        id=f"rcp_{number}", request_id=f"req_{number}", created=created, api="chat", model=f"m{number % 2}",
        status="ok", tenant="t", user=None, key=None, stream=False,
        usage=Usage(prompt_tokens=100, cached_tokens=40, completion_tokens=20),
        times=Times(queue_s=0.01, prefill_s=0.125, decode_s=0.5),
        resources=Resources(steps=21, prefill_flop=6e9, decode_bytes=2e9, kv_byte_seconds=1e6 + number),
        route=Route(model="m", provider="local", rule="fixed", location=location),
        digests=Digests(), choices=[], params={}, ignored_params=[], clamped={},
    )  # fmt: skip


def test_only_what_ran_here_is_work() -> None:
    assert work(receipt(1, 1.0, location="remote")) is None
    found = work(receipt(1, 1.0))
    assert found is not None and (found.began_us, found.prefill_us, found.decode_us) == (
        1_010_000,
        125_000,
        500_000,
    )
    assert (found.fresh_tokens, found.cached_tokens, found.flop, found.millijoules) == (
        60,
        40,
        6 * 10**9,
        None,
    )


def test_the_commands_divide_and_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GALLEY_HOME", str(tmp_path))
    assert invoke(["cost", "units"]) == 2
    assert "not declared" in capsys.readouterr().err
    monkeypatch.setenv("GALLEY_MACHINE_RENT", "0.80/h")
    store = ReceiptStore(tmp_path / "receipts.db")
    day = datetime(2026, 11, 20, tzinfo=UTC).timestamp()
    for number in range(7):
        store.record(receipt(number, day + 3600 * number))
    store.record(receipt(8, day - 3600))
    store.record(receipt(9, day + 60, location="remote"))
    assert store.flush(10)
    store.close()
    span = ["--since", "2026-11-20", "--until", "2026-11-21"]
    assert invoke(["cost", "units", "--by", "request", "--json", *span]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["cost_usd"] == "19.20" and shown["energy_pico"] is None and shown["unused_pico"] == "0"
    assert len(shown["groups"]) == 7 and shown["busy_seconds"] == "4.375"
    assert sum(int(row["total_pico"]) for row in shown["groups"]) == 192 * 10**11
    for row in shown["groups"]:
        parts = [int(row[f"{name}_pico"]) for name in ("prefill", "decode", "kv", "idle")]
        assert sum(parts) == int(row["total_pico"]) and row["energy_pico"] is None
    assert invoke(["cost", "units", *span]) == 0
    last = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("total"))
    assert last.split()[-1] == "$19.20"
    assert invoke(["cost", "prices", "--json", *span]) == 0
    listed = json.loads(capsys.readouterr().out)
    price = own_price(listed["setting"])
    assert [str(price.input), str(price.cached), str(price.output)] == [
        listed[f"{name}_pico"] for name in ("input", "cached", "output")
    ]
    assert 0 < price.cached < price.input and 0 < listed["cached_discount_points"] < 10_000
    earned = 7 * (60 * price.input + 40 * price.cached + 20 * price.output)
    assert 0 <= earned - 192 * 10**11 < 7 * 120
    assert invoke(["cost", "prices", "--json", "--busy", "0.5", *span]) == 0
    half = json.loads(capsys.readouterr().out)
    # 4.375 s of work, at 0.80 an hour, twice as much for half the time.
    want = Fraction(192 * 10**11) * Fraction("4.375") / 86_400 * 2
    prices = {name: int(half[f"{name}_pico"]) for name in ("input", "cached", "output")}
    earned = 7 * (60 * prices["input"] + 40 * prices["cached"] + 20 * prices["output"])
    assert 0 <= earned - want < 7 * 120 and half["busy_points"] == 5000
    for bad in ("0", "2", "x"):
        assert invoke(["cost", "prices", "--busy", bad, *span]) == 2
    assert invoke(["cost", "--by", "user", "prices"]) == 2
    assert invoke(["cost", "units", "--since", "2999-01-01", "--until", "2999-01-02"]) == 2
