"""SIMULATION. Seeded scenarios of a spot market and of a week of work. Nothing here can be bought anywhere.

Whole numbers and ``random.Random.randrange`` alone, so that a seed is the same market on every machine.
"""

import random

import msgspec

from galley.router.market.lot import Lot
from galley.router.market.need import Need

__all__ = ["SCENARIOS", "Job", "Scenario", "Spot", "World"]

MODEL = "simulated-model"
HOUR, DAY = 3600, 86_400
STEP_S = 300
"""Prices and capacities move this often."""


def hourly(cents: int) -> int:
    """US cents an hour as pico-dollars a second."""
    return cents * 10**10 // HOUR


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """How the market behaves. Percentages are of the cheapest on-demand price.

    Attributes:
        mean_pct: where spot prices return to.
        noise_pct: most a price moves in a step by itself, in tenths of a percent.
        day_pct: how much dearer the busiest hour is than the quietest.
        spike_ppm: chance a step that a venue runs short: its price doubles or more, its capacity goes.
        capacity: units of a spot venue in ordinary times.
    """

    name: str
    words: str
    mean_pct: int
    noise_pct: int
    day_pct: int
    spike_ppm: int
    capacity: int


SCENARIOS = {
    each.name: each
    for each in (
        Scenario(
            name="calm",
            words="ample spot capacity at 40 % of on-demand, few shortages",
            mean_pct=40,
            noise_pct=10,
            day_pct=10,
            spike_ppm=500,
            capacity=16,
        ),
        Scenario(
            name="ordinary",
            words="spot capacity at 50 % of on-demand, a shortage per venue and day",
            mean_pct=50,
            noise_pct=20,
            day_pct=20,
            spike_ppm=3500,
            capacity=12,
        ),
        Scenario(
            name="tight",
            words="scarce spot capacity at 65 % of on-demand, three shortages per venue and day",
            mean_pct=65,
            noise_pct=30,
            day_pct=30,
            spike_ppm=10_000,
            capacity=6,
        ),
    )
}

ON_DEMAND = (("od-a", 249), ("od-b", 289))
"""Venues whose capacity is never taken away, US cents an hour."""
NOTICES_S = (30, 120, 120, 300)
"""Notice of each spot venue."""


class Spot(msgspec.Struct, kw_only=True):
    """One spot venue as it stands."""

    id: str
    mean: int
    pico_s: int
    capacity: int
    notice_s: int
    spike_until: int = 0
    spike_factor: int = 1


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Deferrable work: it arrives, takes so many unit-seconds, and has a deadline."""

    id: str
    arrives: int
    need: Need


class World:
    """The market's side of the simulation: what a feed would tell, step by step, and the work that comes.

    Args:
        start: Unix second of the first step.
    """

    def __init__(self, scenario: Scenario, seed: int, start: int) -> None:
        self.scenario = scenario
        self.start = start
        self._rng = random.Random(f"{scenario.name}/{seed}/market")
        self._work = random.Random(f"{scenario.name}/{seed}/work")
        self._base = hourly(ON_DEMAND[0][1])
        self._end = start + 30 * DAY
        self.spots = [
            Spot(
                id=f"spot-{'abcd'[i]}",
                mean=self._base * (scenario.mean_pct + 5 * (i - 1)) // 100,
                pico_s=self._base * (scenario.mean_pct + 5 * (i - 1)) // 100,
                capacity=scenario.capacity,
                notice_s=notice,
            )
            for i, notice in enumerate(NOTICES_S)
        ]

    def lots(self, at: int) -> list[Lot]:
        """Every lot as it is offered now."""
        firm = [
            self._lot(name, hourly(cents), 64, at, preemptible=False, notice_s=0, start_s=90)
            for name, cents in ON_DEMAND
        ]
        return firm + [
            self._lot(
                spot.id, spot.pico_s, spot.capacity, at, preemptible=True, notice_s=spot.notice_s, start_s=60
            )
            for spot in self.spots
        ]

    def _lot(
        self, id: str, pico_s: int, units: int, at: int, *, preemptible: bool, notice_s: int, start_s: int
    ) -> Lot:
        return Lot(
            id=id,
            provider=id,
            model=MODEL,
            capacity=units,
            valid_from=self.start,
            valid_to=self._end,
            listed=at,
            second_pico=pico_s,
            prefill_tps=20_000,
            decode_tps=1_000,
            ttft_ms=300,
            preemptible=preemptible,
            notice_s=notice_s,
            start_s=start_s,
            min_s=60,
            interrupt_ppm=self.scenario.spike_ppm * (HOUR // STEP_S) if preemptible else 0,
            source="simulation",
            simulated=True,
        )

    def step(self, at: int) -> None:
        """Prices revert to their mean of the hour by a twenty-fourth, and wander; venues run short and
        recover."""
        rng, scenario = self._rng, self.scenario
        hour = at % DAY // HOUR
        busy = 12 - abs(hour - 14) if abs(hour - 14) <= 12 else abs(hour - 14) - 12  # 0..12, most at 14 h
        for spot in self.spots:
            here = spot.mean * (200 + scenario.day_pct * (busy - 6) // 6) // 200
            noise = self._base * scenario.noise_pct // 1000
            spot.pico_s += (here - spot.pico_s) // 24 + rng.randrange(-noise, noise + 1)
            spot.pico_s = max(self._base // 10, spot.pico_s)
            spot.capacity += rng.randrange(-1, 2)
            spot.capacity = min(scenario.capacity + 4, max(scenario.capacity // 2, spot.capacity))
            if rng.randrange(1_000_000) < scenario.spike_ppm:
                spot.spike_until = at + rng.randrange(HOUR // 2, 4 * HOUR)
                spot.spike_factor = rng.randrange(2, 5)
                spot.pico_s = min(spot.pico_s * spot.spike_factor, 3 * self._base)
            if at < spot.spike_until:
                spot.capacity = rng.randrange(0, 2)
                spot.pico_s = max(spot.pico_s, spot.mean * 3 // 2)

    def jobs(self, start: int, days: int) -> list[Job]:
        """Deferrable work: 40 jobs a day, 10 minutes to 5 hours each, and 2 to 24 hours more to do it in."""
        rng, made = self._work, []
        for number in range(40 * days):
            arrives = start + rng.randrange(days * DAY)
            seconds = rng.randrange(600, 5 * HOUR)
            deadline = arrives + seconds + rng.randrange(2 * HOUR, DAY)
            need = Need(model=MODEL, seconds=seconds, deadline=deadline, drain_s=30, redo_s=300)
            made.append(Job(id=f"job-{number}", arrives=arrives, need=need))
        return sorted(made, key=lambda job: (job.arrives, job.id))

    def demand(self, start: int, days: int) -> list[int]:
        """Units that interactive work needs in each step: 3 at night to 12 in the afternoon, by at most two
        more than the step before."""
        rng, made, now = self._work, [], 3
        for step in range(days * DAY // STEP_S):
            hour = (start + step * STEP_S) % DAY // HOUR
            busy = 12 - abs(hour - 14) if abs(hour - 14) <= 12 else abs(hour - 14) - 12
            wanted = 3 + 8 * busy // 12 + rng.randrange(0, 2)
            now = min(wanted, now + 2)
            made.append(now)
        return made
