"""The job: the engine's only mutable per-request object."""

from enum import IntEnum
from typing import TYPE_CHECKING

from galley.errors import GalleyError
from galley.kv.chain import Namespace
from galley.kv.table import Table
from galley.runtime.guide import Guide
from galley.runtime.meter import JobMeter
from galley.runtime.reading import Reading
from galley.types import FinishReason, SamplingParams

if TYPE_CHECKING:
    from galley.model.adapter import Adapter

__all__ = ["URGENT", "Job", "State"]

URGENT = -(2**31) - 1
"""The tier of latency-critical jobs, above every priority a client can give (those are 32-bit)."""


class State(IntEnum):
    """Where a job stands. Everything from FINISHED on is over, so ``state >= FINISHED`` is one comparison."""

    WAITING = 0
    """Never scheduled; holds no blocks."""
    PREEMPTED = 1
    """Lost its blocks; output ids, noise positions and counts survive, so it resumes where it was (SCH-5)."""
    RUNNING = 2
    FINISHED = 3
    CANCELLED = 4
    EXPIRED = 5
    FAILED = 6
    PARKED = 7
    """Left the engine as a ``Parked``; over as far as this job is concerned."""


class Job:
    """One choice of one prompt. Only the scheduler changes it.

    Attributes:
        tokens: all known ids, prompt then output.
        computed: positions whose KV is written and committed.
        reached: the highest ``computed`` ever; below it a position is a recomputation.
        limit: length at which the job ends with ``length``.
        verdict: asked for while a step was in flight; carried out in commit (CAN-2).
        tier: ``priority``, or URGENT; lower is served first.
        passed: times a later job of the queue was admitted first because more of it was cached.
        seen: occurrences in the output of every token of prompt and output, None when no penalty needs it.
        resumed_at: number of known tokens at the last preemption, -1 before any.
        guide: keeps the output to a grammar, or None.
        pending: output tokens that the grammar forced before anything was drawn; they go out with the first
            draw.
        banned: ids never drawn.
        adapter: what is added to the model's weights for it, or None.
        reading: what it wants of its prompt's rows beside the one it draws from, or None.
        draws: whether anything is to be drawn at all (``max_tokens`` is not 0).
    """

    __slots__ = (
        "accounted_at",
        "adapter",
        "ban",
        "banned",
        "computed",
        "draws",
        "eos",
        "guide",
        "held_by",
        "held_until",
        "id",
        "lane",
        "limit",
        "max_queue_s",
        "max_total_s",
        "meter",
        "min_length",
        "params",
        "passed",
        "pending",
        "prompt_len",
        "reached",
        "reading",
        "resumed_at",
        "seed",
        "seen",
        "sequence",
        "skipped",
        "state",
        "stop_ids",
        "table",
        "tenant",
        "tier",
        "tokens",
        "verdict",
    )

    def __init__(
        self,
        id: str,
        prompt: list[int],
        params: SamplingParams,
        *,
        eos: frozenset[int],
        context: int,
        sequence: int,
        now: float,
        namespace: Namespace,
        lane: int = 0,
        tenant: str = "local",
        priority: int = 0,
        urgent: bool = False,
        max_queue_s: float | None = None,
        max_total_s: float | None = None,
        guide: Guide | None = None,
        banned: tuple[int, ...] = (),
        reading: Reading | None = None,
        adapter: "Adapter | None" = None,
    ) -> None:
        self.id = id
        self.tokens = list(prompt)
        self.prompt_len = len(prompt)
        self.params = params
        self.seed = params.seed or 0
        self.lane = lane
        self.tenant = tenant
        self.tier = URGENT if urgent else priority
        self.sequence = sequence
        self.max_queue_s = max_queue_s
        self.max_total_s = max_total_s
        self.limit = context if params.max_tokens is None else min(context, len(prompt) + params.max_tokens)
        self.stop_ids = frozenset(params.stop_token_ids or ())
        self.eos = frozenset() if params.ignore_eos else eos
        self.min_length = len(prompt) + params.min_tokens
        self.ban = sorted(self.eos | self.stop_ids) if params.min_tokens else []
        self.seen: dict[int, int] | None = None
        if params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty:
            self.seen = dict.fromkeys(prompt, 0)
        self.state = State.WAITING
        self.verdict: GalleyError | FinishReason | None = None
        self.computed = 0
        self.reached = 0
        self.table = Table(namespace)
        self.meter = JobMeter(prompt_tokens=len(prompt), arrived=now)
        self.accounted_at = now
        self.skipped = 0
        self.passed = 0
        self.resumed_at = -1
        self.held_by: Job | None = None
        self.held_until = 0
        self.guide = guide
        self.banned = banned
        self.reading = reading
        self.adapter = adapter
        self.draws = self.limit > len(prompt)
        self.pending: list[int] = []
        if guide is not None:
            forced = guide.begin(self._forcible())
            ends = self.stop_ids | self.eos
            cut = next((place for place, token in enumerate(forced) if token in ends), len(forced))
            if cut < len(forced):  # one of the request's own stop ids: left to be drawn
                guide.rollback(len(forced) - cut)
            self.pending = forced[:cut]
            for token in self.pending:
                self.take(token)

    @property
    def over(self) -> bool:
        """Finished, cancelled, expired or failed."""
        return self.state >= State.FINISHED

    @property
    def remaining(self) -> int:
        """Most tokens that may still be drawn."""
        return self.limit - len(self.tokens)

    def outputs(self, count: int) -> int:
        """Rows of logits that its next ``count`` tokens must give: those it reads, then the one it draws
        from."""
        end = self.computed + count
        drawn = int(self.draws and end == len(self.tokens))
        if self.reading is None or self.reading.states:
            return drawn
        first, last = self.reading.span(self.computed, end)
        return last - first + drawn

    def take(self, token: int) -> FinishReason | None:
        """Append one drawn token; how the job ends with it, if it does."""
        self.tokens.append(token)
        if self.seen is not None:
            self.seen[token] = self.seen.get(token, 0) + 1
        # min_tokens bans these ids until it is reached, so a drawn one always counts.
        if token in self.eos or token in self.stop_ids:
            return "stop"
        if len(self.tokens) >= self.limit:
            return "length"
        return None

    def draw(self, token: int) -> tuple[list[int], FinishReason | None]:
        """Append one drawn token and those that its grammar then forces; all that is new, and how it ends.

        Forced tokens are known without a draw, so the next step computes them in one chunk (GRM-6). Raises
        GalleyError when the guide fails.
        """
        new, self.pending = [*self.pending, token], []
        finish = self.take(token)
        if self.guide is None:
            return new, finish
        for forced in self.guide.accept(token, 0 if finish else self._forcible()):
            new.append(forced)
            finish = self.take(forced)
            if finish is not None:  # one of the request's own stop ids
                return new, finish
        return new, "stop" if self.guide.ended else finish

    def _forcible(self) -> int:
        """Most tokens that may be taken without a draw. One is always left to draw; where log-probabilities
        are asked for every token is drawn, since only a draw has them, and the same tokens come out."""
        return 0 if self.params.logprobs is not None else max(0, self.limit - len(self.tokens) - 1)
