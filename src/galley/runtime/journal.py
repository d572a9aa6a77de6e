"""The scheduler's journal: everything that goes into it and every plan that comes out, one JSON line each.

A plan is a function of state, arrivals and clock (SCH-9). So a journal can be played again, without model or
machine, and must give the same plans; where it does not, something else has leaked into a decision.
"""

import logging
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Unpack

import msgspec

from galley.errors import GalleyError, InvalidRequest
from galley.runtime.arrival import Terms
from galley.runtime.fairness import Fairness
from galley.runtime.guide import Guide
from galley.runtime.job import Job, State
from galley.runtime.park import Parked, resume
from galley.runtime.plan import Drawn, Plan
from galley.runtime.policy import Policy
from galley.runtime.reading import reading_of
from galley.runtime.scheduler import Scheduler
from galley.types import CacheHint, SamplingParams

__all__ = ["Journal", "Recorded", "Replay", "replay"]

log = logging.getLogger(__name__)

VERSION = 3


class Journal:
    """An append-only JSONL file of at most ``max_bytes``, readable by its owner alone: it holds token ids.

    A journal begins with an empty scheduler and cannot be cut at the front, so when the limit is reached, or
    the disk says no, writing ends with a log line and ``fault``; the engine goes on.

    Raises OSError when the file cannot be made.
    """

    def __init__(self, path: Path, *, max_bytes: int = 64 << 20) -> None:
        self.path = path
        self.fault: str | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.touch(mode=0o600, exist_ok=False)
        self._file: BinaryIO | None = path.open("ab", buffering=1 << 16)
        self._left = max_bytes

    def write(self, event: dict[str, Any]) -> None:
        """Add one event; nothing once the journal has ended."""
        if self._file is None:
            return
        line = msgspec.json.encode(event) + b"\n"
        self._left -= len(line)
        if self._left < 0:
            self._end("it has reached its limit")
            return
        try:
            self._file.write(line)
        except OSError as error:
            self._end(str(error))

    def close(self) -> None:
        """Write out what is buffered. Idempotent."""
        if self._file is not None:
            self._end(None)

    def _end(self, fault: str | None) -> None:
        file, self._file, self.fault = self._file, None, fault
        if fault is not None:
            log.warning("the scheduler's journal %s ends here: %s", self.path, fault)
        try:
            if file is not None:
                file.close()
        except OSError as error:
            self.fault = str(error)
            log.warning("the scheduler's journal %s is incomplete: %s", self.path, error)


class Heard:
    """A guide that writes down what it makes its job take: a grammar is no part of a journal."""

    def __init__(self, guide: Guide) -> None:
        self.guide = guide
        self.said: list[tuple[list[int], bool]] = []
        """Tokens forced, and whether the output then was complete; since they were last written."""

    @property
    def ended(self) -> bool:
        return self.guide.ended

    def begin(self, most: int) -> list[int]:
        forced = self.guide.begin(most)
        self.said.append((forced, False))
        return forced

    def accept(self, token: int, most: int) -> list[int]:
        forced = self.guide.accept(token, most)
        self.said.append((forced, self.guide.ended))
        return forced

    def fill(self, masks: "array[int]", row: int) -> None:
        self.guide.fill(masks, row)

    def rollback(self, count: int) -> None:
        self.guide.rollback(count)


class Named(msgspec.Struct, frozen=True):
    """An adapter of which only the name is known: weights are no part of a journal."""

    name: str
    digest: str

    @property
    def key(self) -> str:
        return f"{self.name}@{self.digest}"


class Told:
    """A guide that says again what was heard; where a draw has no words left, the guide had failed there."""

    def __init__(self, begun: list[int]) -> None:
        self.begun = begun
        self.next: list[tuple[list[int], bool]] = []
        self.ended = False

    def begin(self, most: int) -> list[int]:
        return self.begun

    def accept(self, token: int, most: int) -> list[int]:
        if not self.next:
            raise GalleyError("as recorded", code="guide_failed")
        forced, self.ended = self.next.pop(0)
        return forced

    def fill(self, masks: "array[int]", row: int) -> None:
        raise RuntimeError("nothing is drawn in a replay")

    def rollback(self, count: int) -> None:
        """Nothing: what was heard stays."""


