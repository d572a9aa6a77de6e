"""Does an endpoint serve the model it claims? A two-sample test of its outputs against those of a reference.

Model equality testing (Gao, Liang and Guestrin, 2024): prompts are answered several times by both; the
squared maximum mean discrepancy with the string Hamming kernel (share of leading characters that are equal),
summed over prompts, is compared with its values when the answers of each prompt are dealt anew at random. The
permutations keep the level: where both are the same, at most ``alpha`` of tests say otherwise, whatever the
outputs look like.
"""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from galley.errors import InvalidRequest

__all__ = ["Verdict", "same_model"]

Floats = npt.NDArray[np.float64]
LENGTH = 200
"""Characters of an answer that are compared."""
Texts = Mapping[str, Sequence[str]]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the test says.

    Attributes:
        same: no difference was found at ``alpha``. That is no proof of identity.
        p_value: share of random deals at least as far apart as what was seen.
        distance: sum over prompts of the unbiased squared MMD; about 0 when both are the same.
        prompts, reference, other: how many prompts, and answers of either side in all.
    """

    same: bool
    p_value: float
    alpha: float
    distance: float
    prompts: int
    reference: int
    other: int


def same_model(
    reference: Texts, other: Texts, *, alpha: float = 0.01, permutations: int = 1000, seed: int = 0
) -> Verdict:
    """Test. O(prompts x permutations x answers squared) multiply-adds.

    Raises InvalidRequest: no common prompt has two answers or more of either side, or ``alpha`` is smaller
    than the permutations can tell.
    """
    if not 1 / (permutations + 1) <= alpha < 1:
        raise InvalidRequest(f"{permutations} permutations cannot tell a level of {alpha:g}", param="alpha")
    common = [p for p in reference if len(reference[p]) > 1 and len(other.get(p, ())) > 1]
    if not common:
        raise InvalidRequest("no prompt has two answers or more of both sides", param="prompts")
    rng = np.random.default_rng(seed)
    seen, dealt = 0.0, np.zeros(permutations)
    for prompt in common:
        answers = [*reference[prompt], *other[prompt]]
        n, total = len(reference[prompt]), len(answers)
        kernel = hamming(answers)
        np.fill_diagonal(kernel, 0.0)
        sides = np.zeros((permutations + 1, total))
        sides[0, :n] = 1.0
        for row in range(1, permutations + 1):
            sides[row, rng.permutation(total)[:n]] = 1.0
        values = mmd(kernel, sides, n, total - n)
        seen += float(values[0])
        dealt += values[1:]
    p = (1 + int((dealt >= seen - 1e-12).sum())) / (permutations + 1)
    return Verdict(
        same=p > alpha,
        p_value=p,
        alpha=alpha,
        distance=seen,
        prompts=len(common),
        reference=sum(len(reference[prompt]) for prompt in common),
        other=sum(len(other[prompt]) for prompt in common),
    )


def hamming(answers: Sequence[str]) -> Floats:
    """float64 [N, N]: share of the first LENGTH characters that are equal; beyond its end an answer equals
    another that has ended too."""
    table = np.full((len(answers), LENGTH), -1, np.int64)
    for row, answer in enumerate(answers):
        codes = [ord(letter) for letter in answer[:LENGTH]]
        table[row, : len(codes)] = codes
    return np.asarray((table[:, None, :] == table[None, :, :]).mean(axis=2), dtype=np.float64)


def mmd(kernel: Floats, sides: Floats, n: int, m: int) -> Floats:
    """float64 [deals]: the unbiased squared MMD of every deal; ``sides`` is 1 where an answer is of the
    first."""
    others = 1.0 - sides
    within = ((sides @ kernel) * sides).sum(axis=1) / (n * (n - 1))
    beyond = ((others @ kernel) * others).sum(axis=1) / (m * (m - 1))
    across = ((sides @ kernel) * others).sum(axis=1) / (n * m)
    return np.asarray(within + beyond - 2 * across, dtype=np.float64)
