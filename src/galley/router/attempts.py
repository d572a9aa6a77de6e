"""Running a decision: attempt after attempt until one commits, within one deadline.

Nothing here chooses what is allowed: it walks the decision's sequence. A failure before the commit point is
answered by its class; how often, by the failing upstream's retry budget.
"""

import asyncio
import copy
import random
import time
from collections.abc import Callable, Sequence

import msgspec

from galley.audit.assemble import add_usage
from galley.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFault,
    GalleyError,
    Overloaded,
    Upstream,
)
from galley.providers.base import Meter, ModelCard, Prepared, Provider, Run
from galley.router.eligible import Candidate
from galley.router.health import Budget, Health, Ticket
from galley.router.purse import Purse
from galley.types import Attempt, Request

__all__ = ["Pursuit", "Won", "as_offered"]

BASE_S, CAP_S = 0.05, 2.0
"""Full jitter: sleep U(0, min(CAP_S, BASE_S * 2^n)) before asking the same upstream again."""
LIMITED_S = 1.0
"""How long a 429 without Retry-After keeps an upstream out."""
UNAUTHORISED_S = 60.0
LOSER_S = 1.0
"""A loser is cancelled at once; this is how long its clean-up may take before it is left to itself."""


class Won:
    """The attempt that committed."""

    def __init__(
        self,
        *,
        candidate: Candidate,
        card: ModelCard,
        provider: Provider,
        prepared: Prepared,
        run: Run,
        meter: Meter,
        number: int = 0,
    ) -> None:
        self.candidate = candidate
        self.card = card
        self.provider = provider
        self.prepared = prepared
        self.run = run
        self.meter = meter
        self.number = number


Served = Callable[[Candidate], tuple[ModelCard, Provider]]
Ask = Callable[[Request, Candidate], Request]


def as_offered(request: Request, candidate: Candidate) -> Request:
    """The request under the logical model's own name."""
    if request.model == candidate.offer.model:
        return request
    return msgspec.structs.replace(request, model=candidate.offer.model)