class Recorded(Scheduler):
    """A scheduler that writes down what it is told and what it plans."""

    def __init__(self, journal: Journal, **options: Any) -> None:
        super().__init__(**options)
        self.journal = journal
        policy, fairness = self.policy, self.fairness
        plain = {name: options[name] for name in PLAIN if name in options}
        journal.write(
            {
                "event": "begin",
                "version": VERSION,
                "options": {**plain, "eos": sorted(self.eos)},
                "policy": {"name": type(policy).__name__, **vars(policy)},
                "fairness": {
                    "w_in": fairness.w_in,
                    "w_out": fairness.w_out,
                    "weights": fairness.weights,
                    "credit": fairness.credit,
                },
            }
        )

    def submit(
        self,
        job_id: str,
        prompt: list[int],
        params: SamplingParams,
        now: float,
        *,
        checked: bool = False,
        **terms: Unpack[Terms],
    ) -> Job:
        heard = None if (guide := terms.get("guide")) is None else Heard(guide)
        if heard is not None:
            terms["guide"] = heard
        job = super().submit(job_id, prompt, params, now, checked=checked, **terms)
        plain = {name: value for name, value in terms.items() if name not in ("guide", "reading", "adapter")}
        reading = terms.get("reading")
        event = {"event": "submit", "now": now, "job": job_id, "prompt": prompt, "params": params}
        begun = {} if heard is None else {"begun": heard.said.pop()[0]}
        reads: dict[str, Any] = {} if reading is None else {"reads": reading.kind}
        if (adapter := terms.get("adapter")) is not None:
            reads["adapter"] = {"name": adapter.name, "digest": adapter.digest}
        self.journal.write({**event, "terms": plain, **begun, **reads})
        return job

    def enter(self, job: Job, now: float) -> None:
        super().enter(job, now)
        if job.state is State.PREEMPTED:  # else it was submitted
            self.journal.write({"event": "resume", "now": now, "parked": Parked.of(job)})

    def park(self, job: Job, now: float) -> None:
        self.journal.write({"event": "park", "now": now, "job": job.id})
        super().park(job, now)

    def new_epoch(self) -> None:
        self.journal.write({"event": "epoch"})
        super().new_epoch()

    def cancel(self, job_id: str, now: float) -> bool:
        self.journal.write({"event": "cancel", "now": now, "job": job_id})
        return super().cancel(job_id, now)

    def finish(self, job_id: str, now: float) -> bool:
        self.journal.write({"event": "finish", "now": now, "job": job_id})
        return super().finish(job_id, now)

    def plan(self, now: float) -> Plan:
        plan = super().plan(now)
        self.journal.write({"event": "plan", "now": now, "rows": plan.log()})
        return plan

    def commit(self, plan: Plan, drawn: Drawn, now: float) -> None:
        guides = {job.id: job.guide for job in plan.rows if isinstance(job.guide, Heard)}
        try:
            super().commit(plan, drawn, now)
        finally:
            said = {name: guide.said for name, guide in guides.items() if guide.said}
            self.journal.write({"event": "commit", "now": now, "ids": drawn.ids, "said": said})
            for guide in guides.values():
                guide.said = []

    def fail(self, plan: Plan, error: GalleyError, now: float) -> None:
        self.journal.write({"event": "fail", "now": now})
        super().fail(plan, error, now)

    def reset(self, error: GalleyError, now: float) -> None:
        self.journal.write({"event": "reset", "now": now})
        super().reset(error, now)


PLAIN = (
    "num_blocks",
    "block_size",
    "vocab",
    "context",
    "token_budget",
    "chunk",
    "max_jobs",
    "max_queue",
    "max_wait_s",
    "model_key",
    "adapters",
)
"""Options of a Scheduler that are numbers or text."""


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """What came of playing a journal again."""

    plans: int
    """Plans that were compared."""
    difference: str | None
    """The first plan that differs, in words; None when all are the same."""

    @property
    def same(self) -> bool:
        return self.difference is None


