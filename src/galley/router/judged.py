"""A cascade carried out: the first answer is held back until it is judged; then it is given, or another is.

The decision is the commit point: whatever the first model said before it, nobody has seen. Only what was
eligible from the start is asked, within the same deadline, and both attempts are on the receipt.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from galley.audit.assemble import add_resources, add_usage
from galley.errors import GalleyError, PolicyRefused, Upstream
from galley.providers.base import Prepared
from galley.router.attempts import Pursuit, Won
from galley.router.eligible import Candidate
from galley.router.policy import Judge
from galley.types import Delta, Judgement, Request, Usage

__all__ = ["Cascading", "Trial"]


class Trial:
    """The first model's answer, held back. Satisfies ``Run``: ``deltas`` is what was held, then the rest.

    Args:
        logprobs: what the client asked for; more than that is not shown.

    Attributes:
        fault: what ended it before it could be judged.
    """

    def __init__(self, won: Won, judge: Judge, logprobs: int | None) -> None:
        self.won = won
        self.fault: GalleyError | None = None
        self.reading = judge.watch()
        self._logprobs = logprobs
        self._source = won.run.deltas()
        self._held: list[Delta] = []
        self._task: asyncio.Task[None] | None = None
        self._released = False

    async def read(self, within_s: float) -> str | None:
        """Read as far as the judge needs. Why it cannot be judged, or None when it can."""
        self._task = asyncio.ensure_future(self._read())
        done, _ = await asyncio.wait({self._task}, timeout=max(0.0, within_s))
        if not done:
            return f"it was not done within {within_s:.1f} s"
        error = self._task.exception()
        if error is not None:
            if not isinstance(error, GalleyError):
                raise error
            self.fault = error
            return f"it broke off: {error.message}"
        return None if self.reading.tokens else "it came without log-probabilities"

    async def _read(self) -> None:
        while not (self.reading.full or self._released):
            delta = await anext(self._source, None)
            if delta is None:
                return
            self.reading.add(delta.logprobs or ())
            self._held.append(self._shown(delta))

    def _shown(self, delta: Delta) -> Delta:
        if not delta.logprobs:
            return delta
        if self._logprobs is None:
            return msgspec.structs.replace(delta, logprobs=None)
        count = self._logprobs
        few = [
            msgspec.structs.replace(each, top=each.top[:count], spelt=each.spelt and each.spelt[: count + 1])
            for each in delta.logprobs
        ]
        return msgspec.structs.replace(delta, logprobs=few)

    async def deltas(self) -> AsyncIterator[Delta]:
        """See ``Run.deltas``."""
        self._released = True
        if self._task is not None:
            await self._task
        for delta in self._held:
            yield delta
        async for delta in self._source:
            yield self._shown(delta)

    async def stop(self) -> None:
        """See ``Run.stop``."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})
        try:
            await self.won.run.stop()
        finally:
            with contextlib.suppress(RuntimeError, GalleyError):
                await self._source.aclose()  # type: ignore[attr-defined]


