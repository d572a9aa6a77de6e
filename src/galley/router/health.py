"""How each upstream is doing: a breaker, a retry budget, its latency. Monotonic clock only."""

import random
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

__all__ = ["Breaker", "Budget", "Health", "Latency", "Ticket"]

Clock = Callable[[], float]
State = Literal["closed", "open", "half-open"]
CONSECUTIVE = 5
RATE = 0.5
LEAST = 20
WINDOW_S = 30.0
BASE_S = 30.0
CAP_S = 300.0
SUCCESSES = 2


class Ticket(msgspec.Struct, frozen=True):
    """Leave to send one request; give it back with its outcome, exactly once."""

    probe: bool
    epoch: int
    """Which closing or opening it belongs to: an answer from before the breaker opened says nothing now."""


class Breaker:
    """Three states. Closed opens after CONSECUTIVE failures, or at a failure rate of RATE over at least LEAST
    outcomes in WINDOW_S. Open lets nothing through for BASE_S doubled at every reopening up to CAP_S, within
    20 % of jitter. Half-open lets through one probe at a time; SUCCESSES in a row close it, one failure
    reopens it.

    Not thread-safe: it lives on the event loop, where nothing comes between a look and a take.
    """

    def __init__(self, clock: Clock, rng: random.Random, *, base_s: float = BASE_S) -> None:
        self._clock = clock
        self._rng = rng
        self._base_s = base_s
        self.state: State = "closed"
        self._outcomes: deque[tuple[float, bool]] = deque()
        self._failures = 0
        self._row = 0
        self._opened = 0
        self._until = 0.0
        self._probing = False
        self._epoch = 0
        self._good = 0

    def waits(self) -> float:
        """Seconds until a request could be let through; 0 when one could now."""
        if self.state == "open":
            return max(0.0, self._until - self._clock())
        return min(0.1, self._base_s / 10) if self.state == "half-open" and self._probing else 0.0

    def take(self) -> Ticket | None:
        """Leave to send, or None."""
        if self.state == "open" and self._clock() >= self._until:
            self.state, self._probing, self._good = "half-open", False, 0
            self._epoch += 1
        if self.state == "closed":
            return Ticket(False, self._epoch)
        if self.state == "half-open" and not self._probing:
            self._probing = True
            return Ticket(True, self._epoch)
        return None

    def back(self, ticket: Ticket, outcome: bool | None) -> None:
        """The outcome: True good, False a failure, None says nothing of health (cancelled, 4xx, 429)."""
        if ticket.epoch != self._epoch:
            return
        if ticket.probe:
            self._probing = False
            if outcome is False:
                self._open()
            elif outcome:
                self._good += 1
                if self._good >= SUCCESSES:
                    self._close()
            return
        if outcome is None:
            return
        now = self._clock()
        self._outcomes.append((now, outcome))
        self._failures += not outcome
        while self._outcomes[0][0] < now - WINDOW_S:
            self._failures -= not self._outcomes.popleft()[1]
        self._row = 0 if outcome else self._row + 1
        rated = len(self._outcomes) >= LEAST and self._failures >= RATE * len(self._outcomes)
        if not outcome and (self._row >= CONSECUTIVE or rated):
            self._open()

    def cut(self) -> None:
        """An answer that had begun broke off: a failure of its own."""
        if self.state == "closed":
            self.back(Ticket(False, self._epoch), False)

    def _open(self) -> None:
        wait = min(CAP_S, self._base_s * 2 ** min(self._opened, 10))
        self._until = self._clock() + wait * self._rng.uniform(0.8, 1.2)
        self._opened += 1
        self._epoch += 1
        self.state, self._probing = "open", False

    def _close(self) -> None:
        self.state = "closed"
        self._outcomes.clear()
        self._failures = self._row = self._opened = 0
        self._epoch += 1


class Budget:
    """Leave for extra calls in proportion to the plain ones: each request deposits ``share``, each extra call
    takes 1. ``floor`` is there from the start (twice what opens a breaker) and ``cap`` is the most that can
    be saved up, so that quiet hours buy no storm. Over any span: extras <= share x requests + cap; from the
    start on, with floor instead of cap.
    """

    def __init__(self, share: float, *, floor: float = 10.0, cap: float = 100.0) -> None:
        self.share = share
        self._cap = cap
        self._saved = floor

    def deposit(self) -> None:
        """A request came."""
        self._saved = min(self._cap, self._saved + self.share)

    def take(self) -> bool:
        """Whether one more extra call may be made; if so it is charged."""
        if self.share <= 0 or self._saved < 1:
            return False
        self._saved -= 1
        return True


class Latency:
    """Times to the first output: an average that jumps to a peak and decays (PeakEWMA, after Finagle), and
    quantiles over the last 512."""

    def __init__(self, clock: Clock, *, decay_s: float = 10.0) -> None:
        self._clock = clock
        self._decay_s = decay_s
        self.average = 0.0
        self._at = clock()
        self._recent: deque[float] = deque(maxlen=512)
        self._sorted: list[float] = []
        self._stale = 0

    def note(self, seconds: float) -> None:
        """One observation."""
        now = self._clock()
        keep = 2.0 ** (-(now - self._at) / self._decay_s)
        self.average = max(seconds, self.average * keep + seconds * (1 - keep))
        self._at = now
        self._recent.append(seconds)
        self._stale += 1

    def __len__(self) -> int:
        return len(self._recent)

    def quantile(self, share: float) -> float | None:
        """Of the last observations; None with fewer than 50. Re-sorted once every 32."""
        if len(self._recent) < 50:
            return None
        if self._stale >= 32 or not self._sorted:
            self._sorted, self._stale = sorted(self._recent), 0
        return self._sorted[min(len(self._sorted) - 1, int(share * len(self._sorted)))]


class Health:
    """Everything known of one upstream (a provider's serving of a model)."""

    def __init__(
        self, clock: Clock, rng: random.Random, *, retry_share: float, open_s: float = BASE_S
    ) -> None:
        self._clock = clock
        self.breaker = Breaker(clock, rng, base_s=open_s)
        self.retries = Budget(retry_share)
        self.latency = Latency(clock)
        self.inflight = 0
        self.calls = 0
        self.failures = 0
        self._limited_until = 0.0

    def limit(self, seconds: float) -> None:
        """It said 429: nothing for so long (a rate state, not a failure)."""
        self._limited_until = max(self._limited_until, self._clock() + seconds)

    def waits(self) -> float:
        """Seconds until it may be asked; 0 is now."""
        return max(self.breaker.waits(), self._limited_until - self._clock(), 0.0)

    @property
    def cost(self) -> float:
        """Seconds a further request may wait: PeakEWMA, latency times the queue."""
        return (self.latency.average or 0.001) * (self.inflight + 1)