def replay(lines: Iterable[bytes | str], *, policy: Policy | None = None) -> Replay:
    """Play a journal's lines again and compare every plan; stops at the first difference.

    Args:
        policy: the policy of that time, when it was not the default one.

    Raises InvalidRequest for lines that are no journal.
    """
    scheduler: Scheduler | None = None
    plan: Plan | None = None
    plans = 0
    error = GalleyError("as recorded")
    for number, line in enumerate(lines, 1):
        try:
            event = msgspec.json.decode(line)
            kind, now = event["event"], event.get("now", 0.0)
            if kind == "begin":
                scheduler = begin(event, policy)
            elif scheduler is None:
                raise KeyError("begin")
            elif kind == "submit":
                params = msgspec.convert(event["params"], SamplingParams, str_keys=True)
                terms = event["terms"]
                if terms.get("cache") is not None:
                    terms["cache"] = msgspec.convert(terms["cache"], CacheHint)
                if "banned" in terms:
                    terms["banned"] = tuple(terms["banned"])
                if "begun" in event:
                    terms["guide"] = Told(event["begun"])
                if "adapter" in event:
                    terms["adapter"] = Named(**event["adapter"])
                if "reads" in event:
                    terms["reading"] = reading_of(event["reads"], len(event["prompt"]))
                scheduler.submit(event["job"], event["prompt"], params, now, checked=True, **terms)
            elif kind == "resume":
                parked = msgspec.convert(event["parked"], Parked, str_keys=True)
                resume(scheduler, parked, parked.job_id, now)
            elif kind == "park":
                scheduler.park(scheduler.jobs[event["job"]], now)
            elif kind == "epoch":
                scheduler.new_epoch()
            elif kind in ("cancel", "finish"):
                getattr(scheduler, kind)(event["job"], now)
            elif kind == "plan":
                plan = scheduler.plan(now)
                plans += 1
                planned = [list(row) for row in plan.log()]
                if planned != event["rows"]:
                    where = f"line {number}, plan {plans}"
                    return Replay(plans=plans, difference=f"{where}: {planned} instead of {event['rows']}")
            elif kind == "reset":
                scheduler.reset(error, now)
            elif plan is None:
                raise KeyError("plan")
            elif kind == "commit":
                ids = event["ids"]
                for name, said in event["said"].items():
                    guide = scheduler.jobs[name].guide
                    if isinstance(guide, Told):
                        guide.next = [(list(forced), bool(ended)) for forced, ended in said]
                zeros = [0.0] * len(ids)
                scheduler.commit(plan, Drawn(ids, zeros, [0] * len(ids), [[] for _ in ids]), now)
            elif kind == "fail":
                scheduler.fail(plan, error, now)
            else:
                raise KeyError(kind)
            scheduler.take()
        except (msgspec.MsgspecError, KeyError, TypeError, AttributeError) as fault:
            raise InvalidRequest(
                f"line {number} is no line of a scheduler's journal: {fault!r}", code="bad_journal"
            ) from fault
        except RuntimeError as fault:
            return Replay(plans=plans, difference=f"line {number}: {fault}")
    if scheduler is None:
        raise InvalidRequest("the journal is empty", code="bad_journal")
    return Replay(plans=plans, difference=None)


def begin(event: dict[str, Any], policy: Policy | None) -> Scheduler:
    """The empty scheduler of a journal's first line."""
    if event["version"] != VERSION:
        raise InvalidRequest(f"a journal of version {event['version']}, not {VERSION}", code="bad_journal")
    numbers = dict(event["policy"])
    name = numbers.pop("name")
    if policy is None:
        if name != Policy.__name__:
            raise InvalidRequest(
                f"this journal was written under the policy {name!r}: give it", code="bad_journal"
            )
        policy = Policy()
        vars(policy).update(numbers)
    options = event["options"]
    eos = frozenset(options.pop("eos"))
    return Scheduler(**options, eos=eos, policy=policy, fairness=Fairness(**event["fairness"]))
