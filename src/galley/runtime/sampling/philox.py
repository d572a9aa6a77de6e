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
    """One number in (0, 1] for each token id, float32 [len(token_ids)].

    Key: the seed's low and high word. Counter: (token_id >> 2, lane, position low, position high); a token
    takes word ``token_id & 3``, so four neighbours share one evaluation. The word x becomes
    ``float32(x) * 2**-32 + 2**-33``, rounded to nearest: fine-grained near 0, never 0.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    blocks, where = np.unique(ids >> 2, return_inverse=True)
    counter = np.empty((len(blocks), 4), dtype=np.uint32)
    counter[:, 0] = blocks
    counter[:, 1] = lane & 0xFFFFFFFF
    counter[:, 2] = position & 0xFFFFFFFF
    counter[:, 3] = (position >> 32) & 0xFFFFFFFF
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    x = words[where.reshape(-1), ids & 3].astype(np.float32)
    values: Floats = x * np.float32(2.0**-32) + np.float32(2.0**-33)
    return values


def gumbel(seed: int, position: int, lane: int, token_ids: npt.NDArray[np.int64]) -> Floats:
    """Standard Gumbel noise ``-log(-log(1 - v))``, float32, at most 22.9.

    The large variates, which decide draws, come from small v, where float32 is fine-grained: with ``log(v)``
    they would come from v near 1 in steps of 2**-24, and 1 itself would be infinite noise that wins any draw.
    v = 1 gives minus infinity here, which merely loses.
    """
    v = uniform(seed, position, lane, token_ids)
    with np.errstate(divide="ignore"):
        noise: Floats = -np.log(-np.log1p(-v))
    return noise
