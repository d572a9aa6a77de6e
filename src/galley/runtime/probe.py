"""Measuring ``T(n)``: real steps on real blocks, few and short. What they mean is ``runtime.cost``'s."""

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from galley.kv.table import Table
from galley.runtime.backend.base import Backend
from galley.runtime.cost import CostModel, Sample, fit
from galley.runtime.plan import Draws, Rows
from galley.runtime.processors import Busy, Processors
from galley.runtime.scheduler import Scheduler

__all__ = ["CostProbe", "IdleProbe"]

LADDER = (1, 2, 4, 8, 16, 64, 512)
"""Step sizes measured, in tokens."""
SMALL = 16
"""Sizes up to this are measured in every round, and also with a row of logits for every token."""
SPARE = 4
CONTEXT = 512
"""Positions in the cache at which attention is measured, where they fit."""
ROUNDS = 9
"""Most rounds; the time allowed usually ends them sooner."""

Piece = tuple[int, int, int]
"""Tokens, positions before them, rows of logits: one sequence of a step."""


class CostProbe:
    """One measurement of a backend's step times, a step at a time.

    The order: every size once, ascending, as far as the time allowed reaches; then rounds over the small
    sizes and over contexts; between them, steps that the fit does not see and its error is taken from.

    Args:
        blocks: KV blocks that nobody else uses; their contents are overwritten. 40 of 16 tokens
            suffice for everything.
        seconds: of steps altogether, about. At least one round is made, however long it takes.
        longest_s: no step expected to take longer is made, but for the first two, of one token, which find
            that out: where one token takes longer, nothing is measured. None: one round is made regardless.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        backend: Backend,
        blocks: Sequence[int],
        *,
        seconds: float = 0.9,
        longest_s: float | None = None,
        source: str = "measured",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not blocks:
            raise ValueError("measuring needs at least one KV block")
        self._backend = backend
        self._blocks = list(blocks)
        # The spare ones at the end are for further sequences in a step.
        held = max(1, len(self._blocks) - SPARE)
        self._room = min(held * backend.block_size, backend.spec.context)
        self._seconds = seconds
        self._longest_s = seconds if longest_s is None else longest_s
        self._source = source
        self._clock = clock
        self._random = random.Random(0)
        self._samples: list[Sample] = []
        self._held_out: list[Sample] = []
        self._spent = 0.0
        self._began = _work()
        self._steps = self._course()

    def step(self) -> bool:
        """Run and time one step. False when nothing is left. Raises EngineFault as the backend does."""
        return next(self._steps, None) is not None

    @property
    def measured(self) -> bool:
        """Whether there is something to make a model of."""
        return bool(self._samples)

    def model(self) -> CostModel:
        """What was found so far. Raises ValueError when nothing was measured."""
        return fit(
            self._samples,
            self._held_out,
            crowd=self._crowd(),
            taken=time.time(),
            spent_s=self._spent,
            source=self._source,
        )

    def run(self) -> CostModel:
        """All steps, then the model."""
        while self.step():
            pass
        return self.model()

    def time(self, pieces: list[Piece]) -> float:
        """Seconds of one step of such pieces on random tokens: forward and greedy draw.

        The first sequence takes its blocks from the front, the others from the back. Raises ValueError when
        they need more than there are.
        """
        rows, draws = Rows(), Draws()
        size, used, free = self._backend.block_size, 0, list(self._blocks)
        for count, at, outputs in pieces:
            tokens = [self._random.randrange(self._backend.spec.vocab) for _ in range(count)]
            need = -(-(at + count) // size)
            rows.add(tokens, at, free[:need], outputs)
            free = free[: need - 1 : -1] if used == 0 else free[need:]
            used += need
            for k in range(outputs):
                draws.add(seed=0, position=at + count - outputs + k + 1, lane=0, temperature=0.0)
        if used > len(self._blocks):
            raise ValueError(f"{used} KV blocks are needed, {len(self._blocks)} are there")
        began = self._clock()
        self._backend.run(rows)
        if len(draws):
            self._backend.sample(draws)
        seconds = self._clock() - began
        self._spent += seconds
        return seconds

    def _course(self) -> Iterator[float]:
        yield self.time([(1, 0, 1)])  # the first step pays for page faults and for waking the threads
        first = self.time([(1, 0, 1)])
        yield first
        if first > self._longest_s < self._seconds:
            return  # not even one token is short enough
        last, reached = 0.0, 1
        for size in LADDER:
            # A step that takes twice the tokens takes at most about twice the time.
            if size > self._room or last * size / reached > self._longest_s:
                break
            last, reached = self._note([(size, 0, 0)]), size
            yield last
        # What attention reads must have been written: untouched pages are all one page of zeros.
        context, part = reached, min(64, reached)
        while SMALL <= part <= self._room - context and (
            context == reached or (context < CONTEXT and self._spent < 0.5 * self._seconds)
        ):
            yield self._note([(part, context, 0)])
            context += part
        context = min(context, self._room - 1)
        for number in range(ROUNDS):
            for size in (n for n in LADDER if n <= min(SMALL, reached)):
                yield self._note([(size, 0, 0)])
                yield self._note([(size, 0, size)])
            if context >= SMALL:
                yield self._note([(1, context, 0)])
            if reached > 24:
                yield self._note([(6, 0, 6)], held_out=True)
                yield self._note([(24, 0, 1), (1, 0, 1), (1, 0, 1)], held_out=True)
                yield self._note([(1, context, 1)], held_out=True)
            if number and reached > SMALL and self._spent < 0.5 * self._seconds:
                yield self._note([(min(64, reached), 0, 0)])
            if self._spent >= self._seconds:
                return

    def _note(self, pieces: list[Piece], *, held_out: bool = False) -> float:
        seconds = self.time(pieces)
        sample = Sample(
            tokens=sum(n for n, _, _ in pieces),
            context=sum(at for n, at, _ in pieces if n == 1),
            outputs=sum(out for _, _, out in pieces),
            chunked=sum(n * at for n, at, _ in pieces if n > 1),
            seconds=seconds,
        )
        (self._held_out if held_out else self._samples).append(sample)
        return seconds

    def _crowd(self) -> float | None:
        before, after = self._began, _work()
        if before is None or after is None:
            return None
        wall = max(after[0] - before[0], 1e-3)
        others = (after[1] - before[1]) / wall
        return max(0.0, others + self._backend.threads - len(Processors.read().usable))


def _work() -> tuple[float, float] | None:
    """(Wall clock, processor time of everybody else and of the host) in seconds; None where not told."""
    if not sys.platform.startswith("linux"):
        return None
    busy = Busy.now()
    return time.perf_counter(), busy.used + busy.stolen - time.process_time()


class IdleProbe:
    """Measures on the engine's thread while there is nothing to do, and gives the model to the scheduler.

    Takes free blocks only, so nothing cached is lost, and gives them back before it returns. A model that is
    to be doubted (``CostModel.doubts``) is thrown away; after three of them it is given up.

    Args:
        longest_s: a request that comes during a step waits for its end; none expected to be longer is made.
        found: told the model, to keep it.
    """

    BLOCKS = 40

    def __init__(
        self,
        scheduler: Scheduler,
        backend: Backend,
        *,
        longest_s: float = 0.05,
        found: Callable[[CostModel], None] | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._backend = backend
        self._longest_s = longest_s
        self._found = found
        self._tries = 3

    def run(self, wanted: Callable[[], bool]) -> bool:
        """Measure until ``wanted()`` or the end; whether this is over for good. Else call it again."""
        tree = self._scheduler.tree
        count = min(self.BLOCKS, tree.pool.size)
        if tree.pool.free < count:
            return False  # all is cached: try again when some of it has gone
        table = Table(())
        tree.extend(table, count)
        try:
            probe = CostProbe(self._backend, table.blocks, longest_s=self._longest_s, source="idle")
            while probe.step():
                if wanted():
                    return False
        finally:
            tree.release(table, [], 0)
        if not probe.measured:
            return True  # this backend is too slow to be measured while requests may come
        model = probe.model()
        if model.doubts is not None:
            self._tries -= 1
            return self._tries == 0
        self._scheduler.cost = model
        if self._found is not None:
            self._found(model)
        return True
