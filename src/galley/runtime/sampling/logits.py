"""From logits to a token: the written-out definition (SMP-1) that the native sampler is tested against."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from galley.errors import EngineFault
from galley.runtime.plan import Drawn, Draws
from galley.runtime.sampling.philox import gumbel

__all__ = ["draw"]

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

GREEDY_BELOW = 1e-5


class _Ranked(NamedTuple):
    """What the raw model said about one row (SMP-2)."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


def draw(logits: Floats, draws: Draws) -> Drawn:
    """Draw one token for each row of float32 [R, V]. O(V log V) a row when truncating, else O(V).

    Order, fixed: mask, bans, bias, repetition, frequency, presence; then greedy, or temperature, min_p,
    top_k, top_p and argmax of ``logit / T + Gumbel noise`` over what is kept (which samples the softmax
    exactly).
    A row with a ``given`` token draws nothing and has that one's log-probability.
    Log-probabilities are those of the untouched logits. Every tie goes to the lowest id (SMP-3).

    Raises EngineFault when a row has no finite maximum (NaN or infinity from the model, or all ids banned),
    ValueError when the numbers of rows differ.
    """
    if len(logits) != len(draws):
        raise ValueError(f"{len(logits)} rows of logits for {len(draws)} draws")
    masks = _masks(draws, logits.shape[1]) if len(draws.masks) else None
    ids: list[int] = []
    ranked: list[_Ranked] = []
    for row, raw in enumerate(logits):
        allowed = masks[draws.mask_row[row]] if masks is not None and draws.mask_row[row] >= 0 else None
        token = draws.given[row]
        if token < 0:
            token = _draw_row(_adjust(raw, draws, row, allowed), draws, row)
        ids.append(token)
        wanted = draws.logprobs[row]
        ranked.append(_rank(raw, token, wanted) if wanted >= 0 else _Ranked(float("nan"), 0, []))
    return Drawn(ids, [r.logprob for r in ranked], [r.rank for r in ranked], [r.top for r in ranked])


def _masks(draws: Draws, vocab: int) -> npt.NDArray[np.bool_]:
    """The masks as booleans [masks, vocab]. Raises ValueError when their size does not fit."""
    words = -(-vocab // 32)
    packed = np.array(draws.masks, dtype="<u4")
    if len(packed) % words or max(draws.mask_row) * words >= len(packed):
        raise ValueError(f"{len(packed)} mask words for rows of {words}")
    bits = np.unpackbits(packed.view(np.uint8), bitorder="little").reshape(-1, words * 32)
    return bits[:, :vocab].astype(np.bool_)


def _adjust(raw: Floats, draws: Draws, row: int, allowed: npt.NDArray[np.bool_] | None) -> Floats:
    """Mask, bans, bias and penalties on a copy."""
    values = raw.astype(np.float32, copy=True)
    if allowed is not None:
        values[~allowed] = -np.inf
    values[draws.ban_ids[draws.ban_start[row] : draws.ban_start[row + 1]]] = -np.inf
    span = slice(draws.bias_start[row], draws.bias_start[row + 1])
    bias = np.array(draws.bias_ids[span], dtype=np.int64)
    values[bias] += np.array(draws.bias_values[span], dtype=np.float32)
    span = slice(draws.seen_start[row], draws.seen_start[row + 1])
    seen = np.array(draws.seen_ids[span], dtype=np.int64)
    if not len(seen):
        return values
    counts = np.array(draws.seen_counts[span], dtype=np.float32)
    repetition = np.float32(draws.repetition[row])
    if repetition != 1:
        old = values[seen]
        values[seen] = np.where(old > 0, old / repetition, old * repetition)
    values[seen] -= np.float32(draws.frequency[row]) * counts
    values[seen] -= np.float32(draws.presence[row]) * (counts > 0)
    return values


def _draw_row(values: Floats, draws: Draws, row: int) -> int:
    peak = values.max()
    if not np.isfinite(peak):
        raise EngineFault(f"No token can be drawn: the largest adjusted logit is {peak}.")
    temperature = np.float32(draws.temperature[row])
    if temperature < GREEDY_BELOW:
        return int(values.argmax())
    values = values / temperature
    kept = _truncate(values, draws.min_p[row], draws.top_k[row], draws.top_p[row])
    score = values[kept] + gumbel(draws.seed[row], draws.position[row], draws.lane[row], kept)
    return int(kept[score.argmax()])


def _truncate(values: Floats, min_p: float, top_k: int, top_p: float) -> Ids:
    """Ids that stay, ascending. Mass is summed in float64 in descending order, ties by ascending id."""
    kept: Ids = np.flatnonzero(values > -np.inf)
    peak = values.max()
    if min_p > 0:
        # p >= min_p * max(p), with the softmax's denominator cancelled.
        kept = kept[values[kept] >= peak + np.log(np.float32(min_p))]
    cut_k, cut_p = 0 < top_k < len(kept), top_p < 1
    if not (cut_k or cut_p):
        return kept
    order = np.argsort(-values[kept], kind="stable")
    kept = kept[order]
    if cut_k:
        kept = kept[:top_k]
    if cut_p:
        total = np.cumsum(np.exp((values[kept] - peak).astype(np.float64)))
        enough = int(np.searchsorted(total, top_p * total[-1], side="left")) + 1
        kept = kept[:enough]
    return np.sort(kept)


def _rank(raw: Floats, token: int, wanted: int) -> _Ranked:
    """Log-probabilities under the raw softmax; the sampled token's do not depend on ``wanted`` (SMP-2)."""
    wide = raw.astype(np.float64)
    peak = wide.max()
    norm = peak + np.log(np.exp(wide - peak).sum())
    rank = int((raw > raw[token]).sum()) + int((raw[:token] == raw[token]).sum()) + 1
    best = np.argsort(-raw, kind="stable")[:wanted]
    top = [(int(i), float(wide[i] - norm)) for i in best]
    return _Ranked(float(wide[token] - norm), rank, top)
