"""What the machine has been seen to do: seconds of a step by what was in it."""

from galley.runtime.cost import CostModel

__all__ = ["ServiceRate"]

DECAY = 0.98
"""Weight of the past at each step: about the last fifty steps count."""
FIRST_OUTPUT = 128.0
"""Tokens an answer is taken to have before any has ended."""
OUTLIER = 4.0
"""Times the expected duration at which a step's own is cut off."""
ENOUGH = 8
"""Steps seen before anything is said."""


class ServiceRate:
    """How long a given amount of waiting work will take.

    With a cost model T(n), a step is what that says for its shape, times ``pace``: how much longer the steps
    of late have taken than it said, from the end of one to the end of the next, so that what lies between
    two steps and what others take of the machine are in it. Without one, seconds of a step are
    ``start + prompt·(prompt tokens) + output·(decode rows)``, fitted as steps come: least squares with
    exponential forgetting, a coefficient that would be negative left out. O(1) a step. Pure: times are
    arguments.
    """

    def __init__(self, cost: CostModel | None = None) -> None:
        self.cost = cost
        self.steps = 0
        self.output_tokens = FIRST_OUTPUT
        """Tokens of an answer, a moving mean."""
        self.length = FIRST_OUTPUT
        """Tokens of prompt and answer, a moving mean."""
        self._ended = 0
        self._took = self._said = 0.0
        self._ata = [0.0] * 6  # upper triangle: 11, 12, 13, 22, 23, 33
        self._atb = [0.0] * 3

    @property
    def known(self) -> bool:
        """Whether ``seconds`` has anything to say."""
        return self.cost is not None or self.steps >= ENOUGH

    @property
    def pace(self) -> float:
        """What steps take of late over what the cost model says; 1 before any."""
        return self._took / self._said if self._said else 1.0

    def observe(self, prompt: int, rows: int, seconds: float, predicted: float | None = None) -> None:
        """One step took so long, and was to take ``predicted``.

        Clocks that stand still or jump backwards tell nothing. A step that took far longer than it should
        have (the process was stopped, the machine slept) counts only as ``OUTLIER`` times that.
        """
        if seconds <= 0.0:
            return
        if self.steps >= ENOUGH:
            start, each, row = self._fit()
            seconds = min(seconds, OUTLIER * (start + prompt * each + rows * row) or seconds)
        self.steps += 1
        if predicted:
            took = min(seconds, OUTLIER * predicted * self.pace)
            self._took = DECAY * self._took + took
            self._said = DECAY * self._said + predicted
        x, y = float(prompt), float(rows)
        new = (1.0, x, y, x * x, x * y, y * y)
        self._ata = [DECAY * old + value for old, value in zip(self._ata, new, strict=True)]
        self._atb = [DECAY * old + value * seconds for old, value in zip(self._atb, (1.0, x, y), strict=True)]

    def ended(self, tokens: int, length: int) -> None:
        """A job ended with so many tokens drawn, of so many in all."""
        self._ended += 1
        weight = max(0.05, 1.0 / self._ended)
        self.output_tokens += weight * (tokens - self.output_tokens)
        self.length += weight * (length - self.length)

    def seconds(
        self, prompt: float, output: float, *, budget: int, slots: int, rows: int = 0
    ) -> float | None:
        """Time to serve so many waiting prompt and output tokens; None before anything is known.

        Args:
            budget: tokens of a step. slots: jobs that run at once. rows: those that decode meanwhile.
        """
        if not self.known:
            return None
        # Full steps: either the slots or the token budget are what runs out.
        steps = max(output / slots, (prompt + output) / budget, prompt / max(1, budget - rows))
        if not steps:
            return 0.0
        decodes = max(output / steps, float(rows))
        if self.cost is None:
            start, each, row = self._fit()
            return steps * start + prompt * each + steps * decodes * row
        chunk = prompt / steps
        one = self.cost.predict(
            max(1, round(min(budget, chunk + decodes))),
            round(decodes * self.length),
            round(decodes),
            round(chunk * self.length / 2),
        )
        return steps * one * self.pace

    def _fit(self) -> tuple[float, float, float]:
        a11, a12, a13, a22, a23, a33 = self._ata
        full = [[a11, a12, a13], [a12, a22, a23], [a13, a23, a33]]
        kept = [0, 1, 2]
        while kept:
            found = solve([[full[i][j] for j in kept] for i in kept], [self._atb[i] for i in kept])
            worst = min(range(len(kept)), key=lambda i: found[i])
            if found[worst] >= 0.0:
                each = [0.0, 0.0, 0.0]
                for place, value in zip(kept, found, strict=True):
                    each[place] = value
                return each[0], each[1], each[2]
            del kept[worst]
        return 0.0, 0.0, 0.0


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """A small positive definite system by Gaussian elimination; a ridge keeps a poor one solvable."""
    size = len(right)
    scale = max((matrix[i][i] for i in range(size)), default=0.0)
    rows = [[*matrix[i], right[i]] for i in range(size)]
    for i in range(size):
        rows[i][i] += 1e-6 * (matrix[i][i] or scale) + 1e-12
    for i in range(size):
        pivot = rows[i][i]
        for k in range(i + 1, size):
            factor = rows[k][i] / pivot
            for j in range(i, size + 1):
                rows[k][j] -= factor * rows[i][j]
    found = [0.0] * size
    for i in reversed(range(size)):
        found[i] = (rows[i][size] - sum(rows[i][j] * found[j] for j in range(i + 1, size))) / rows[i][i]
    return found
