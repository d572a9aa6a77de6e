"""Counter noise: known answers, independence of evaluation order, the right distribution (SMP-4)."""

import numpy as np
import pytest

from galley.runtime.sampling.philox import gumbel, philox4x32, uniform

# Known-answer vectors of Random123 (kat_vectors, philox4x32 with 10 rounds).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    found = philox4x32(np.array([counter, (1, 2, 3, 4)], dtype=np.uint32), key)
    assert tuple(found[0].tolist()) == answer


def test_counter_and_key_layout() -> None:
    seed, position, lane = 0x0123456789ABCDEF, 0x1_0000_0007, 3
    ids = np.array([0, 1, 2, 3, 4, 49151])
    found = uniform(seed, position, lane, ids)
    for token, value in zip(ids.tolist(), found.tolist(), strict=True):
        counter = np.array([[token >> 2, lane, 7, 1]], dtype=np.uint32)
        word = philox4x32(counter, (0x89ABCDEF, 0x01234567))[0, token & 3]
        assert value == np.float32(np.float32(word) * np.float32(2**-32) + np.float32(2**-33))


def test_smp4_value_does_not_depend_on_the_other_ids() -> None:
    ids = np.arange(1000)
    whole = gumbel(5, 17, 1, ids)
    assert np.array_equal(gumbel(5, 17, 1, ids[::-7]), whole[::-7])
    assert np.array_equal(gumbel(5, 17, 1, ids[613:614]), whole[613:614])


@pytest.mark.parametrize(
    "other", [(6, 17, 1), (5, 18, 1), (5, 17, 2), (5 + 2**32, 17, 1), (5, 17 + 2**32, 1)]
)
def test_every_part_of_the_key_matters(other: tuple[int, int, int]) -> None:
    ids = np.arange(64)
    assert not np.intersect1d(uniform(5, 17, 1, ids), uniform(*other, ids)).size


def test_gumbel_moments() -> None:
    noise = gumbel(1, 2, 0, np.arange(400_000)).astype(np.float64)
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.01
    assert abs(noise.var() - np.pi**2 / 6) < 0.02


def test_extreme_words_give_no_winning_infinity() -> None:
    v = np.array([0, 0xFFFFFFFF], dtype=np.uint32).astype(np.float32) * np.float32(2**-32) + np.float32(
        2**-33
    )
    with np.errstate(divide="ignore"):
        noise = -np.log(-np.log1p(-v))
    assert noise[0] == pytest.approx(33 * np.log(2))
    assert noise[1] == -np.inf
