"""Counter-based noise (SMP-4): Philox4x32-10, so a draw depends on where it is, never on what came before.

Source: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["gumbel", "philox4x32", "uniform"]

Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds over many counters at once: uint32 [n, 4] -> uint32 [n, 4]. ``key`` is two 32-bit words."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key[0] & 0xFFFFFFFF, key[1] & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (right >> _HALF) ^ c1 ^ np.uint64(k0),
            right & _LOW,
            (left >> _HALF) ^ c3 ^ np.uint64(k1),
            left & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniform(seed: int, position: int, lane: int, token_ids: npt.NDArray[np.int64]) -> Floats:
    """One number in the open interval (0, 1) for each token id, float32 [len(token_ids)].

    Key: the seed's low and high word. Counter: (token_id >> 2, lane, position low, position high); a token
    takes word ``token_id & 3``, so four neighbours share one evaluation. Of the 32 bits the upper 23 are
    used, at the middle of their interval: ``(x >> 9) * 2**-23 + 2**-24`` is exact in float32 and below 1. (One
    bit more and the largest value would round to 1, whose Gumbel noise is infinite: such a token would win any
    draw, once in 2**24.)
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    blocks, where = np.unique(ids >> 2, return_inverse=True)
    counter = np.empty((len(blocks), 4), dtype=np.uint32)
    counter[:, 0] = blocks
    counter[:, 1] = lane & 0xFFFFFFFF
    counter[:, 2] = position & 0xFFFFFFFF
    counter[:, 3] = (position >> 32) & 0xFFFFFFFF
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    bits = words[where.reshape(-1), ids & 3] >> np.uint32(9)
    return bits.astype(np.float32) * np.float32(2.0**-23) + np.float32(2.0**-24)


def gumbel(seed: int, position: int, lane: int, token_ids: npt.NDArray[np.int64]) -> Floats:
    """Standard Gumbel noise ``-log(-log(u))``, float32, finite for every counter."""
    noise: Floats = -np.log(-np.log(uniform(seed, position, lane, token_ids)))
    return noise