class Cascading:
    """One request's cascade, from the first model's commit to the decision.

    Args:
        pursuit: of the first model; it has the deadline, the attempts, and everything eligible in order.
        limit_pico: most pico-dollars for both attempts together; None for no limit.

    Attributes:
        trial: the first answer.
        judgement: set by ``settle``.
        lines: price lines of the first attempt, when it was not the answer.
    """

    def __init__(self, won: Won, judge: Judge, pursuit: Pursuit, *, limit_pico: int | None) -> None:
        self.trial = Trial(won, judge, pursuit.request.params.logprobs)
        self.judgement: Judgement | None = None
        self.lines: list[dict[str, Any]] = []
        self._won = won
        self._judge = judge
        self._pursuit = pursuit
        self._limit = limit_pico
        self._began = time.monotonic()

    async def settle(self) -> Won:
        """The answer to give: the first, or another's. Raises what ended the escalation when the first may
        not be given; nothing was shown then."""
        judge = self._judge
        left = self._pursuit.deadline - time.monotonic()
        why = judge.foreign(self._won.provider.digests.weights) or await self.trial.read(left * judge.share)
        confidence: float | None = None
        signals: dict[str, float] = {}
        if why is None:
            read = self.trial.reading.signals()
            confidence, signals = judge.confidence(read), judge.named(read)
            if confidence >= judge.needed:
                return self._keep(confidence, signals, f"confidence {confidence:.3f} is enough")
            why = f"confidence {confidence:.3f} is below {judge.needed:.3f}"
        others = self._others()
        if isinstance(others, str):
            return self._keep_unsure(confidence, signals, f"{why}; {others}", None)
        try:
            other = await self._pursuit.among(others).win()
        except GalleyError as error:
            return self._keep_unsure(confidence, signals, f"{why}; escalating failed: {error.message}", error)
        await self._leave(confidence, signals, why, other)
        return other

    def _others(self) -> list[Candidate] | str:
        """Who may take the escalation, or why nobody may."""
        first = self._won.candidate
        others = [each for each in self._pursuit.sequence if each.offer.model != first.offer.model]
        if not others:
            return "no other model is eligible"
        left = self._pursuit.deadline - time.monotonic()
        timely = [each for each in others if self._pursuit.health(each.offer.key).latency.average < left]
        if not timely:
            return f"{left:.1f} s are too few for another model"
        if self._limit is None:
            return timely
        spent = first.price.price(self._usage())
        paid = [each for each in timely if spent + each.quote.most <= self._limit]
        return paid or f"both attempts may cost more than the limit of {self._limit} pico-dollars"

    def _keep(self, confidence: float | None, signals: dict[str, float], reason: str) -> Won:
        self.judgement = Judgement(
            first=self._won.candidate.offer.key,
            confidence=confidence,
            needed=self._judge.needed,
            escalated=False,
            reason=reason,
            signals=signals,
            tokens=self.trial.reading.tokens,
            took_s=time.monotonic() - self._began,
        )
        won = self._won
        return Won(
            candidate=won.candidate,
            card=won.card,
            provider=won.provider,
            prepared=as_asked(won.prepared, self._pursuit.request),
            run=self.trial,
            meter=won.meter,
            number=won.number,
        )

    def _keep_unsure(
        self, confidence: float | None, signals: dict[str, float], reason: str, error: GalleyError | None
    ) -> Won:
        """The first answer after all. Raises when the route does not want that, or it broke off."""
        if self.trial.fault is not None:
            raise error or self.trial.fault
        if not self._judge.keep:
            raise error or PolicyRefused(
                f"The first model's answer was not sure enough: {reason}.", param="model"
            )
        return self._keep(confidence, signals, f"{reason}; kept all the same")

    async def _leave(
        self, confidence: float | None, signals: dict[str, float], reason: str, other: Won
    ) -> None:
        """Another answers: end the first attempt, and note what it took."""
        await self.trial.stop()
        offer = self._won.candidate.offer
        health = self._pursuit.health(offer.key)
        health.inflight -= 1
        if isinstance(self.trial.fault, Upstream):
            health.failures += 1
            health.breaker.cut()
        usage = self._usage()
        price = self._pursuit.purse.price(self._won.candidate)
        self.lines = [{**line, "attempt": offer.key} for line in price.lines(usage)]
        self._pursuit.purse.escalated(self._won.number, usage)
        attempts = self._pursuit.attempts
        for place, attempt in enumerate(attempts):
            if attempt.outcome == "won" and f"{attempt.model}@{attempt.provider}" == offer.key:
                attempts[place] = msgspec.structs.replace(attempt, outcome="escalated")
                break
        self.judgement = Judgement(
            first=offer.key,
            confidence=confidence,
            needed=self._judge.needed,
            escalated=True,
            to=other.candidate.offer.key,
            reason=reason,
            signals=signals,
            tokens=self.trial.reading.tokens,
            took_s=time.monotonic() - self._began,
            usage=usage,
            resources=add_resources(self._won.meter.jobs),
        )

    def _usage(self) -> Usage:
        meter = self._won.meter
        return add_usage(meter.jobs, meter.choices(), 1)


def as_asked(prepared: Prepared, request: Request) -> Prepared:
    """A prepared request with the client's own wish for log-probabilities."""
    wish = request.params.logprobs
    inner = prepared.request
    return msgspec.structs.replace(
        prepared,
        params=msgspec.structs.replace(prepared.params, logprobs=wish),
        request=msgspec.structs.replace(inner, params=msgspec.structs.replace(inner.params, logprobs=wish)),
    )
