"""What the machine has been seen to do: seconds of a step by what was in it."""

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
    """Seconds of a step as ``start + prompt·(prompt tokens) + output·(decode rows)``, fitted as steps come.

    Least squares with exponential forgetting; a coefficient that would be negative is left out. From it, how
    long a given amount of waiting work will take. O(1) a step. Pure: times are arguments.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.output_tokens = FIRST_OUTPUT
        """Tokens of an answer, a moving mean."""
        self._ata = [0.0] * 6  # upper triangle: 11, 12, 13, 22, 23, 33
        self._atb = [0.0] * 3

    def observe(self, prompt: int, rows: int, seconds: float) -> None:
        """One step took so long.

        Clocks that stand still or jump backwards tell nothing. A step that took far longer than it should
        have (the process was stopped, the machine slept) counts only as ``OUTLIER`` times that.
        """
        if seconds <= 0.0:
            return
        if self.steps >= ENOUGH:
            start, each, row = self._fit()
            seconds = min(seconds, OUTLIER * (start + prompt * each + rows * row) or seconds)
        self.steps += 1
        x, y = float(prompt), float(rows)
        new = (1.0, x, y, x * x, x * y, y * y)
        self._ata = [DECAY * old + value for old, value in zip(self._ata, new, strict=True)]
        self._atb = [DECAY * old + value * seconds for old, value in zip(self._atb, (1.0, x, y), strict=True)]

    def ended(self, tokens: int) -> None:
        """A job ended with so many tokens drawn."""
        self.output_tokens += 0.05 * (tokens - self.output_tokens)

    def seconds(self, prompt: float, output: float, *, budget: int, slots: int) -> float | None:
        """Time to serve so many waiting prompt and output tokens; None before enough has been seen.

        Args:
            budget: tokens of a step. slots: jobs that run at once.
        """
        if self.steps < ENOUGH:
            return None
        start, each, row = self._fit()
        # Full steps: either the slots or the token budget are what runs out.
        steps = max(output / slots, (prompt + output) / budget)
        return steps * start + prompt * each + output * row

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
