"""Fair shares of the machine between tenants: virtual token counters."""

from collections import Counter
from collections.abc import Iterator, Mapping

__all__ = ["Fairness"]

KEPT = 4096
"""Counters kept before those that say nothing are dropped: tenants are named by clients."""


class Fairness:
    """One counter a tenant: the service it has had, divided by its weight. Serve the smallest (SCH-7).

    A counter grows by ``w_in`` for each prompt token computed for the tenant, charged when the job is
    admitted, and by ``w_out`` for each token drawn. Prompt tokens found in the cache cost nothing, and
    neither does what a preemption makes the engine compute again. A tenant that begins to wait is lifted
    to the smallest counter among those that wait already, less ``credit``: idleness earns that much and no
    more. So who asks now and then, for less than its share, does not wait behind the prompt of one who asks
    all the time, and holds nobody up for longer than the credit takes to compute (as Linux's CFS places a
    task that wakes). A name never seen before gets none, else made-up names would always come first.

    Bound, for two tenants of equal weight that wait all the while: their service differs by at most
    ``2·max(w_in·longest prompt, w_out·tokens that run at once)`` and the credit (Sheng et al., "Fairness in
    Serving Large Language Models", OSDI 2024, arXiv 2401.00588, theorem 4.4). Work-conserving: nobody idle is
    waited for.

    A higher tier is served first whatever the counters say: only tenants that wait in the same tier or a
    better one lift a newcomer, else one starved below would hand its credit to a newcomer above.

    Args:
        weights: share of a tenant relative to the others'; 1 where none is given.
        credit: in prompt tokens.

    Raises ValueError for a weight that is not above zero.
    """

    def __init__(
        self,
        *,
        w_in: float = 1.0,
        w_out: float = 2.0,
        weights: Mapping[str, float] | None = None,
        credit: float = 1024.0,
    ) -> None:
        self.w_in = w_in
        self.w_out = w_out
        self.credit = credit
        self.weights = dict(weights or {})
        for tenant, weight in self.weights.items():
            if not weight > 0:
                raise ValueError(f"the weight of tenant {tenant!r} must be above zero, not {weight}")
        self._counters: dict[str, float] = {}
        self._waiting: dict[str, Counter[int]] = {}
        # Of those waiting: where they would stand without credit, so that credits do not add up.
        self._levels: dict[str, float] = {}
        self._last = 0.0

    def __getitem__(self, tenant: str) -> float:
        """The tenant's counter."""
        return self._counters.get(tenant, 0.0)

    def weight(self, tenant: str) -> float:
        """The tenant's weight."""
        return self.weights.get(tenant, 1.0)

    def share(self, tenant: str) -> float:
        """The part of the machine the tenant may count on while all those waiting now go on waiting, 0..1.

        May be read beside the engine thread: an estimate.
        """
        mine = self.weight(tenant)
        others = sum(self.weight(other) for other in list(self._waiting) if other != tenant)
        return mine / (mine + others)

    def wait(self, tenant: str, tier: int) -> None:
        """One more job of the tenant waits in this tier. O(1), or O(tenants waiting) for its first."""
        mine = self._waiting.get(tenant)
        if mine is None:
            mine = Counter()
            self._lift(tenant, tier)
            self._waiting[tenant] = mine
        mine[tier] += 1

    def leave(self, tenant: str, tier: int) -> None:
        """One job of the tenant waits no longer. Raises KeyError when none did."""
        mine = self._waiting[tenant]
        if mine[tier] == 1:
            del mine[tier]
        else:
            mine[tier] -= 1
        if not mine:
            del self._waiting[tenant]
            self._last = max(self[tenant], self._levels.pop(tenant, 0.0))

    def prompt(self, tenant: str, tokens: int) -> None:
        """Charge prompt tokens that are to be computed."""
        self._charge(tenant, self.w_in * tokens)

    def output(self, tenant: str, tokens: int) -> None:
        """Charge tokens drawn."""
        self._charge(tenant, self.w_out * tokens)

    def price(self, tenant: str, prompt_tokens: int) -> float:
        """What ``prompt`` would add."""
        return self.w_in * prompt_tokens / self.weight(tenant)

    def rest(self) -> None:
        """Nobody waits and nobody runs: nothing is owed any more."""
        self._counters.clear()
        self._waiting.clear()
        self._levels.clear()
        self._last = 0.0

    def _charge(self, tenant: str, cost: float) -> None:
        self._counters[tenant] = self[tenant] + cost / self.weight(tenant)

    def _lift(self, tenant: str, tier: int) -> None:
        floor = min(self._rivals(tier), default=None)
        if floor is None and not self._waiting:
            floor = self._last  # an empty queue: level with the one who left it last
        if floor is not None and floor > self[tenant]:
            known = tenant in self._counters
            credit = self.w_in * self.credit / self.weight(tenant) if known else 0.0
            self._counters[tenant] = max(self[tenant], floor - credit)
            self._levels[tenant] = floor
        if len(self._counters) > KEPT:
            # A counter at or below the floor says only that its tenant has been here.
            level = floor or 0.0
            kept = {t: c for t, c in self._counters.items() if c > level or t in self._waiting or t == tenant}
            self._counters = kept

    def _rivals(self, tier: int) -> Iterator[float]:
        for other, tiers in self._waiting.items():
            if min(tiers) <= tier:
                yield max(self[other], self._levels.get(other, 0.0))
