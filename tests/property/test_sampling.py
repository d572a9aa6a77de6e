"""The sampler against a slow, literal reading of its definition (SMP-1, SMP-3)."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from galley.runtime.plan import Draws
from galley.runtime.sampling.logits import draw
from galley.runtime.sampling.philox import gumbel

# Few distinct values, so that ties are common.
rows = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 1.0, 3.0]), min_size=2, max_size=24)


@settings(max_examples=300, deadline=None)
@given(
    rows,
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**40),
    st.floats(0.25, 2.0, width=32),
    st.integers(-1, 26),
    st.floats(0.0, 1.0, width=32),
    st.floats(0.0, 1.0, width=32),
)
def test_smp1_draw_is_the_best_score_among_the_kept(
    row: list[float], seed: int, position: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    draws = Draws()
    draws.add(
        seed=seed,
        position=position,
        lane=1,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    logits = np.array([row], dtype=np.float32)
    z = logits[0] / np.float32(temperature)
    order = sorted(range(len(row)), key=lambda i: (-z[i], i))
    if min_p > 0:
        order = [i for i in order if z[i] >= z.max() + np.log(np.float32(min_p))]
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1:
        mass = [float(np.exp(np.float64(z[i] - z.max()))) for i in order]
        total, so_far, kept = sum(mass), 0.0, []
        for i, m in zip(order, mass, strict=True):
            kept.append(i)
            so_far += m
            if so_far >= float(np.float32(top_p)) * total:
                break
        order = kept
    noise = gumbel(seed, position, 1, np.arange(len(row)))
    assert draw(logits, draws).ids == [max(sorted(order), key=lambda i: z[i] + noise[i])]


@settings(max_examples=100, deadline=None)
@given(rows, st.lists(st.integers(0, 1), max_size=3))
def test_smp3_greedy_is_the_first_maximum(row: list[float], ban: list[int]) -> None:
    draws = Draws()
    draws.add(seed=0, position=0, lane=0, temperature=0.0, ban=ban if len(row) > 2 else [])
    banned = set(ban) if len(row) > 2 else set()
    left = [i for i in range(len(row)) if i not in banned]
    found = draw(np.array([row], dtype=np.float32), draws).ids[0]
    assert found == max(left, key=lambda i: (row[i], -i))