class Pursuit:
    """All attempts for one request.

    Args:
        sequence: eligible offers, best first.
        patience_s: most seconds to wait, in all, while every offer is limited or open.
        hedges: budget of hedged calls, shared by all requests; None is off.
        hedge_after_s: seconds without a commit after which a second offer is asked too; None takes the first
            offer's 95th percentile once it is known.
        deadline: monotonic.
        witness: keep what is said, for the audit log.
        ask: the request as one candidate is to be asked.
        purse: covers every attempt before it starts.

    Attributes:
        attempts: every call made, in order of its end.
        request, sequence, health, deadline: as given.
    """

    def __init__(
        self,
        request: Request,
        sequence: Sequence[Candidate],
        served: Served,
        health: Callable[[str], Health],
        *,
        retries: int,
        patience_s: float,
        hedges: Budget | None,
        hedge_after_s: float | None,
        started: float,
        deadline: float,
        rng: random.Random,
        witness: bool = False,
        ask: Ask = as_offered,
        purse: Purse | None = None,
    ) -> None:
        self.attempts: list[Attempt] = []
        self._ask = ask
        self.purse = purse or Purse(None, request, "")
        self.request = request
        self.sequence = list(sequence)
        self._served = served
        self.health = health
        self._retries = retries
        self._patience = patience_s
        self._hedges = hedges
        self._hedge_after_s = hedge_after_s
        self._started = started
        self.deadline = deadline
        self._rng = rng
        self._witness = witness
        self._tried: dict[str, int] = {}
        self._dead: set[str] = set()
        self._too_small = 0

    def among(self, sequence: Sequence[Candidate]) -> "Pursuit":
        """A further pursuit for the same request: other offers, the same deadline and list of attempts."""
        other = copy.copy(self)
        other.sequence = list(sequence)
        other._tried, other._dead, other._too_small = {}, set(), 0
        return other

    async def win(self) -> Won:
        """The first attempt that commits. Raises the error that ended the pursuit."""
        left = self.deadline - time.monotonic()
        try:
            async with asyncio.timeout(left):
                return await self._win()
        except TimeoutError as error:
            own = self.request.max_total_s
            ran_out = own is not None and time.monotonic() >= self._started + own
            raise DeadlineExceeded(
                f"No answer began within the deadline ({len(self.attempts)} attempts).",
                kind="total" if ran_out else None,
                retry_after_s=1.0,
            ) from error

    async def _win(self) -> Won:
        last: GalleyError | None = None
        for number in range(self._retries + 1):
            taken = await self._next()
            if taken is None:
                break
            candidate, ticket = taken
            if number == 0:
                health = self.health(candidate.offer.key)
                health.retries.deposit()
                if self._hedges is not None:
                    self._hedges.deposit()
            try:
                return await self._try(candidate, ticket)
            except GalleyError as error:
                last = error
                if not self._goes_on(candidate, error):
                    raise
                if not self.health(candidate.offer.key).retries.take():
                    error.extra.setdefault("retries", "the retry budget of this upstream is spent")
                    raise
        if last is None:
            waits = min((self.health(c.offer.key).waits() for c in self.sequence), default=1.0)
            raise Upstream(
                "every provider that may serve this is failing; not asked again yet",
                kind="open",
                retry_after_s=max(1.0, waits),
            )
        dead = all(c.offer.key in self._dead for c in self.sequence)
        if dead and isinstance(last, Upstream) and last.kind == "auth":
            last.code = "upstream_credentials_exhausted"
        raise last

    def _goes_on(self, candidate: Candidate, error: GalleyError) -> bool:
        """Whether another attempt can do better. Marks what this error rules out."""
        if isinstance(error, Upstream):
            if error.kind == "auth":
                self._dead.add(candidate.offer.key)
                return True
            if error.kind == "context":
                return self._only_larger(candidate)
            return error.kind in ("network", "timeout", "protocol", "server", "rate")
        if isinstance(error, ContextLengthExceeded):
            return self._only_larger(candidate)
        if isinstance(error, Overloaded) and candidate.offer.location == "local":
            # Shed by our own gate, which has said when to come back: asking again now is what it sheds.
            self._dead.add(candidate.offer.key)
            return any(each.offer.key not in self._dead for each in self.sequence)
        return isinstance(error, Overloaded | EngineFault)

    def _only_larger(self, candidate: Candidate) -> bool:
        self._too_small = max(self._too_small, candidate.offer.context)
        for each in self.sequence:
            if each.offer.context <= self._too_small:
                self._dead.add(each.offer.key)
        return any(each.offer.key not in self._dead for each in self.sequence)

    async def _next(self) -> tuple[Candidate, Ticket] | None:
        """The least tried of those that may be asked, in order; waits where that is worth it."""
        while True:
            open_ = [c for c in self.sequence if c.offer.key not in self._dead]
            open_.sort(key=lambda c: self._tried.get(c.offer.key, 0))
            soonest: float | None = None
            for candidate in open_:
                health = self.health(candidate.offer.key)
                wait = health.waits()
                if wait > 0:
                    soonest = wait if soonest is None else min(soonest, wait)
                    continue
                times = self._tried.get(candidate.offer.key, 0)
                if times:
                    pause = self._rng.uniform(0, min(CAP_S, BASE_S * 2.0 ** (times - 1)))
                    if time.monotonic() + pause >= self.deadline:
                        return None
                    await asyncio.sleep(pause)
                ticket = health.breaker.take()
                if ticket is not None:
                    return candidate, ticket
            # A rate limit or an open breaker that ends soon is waited for; a long one fails at once.
            if soonest is None or soonest > self._patience or time.monotonic() + soonest >= self.deadline:
                return None
            self._patience -= soonest
            await asyncio.sleep(soonest)

    async def _try(self, candidate: Candidate, ticket: Ticket) -> Won:
        after = self._hedge_delay(candidate)
        if after is None:
            return await self._attempt(candidate, ticket, hedge=False)
        first = asyncio.ensure_future(self._attempt(candidate, ticket, hedge=False))
        tasks = {first}
        try:
            done, _ = await asyncio.wait(tasks, timeout=after)
            if done:
                tasks.discard(first)
                return await first
            second = self._second(candidate)
            if second is not None:
                tasks.add(asyncio.ensure_future(self._attempt(*second, hedge=True)))
            return await self._first_of(tasks)
        finally:
            await self._drop(tasks)

    async def _first_of(self, tasks: "set[asyncio.Task[Won]]") -> Won:
        """The first task to succeed; when all fail, the first attempt's own error."""
        pending, error = set(tasks), None
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.exception() is None:
                    tasks.discard(task)
                    return task.result()
                error = task.exception()
        assert error is not None
        raise error

    async def _drop(self, losers: "set[asyncio.Task[Won]]") -> None:
        """Cancel what has not won. One that committed in the same instant is stopped all the same."""
        running = [task for task in losers if not task.done()]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=LOSER_S)
        for task in losers:
            if task.done() and not task.cancelled() and task.exception() is None:
                won = task.result()
                self.health(won.candidate.offer.key).inflight -= 1
                await won.run.stop()
                usage = add_usage(won.meter.jobs, won.meter.choices(), max(1, self.request.params.n))
                cost = self.purse.lost(won.number, usage)
                for place, attempt in enumerate(self.attempts):
                    if attempt.outcome == "won" and attempt.provider == won.candidate.offer.provider:
                        self.attempts[place] = msgspec.structs.replace(attempt, outcome="lost", pico=cost)

    def _hedge_delay(self, candidate: Candidate) -> float | None:
        if self._hedges is None or candidate.offer.location == "local" or len(self.sequence) < 2:
            return None
        if self._hedge_after_s is not None:
            return self._hedge_after_s
        return self.health(candidate.offer.key).latency.quantile(0.95)

    def _second(self, first: Candidate) -> tuple[Candidate, Ticket] | None:
        """Another offer of the same model, if the hedge budget allows one."""
        assert self._hedges is not None
        for candidate in self.sequence:
            same = candidate.offer.model == first.offer.model
            if candidate is first or not same or candidate.offer.key in self._dead:
                continue
            health = self.health(candidate.offer.key)
            if health.waits() > 0 or health.breaker.state != "closed" or not self._hedges.take():
                continue
            ticket = health.breaker.take()
            if ticket is not None:
                return candidate, ticket
        return None

    async def _attempt(self, candidate: Candidate, ticket: Ticket, *, hedge: bool) -> Won:
        key = candidate.offer.key
        health = self.health(key)
        self._tried[key] = self._tried.get(key, 0) + 1
        began = time.monotonic()
        card, provider = self._served(candidate)
        asked = self._ask(self.request, candidate)
        meter = Meter(capture=asked.capture, witness=self._witness)
        health.inflight += 1
        health.calls += 1
        outcome: bool | None = None
        number = 0
        try:
            prepared = await provider.prepare(asked)
            number = await self.purse.cover(candidate, prepared)
            run = await provider.start(prepared, meter)
            outcome = True
        except BaseException as error:
            outcome = self._judge(health, error)
            how = "lost" if isinstance(error, asyncio.CancelledError) else "failed"
            cost = self.purse.failed(number, error) if number else 0
            self._note(candidate, ticket, began, hedge=hedge, error=error, outcome=how, pico=cost)
            raise
        finally:
            health.breaker.back(ticket, outcome)
            if outcome is not True:
                health.inflight -= 1
        health.latency.note(time.monotonic() - began)
        self._note(candidate, ticket, began, hedge=hedge, error=None, outcome="won")
        return Won(
            candidate=candidate,
            card=card,
            provider=provider,
            prepared=prepared,
            run=run,
            meter=meter,
            number=number,
        )

    def _judge(self, health: Health, error: BaseException) -> bool | None:
        """What a failure says of the upstream: False bad, None nothing."""
        if isinstance(error, Upstream):
            if error.kind == "rate":
                health.limit(error.retry_after_s if error.retry_after_s is not None else LIMITED_S)
                return None
            if error.kind == "auth":
                health.limit(UNAUTHORISED_S)
                return None
            if error.kind in ("network", "timeout", "protocol", "server"):
                health.failures += 1
                return False
            return None
        if isinstance(error, EngineFault):
            health.failures += 1
            return False
        return None

    def _note(
        self,
        candidate: Candidate,
        ticket: Ticket,
        began: float,
        *,
        hedge: bool,
        error: BaseException | None,
        outcome: str,
        pico: int = 0,
    ) -> None:
        self.attempts.append(
            Attempt(
                provider=candidate.offer.provider,
                model=candidate.offer.model,
                outcome=outcome,  # type: ignore[arg-type]
                at_s=began - self._started,
                took_s=time.monotonic() - began,
                kind=getattr(error, "kind", None) or (getattr(error, "code", None) or "" if error else ""),
                status=getattr(error, "upstream_status", None),
                hedge=hedge,
                probe=ticket.probe,
                pico=pico,
            )
        )
