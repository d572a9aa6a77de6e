"""The only loop: plan → run → mask → sample → commit."""

from collections.abc import Callable

from galley.errors import EngineFault
from galley.runtime.backend.base import Backend
from galley.runtime.cost import Forecast, shape_of
from galley.runtime.job import Job
from galley.runtime.masks import Masks
from galley.runtime.out import StepOut
from galley.runtime.plan import Drawn, Draws, Plan, Rows
from galley.runtime.scheduler import Scheduler

__all__ = ["Loop"]


class Loop:
    """One step at a time, in the caller's thread. Knows no queue, no clock of its own and no text.

    Args:
        clock: monotonic seconds.
        arrivals: called after the forward and before commit, to mark cancels that came meanwhile (CAN-2).
    """

    def __init__(
        self,
        scheduler: Scheduler,
        backend: Backend,
        *,
        clock: Callable[[], float],
        arrivals: Callable[[], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.backend = backend
        self.clock = clock
        self.arrivals = arrivals
        self.faults = 0
        self.masks = Masks(backend.spec.vocab)
        self.forecast = Forecast()
        """What the scheduler's cost model said of the steps, against what they took."""
        self._draws = Draws()
        self._drawing: list[Job] = []
        self._guided: list[Job] = []

    def close(self) -> None:
        """Stop the thread that fills masks. Idempotent."""
        self.masks.close()

    def step(self) -> list[StepOut]:
        """One step, if there is work; what came of it. A backend fault ends the step's jobs only (CAN-3)."""
        scheduler, backend = self.scheduler, self.backend
        plan = scheduler.plan(self.clock())
        if plan.rows:
            fault: EngineFault | None = None
            drawn = Drawn([], [], [], [])
            cost = scheduler.cost
            predicted = plan.predicted = None if cost is None else cost.predict(*shape_of(plan))
            began = self.clock()
            moves = scheduler.residency.moves()
            try:
                while moves:
                    backend.place_adapter(*moves[0])
                    del moves[0]
                rows = self.rows(plan)
                draws = self.mask(plan) if rows.out else None
                try:
                    backend.run(rows)
                finally:
                    self.masks.wait()
                states = backend.states() if rows.states else None
                if draws is not None:
                    drawn = backend.sample(draws)
                    if len(drawn.ids) != len(rows.out):
                        fault = EngineFault(f"{len(drawn.ids)} tokens drawn for {len(rows.out)} rows")
                drawn.states = states
            except EngineFault as error:
                fault = error
            except Exception as error:
                fault = EngineFault(f"the step failed: {type(error).__name__}: {error}")
                fault.__cause__ = error
            except BaseException:  # Ctrl-C offline: leave a scheduler that can go on
                scheduler.fail(plan, EngineFault("the step was interrupted"), self.clock())
                scheduler.residency.lost(moves)
                raise
            if predicted is not None and fault is None:
                self.forecast.note(predicted, self.clock() - began)
            if self.arrivals is not None:
                self.arrivals()
            if fault is None:
                scheduler.commit(plan, drawn, self.clock())
            else:
                self.faults += 1
                scheduler.fail(plan, fault, self.clock())
                scheduler.residency.lost(moves)
        return scheduler.take()

    def rows(self, plan: Plan) -> Rows:
        """The step's tokens as flat arrays. Logits are wanted where a job's known tokens end, and what a job
        reads."""
        rows = Rows()
        for job, count in plan.rows.items():
            start, tokens = job.computed, job.tokens
            end = start + count
            drawn = end == len(tokens) and job.draws
            if job.reading is None:
                rows.add(tokens[start:end], start, job.table.blocks, 1 if drawn else 0)
            else:
                first, last = job.reading.span(start, end)
                rows.add(tokens[start:end], start, job.table.blocks, 0)
                rows.read(first, last, states=job.reading.states)
                if drawn:
                    rows.read(end - 1, end, states=False)
            if job.adapter is not None:
                rows.adapt(self.scheduler.residency.slot(job.adapter))
        return rows

    def mask(self, plan: Plan) -> Draws:
        """How to draw from each output row: bans, bias, penalties, noise position. The grammar masks begin to
        be filled here and are complete after ``masks.wait`` (GRM-2).

        Valid until the next call: while the same jobs draw and nothing but their positions changes, as in a
        steady run of decodes, the last step's arrays are brought up to date in place.
        """
        jobs = [
            job for job, count in plan.rows.items() if job.computed + count == len(job.tokens) and job.draws
        ]
        if plan.scored:
            return self._scored(plan, jobs)
        if jobs == self._drawing:
            position = self._draws.position
            for row, job in enumerate(jobs):
                position[row] = len(job.tokens)
            if self._guided:
                self.masks.start(self._guided, self._draws.masks)
            return self._draws
        self._draws = draws = self._begin(jobs)
        steady = True
        for job in jobs:
            steady = self._draw(draws, job) and steady
        self._drawing = jobs if steady else []
        return draws

    def _begin(self, jobs: list[Job]) -> Draws:
        """Draws without rows; the masks of the guided among ``jobs`` are begun."""
        draws = Draws()
        self._guided = guided = [job for job in jobs if job.guide is not None]
        if guided:
            draws.masks = self.masks.room(len(guided))
            self.masks.start(guided, draws.masks)
        return draws

    def _scored(self, plan: Plan, jobs: list[Job]) -> Draws:
        """``mask`` for a step in which jobs score tokens of their prompts: rows whose id is given."""
        self._draws, self._drawing = self._begin(jobs), []
        drawing = set(jobs)
        for job, count in plan.rows.items():
            if job.reading is not None and not job.reading.states:
                first, last = job.reading.span(job.computed, job.computed + count)
                for position in range(first, last):
                    self._draws.add(
                        seed=0,
                        position=position,
                        lane=0,
                        temperature=0.0,
                        logprobs=job.params.logprobs or 0,
                        given=job.tokens[position + 1],
                    )
            if job in drawing:
                self._draw(self._draws, job)
        return self._draws

    def _draw(self, draws: Draws, job: Job) -> bool:
        """Add the row a job draws from; whether it differs from its next one by its position alone."""
        params, length = job.params, len(job.tokens)
        early = job.ban if length < job.min_length else ()
        draws.add(
            seed=job.seed,
            position=length,
            lane=job.lane,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
            logprobs=-1 if params.logprobs is None else params.logprobs,
            bias=params.logit_bias,
            ban=(*job.banned, *early),
            seen=job.seen,
            mask_row=self._guided.index(job) if job.guide is not None else -1,
        )
        return not early and job.seen is None
