"""SIMULATION. A week of work on a made-up spot market, bought by the planner and desk of the live server.

What it shows is how the purchasing rules behave, not what anybody would save: prices are invented.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import msgspec

from galley.evals.scenario import DAY, MODEL, STEP_S, Job, Scenario, World
from galley.router.market.book import Book
from galley.router.market.desk import Desk
from galley.router.market.need import Need
from galley.router.market.planner import Buy, Decline, Planner, Wait
from galley.router.market.reservation import Reservation

__all__ = ["LABEL", "Simulation", "Week", "compare"]

LABEL = "SIMULATION: made-up venues and prices; nothing here was offered or bought"
START = 1_767_225_600
"""2026-01-01T00:00:00Z: an arbitrary Thursday."""
TICK_S = 60
WARM_S = 3 * DAY
"""How long prices were watched before the week."""
LEAD_S = 600
"""How long before the first interactive request units are bought."""
HEADROOM = 2
"""Units more than needed now: as many as demand may grow by while one starts."""
AHEAD_S = 180
"""How long before its end a unit is replaced: a start-up and two ticks."""
TERM_S = {"job": 3600, "interactive": 900}
RULES: dict[str, dict[str, bool]] = {
    "on-demand": {"spot": False, "wait": False},
    "no-waiting": {"spot": True, "wait": False},
    "planned": {"spot": True, "wait": True},
}


class Running(msgspec.Struct):
    """A unit at work: its reservation, and from when it serves."""

    held: Reservation
    ready: int
    leaving: bool = False
    """It has a successor, or needs none."""


class Task(msgspec.Struct):
    """A job under way."""

    job: Job
    left: int
    unit: Running | None = None
    next: Running | None = None
    """Bought to follow it."""
    look: int = 0


class Week(msgspec.Struct, frozen=True, kw_only=True):
    """What one run came to. Money in pico-dollars, as text in JSON."""

    rule: str
    interactive_pico: int
    deferrable_pico: int
    jobs: int
    missed_deadlines: int
    short_minutes: int
    """Minutes in which interactive work had fewer units than it needed."""
    interruptions: int
    trades: int
    waits: int
    digest: str
    """sha256 of every event, in order."""

    @property
    def pico(self) -> int:
        return self.interactive_pico + self.deferrable_pico

    @property
    def missed(self) -> int:
        """Deadlines of either kind."""
        return self.missed_deadlines + self.short_minutes


class Simulation:
    """One week under one rule.

    Args:
        rule: of RULES.
        days: of arrivals; deferrable work is run to its end.
    Attributes:
        events: every trade, interruption, wait and end, in order.
    """

    def __init__(self, scenario: Scenario, seed: int, rule: str, *, days: int = 7) -> None:
        self.rule = rule
        self.world = World(scenario, seed, START - WARM_S)
        self.desk = Desk(Book())
        self.planner = Planner(self.desk, Need(model=MODEL, seconds=3600), look_s=STEP_S, **RULES[rule])
        self.events: list[list[Any]] = []
        self._jobs = self.world.jobs(START, days)
        self._demand = self.world.demand(START, days)
        self._end = START + days * DAY
        self._tasks: list[Task] = []
        self._pool: list[Running] = []
        self._cost = {"job": 0, "interactive": 0}
        self._missed = self._short = self._interruptions = self._trades = self._waits = 0

    def run(self) -> Week:
        """The whole of it. Raises AssertionError when a lot was sold beyond its capacity."""
        for at in range(START - WARM_S, START - LEAD_S, STEP_S):
            self._move(at)
        waiting, at = list(reversed(self._jobs)), START - LEAD_S
        while at < self._end or self._tasks or waiting:
            if at % STEP_S == 0:
                self._move(at)
            self._lapse(at)
            while waiting and waiting[-1].arrives <= at:
                job = waiting.pop()
                self._tasks.append(Task(job, job.need.seconds))
            self._serve(at)
            # The least slack first: capacity that runs out goes to who needs it.
            for task in sorted(self._tasks, key=lambda one: (one.job.need.deadline or 0) - one.left):
                self._work(task, at)
            self._tasks = [task for task in self._tasks if task.left or task.unit]
            if at % STEP_S == 0:
                self._check(at)
            at += TICK_S
        digest = hashlib.sha256()
        for event in self.events:
            digest.update(json.dumps(event).encode() + b"\n")
        return Week(
            rule=self.rule,
            interactive_pico=self._cost["interactive"],
            deferrable_pico=self._cost["job"],
            jobs=len(self._jobs),
            missed_deadlines=self._missed,
            short_minutes=self._short,
            interruptions=self._interruptions,
            trades=self._trades,
            waits=self._waits,
            digest=digest.hexdigest(),
        )

    def _move(self, at: int) -> None:
        """The market's next step, as a feed would bring it."""
        self.world.step(at)
        for lot in self.world.lots(at):
            if not lot.preemptible and self.desk.book.find(lot.id):
                continue  # as it was
            for taken in self.desk.offer(lot, at):
                self._interruptions += 1
                self.events.append([at, "taken", taken.id, taken.lot, taken.end])
        self.planner.note(MODEL, at)

    def _buy(
        self, kind: str, need: Need, at: int, *, after: Reservation | None = None, tag: str
    ) -> Running | None:
        """Ask the planner and do as it says. ``after``: the unit it follows; on the same lot without a gap
        and without starting again, elsewhere started early enough."""
        term = TERM_S[kind]
        stays = after is not None and not after.taken
        said = self.planner.plan(need, at, term_s=term, on=after.lot if after is not None and stays else "")
        if isinstance(said, Wait | Decline):
            self._waits += 1
            return None
        assert isinstance(said, Buy)
        lot = said.match.lot
        start, ready = at, at + lot.start_s
        if after is not None and stays and lot.id == after.lot:
            start = ready = max(at, after.end)
        elif after is not None and kind == "job":
            ready = max(ready, after.end)
        end = min(start + term, lot.valid_to)
        if kind == "job":
            end = min(end, ready + need.seconds)
        held = self.desk.buy(lot, need, start, end, tag=tag)
        self._trades += 1
        self.events.append([at, "bought", held.id, lot.id, held.end, held.pico_s, tag])
        return Running(held, ready)

    def _lapse(self, at: int) -> None:
        for each in self.desk.lapse(at):
            kind = "interactive" if each.tag == "interactive" else "job"
            self._cost[kind] += each.cost_pico
            self.events.append([at, "ended", each.id, each.end, each.cost_pico])

    # ---- interactive work

    def _serve(self, at: int) -> None:
        """Keep as many units as are needed and HEADROOM; count the minutes with too few."""
        if at >= self._end:
            self._shut(at)
            return
        step = max(0, (at - START) // STEP_S)
        needed = self._demand[step]
        need = Need(model=MODEL, seconds=TERM_S["interactive"], max_ttft_ms=500, drain_s=20)
        self._pool = [unit for unit in self._pool if unit.held.end > at]
        surplus = self._staying() - needed - HEADROOM
        for unit in list(self._pool):
            if unit.held.taken or unit.leaving or unit.held.end - at > AHEAD_S:
                continue
            unit.leaving = True
            surplus -= 1
            if surplus < 0:
                # Its successor is bought before it ends, here or elsewhere.
                self._hire(need, at, after=unit.held)
        while self._staying() < needed + HEADROOM and self._hire(need, at):
            pass
        if at >= START and sum(1 for unit in self._pool if unit.ready <= at < unit.held.end) < needed:
            self._short += 1
            self.events.append([at, "short", needed])

    def _staying(self) -> int:
        return sum(1 for unit in self._pool if not unit.held.taken and not unit.leaving)

    def _hire(self, need: Need, at: int, *, after: Reservation | None = None) -> bool:
        new = self._buy("interactive", need, at, after=after, tag="interactive")
        if new is not None:
            self._pool.append(new)
        return new is not None

    def _shut(self, at: int) -> None:
        for unit in self._pool:
            self._cost["interactive"] += self.desk.release(unit.held.id, at)
        self._pool.clear()

    # ---- deferrable work

    def _work(self, task: Task, at: int) -> None:
        need = task.job.need
        unit = task.unit
        if unit is not None and unit.held.end <= at:
            task.left -= self._progress(unit, need)
            task.unit, task.next = task.next, None
            if task.left <= 0:
                late = unit.held.end > (need.deadline or unit.held.end)
                self._missed += late
                self.events.append([unit.held.end, "done", task.job.id, bool(late)])
                return
        unit = task.unit
        if unit is not None:
            if task.next is not None and task.next.held.taken and task.next.ready >= task.next.held.end:
                # Its successor is taken away before it served: another is found while there is time.
                task.next, unit.leaving = None, False
            if not unit.leaving and (unit.held.taken or unit.held.end - at <= AHEAD_S):
                unit.leaving = True
                rest = task.left - self._progress(unit, need)
                if rest > 0:
                    rest_need = msgspec.structs.replace(need, seconds=rest)
                    task.next = self._buy("job", rest_need, at, after=unit.held, tag=task.job.id)
            return
        if at >= task.look:
            left = msgspec.structs.replace(need, seconds=task.left)
            task.unit = self._buy("job", left, at, tag=task.job.id)
            task.look = at + STEP_S

    def _progress(self, unit: Running, need: Need) -> int:
        """Seconds of work that the unit will have done at its end, less what is lost with it."""
        ran = max(0, unit.held.end - unit.ready)
        if unit.held.taken and self._notice(unit.held.lot) < need.drain_s:
            ran -= min(ran, need.redo_s)
        return ran

    def _notice(self, lot: str) -> int:
        found = self.desk.book.find(lot)
        return 0 if found is None else found.notice_s

    def _check(self, at: int) -> None:
        """Conservation: what is in use once every notice given is over fits the capacity."""
        for lot in self.desk.book:
            used = self.desk.used(lot.id, at + lot.notice_s, lot.valid_to)
            assert used <= lot.capacity, f"{lot.id}: {used} of {lot.capacity} units sold"


def compare(scenario: Scenario, seeds: Iterable[int], *, days: int = 7) -> dict[str, Any]:
    """Every rule on every seed, JSON-safe. The saving is against ``on-demand`` of the same seed."""
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        weeks = {rule: Simulation(scenario, seed, rule, days=days).run() for rule in RULES}
        base = weeks["on-demand"]
        runs.append(
            {
                "seed": seed,
                **{
                    rule: {
                        **{k: v for k, v in msgspec.to_builtins(week).items() if not k.endswith("_pico")},
                        "pico": str(week.pico),
                        "interactive_pico": str(week.interactive_pico),
                        "deferrable_pico": str(week.deferrable_pico),
                        "saving": round(1 - week.pico / base.pico, 4),
                        "saving_interactive": round(1 - week.interactive_pico / base.interactive_pico, 4),
                        "saving_deferrable": round(1 - week.deferrable_pico / base.deferrable_pico, 4),
                        "missed": week.missed,
                    }
                    for rule, week in weeks.items()
                },
            }
        )
    savings = sorted(run["planned"]["saving"] for run in runs)
    return {
        "simulation": True,
        "label": LABEL,
        "scenario": scenario.name,
        "words": scenario.words,
        "days": days,
        "runs": runs,
        "saving": {
            "least": savings[0],
            "median": savings[len(savings) // 2],
            "most": savings[-1],
        },
        "missed": sum(run["planned"]["missed"] for run in runs),
    }
