"""The second decision: in what order the eligible offers of the chosen models are tried. It only sorts."""

from collections.abc import Callable, Sequence

from galley.router.eligible import Candidate
from galley.router.health import Health

__all__ = ["order"]

PRICE, LATENCY, AFFINITY = 0.5, 0.5, 0.25


def order(
    candidates: Sequence[Candidate],
    health: Callable[[str], Health],
    *,
    local_first: bool,
    warm: str | None,
) -> list[Candidate]:
    """Offers of one logical model, best first. O(n log n).

    Those that may be asked now come before those that must wait; with ``local_first`` this machine comes
    before others; then the smallest of half the price and half the expected wait (PeakEWMA), each scaled by
    the largest among them, less a bonus for ``warm``, the provider that served the conversation's last turn
    and holds its prefix. Latency that was never measured counts as the mean of those that were.
    """
    if len(candidates) == 1:
        return list(candidates)
    state = [health(each.offer.key) for each in candidates]
    known = [h.cost for h in state if len(h.latency)]
    mean = sum(known) / len(known) if known else 1.0
    waits = [h.cost if len(h.latency) else mean * (h.inflight + 1) for h in state]
    dearest = max(each.quote.expected for each in candidates) or 1
    slowest = max(waits) or 1.0

    def rank(i: int) -> tuple[bool, bool, float, str]:
        each = candidates[i]
        score = PRICE * each.quote.expected / dearest + LATENCY * waits[i] / slowest
        if each.offer.provider == warm:
            score -= AFFINITY
        return (
            state[i].waits() > 0,
            local_first and each.offer.location != "local",
            score,
            each.offer.key,
        )

    return [candidates[i] for i in sorted(range(len(candidates)), key=rank)]
