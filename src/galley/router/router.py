"""The one way through: a request is routed, prepared, run, and ends in exactly one receipt."""

import asyncio
import contextlib
import random
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from galley.audit.assemble import add_usage, assemble
from galley.audit.assemble import receipt_id as new_receipt_id
from galley.economics.ledger import Ledger
from galley.errors import GalleyError, Overloaded, Upstream
from galley.providers.base import Meter, ModelCard, Prepared, Provider, Run
from galley.providers.remote import RemoteProvider, RemoteRun
from galley.router.attempts import Pursuit, Won
from galley.router.catalog import Catalog
from galley.router.decision import Chooser, Decision
from galley.router.health import BASE_S, Budget, Health
from galley.router.judged import Cascading
from galley.router.purse import Purse
from galley.types import Delta, Judgement, Receipt, ReceiptStatus, Request, Route, Usage

__all__ = ["Answer", "Recorder", "Router"]

PROBE_S = 2.0
"""Seconds a health page may take."""
State = Literal["loading", "ready", "draining", "failed"]


class Recorder(Protocol):
    """Where receipts go (``audit.receipts.ReceiptStore``)."""

    def record(self, receipt: Receipt) -> None: ...


class Router:
    """Chooses who runs a request, and sees it through.

    Two decisions kept apart: which logical model (hard eligibility, then the policy of the route asked for),
    and which provider (``place.order``). Retries, fallbacks and hedges walk what was eligible, nothing else.

    Args:
        providers: what can be served from the start; none, and the state is ``loading`` until ``add``.
        listeners: called with every receipt after it is recorded (metrics). They must not raise.
        catalog: models, offers and policy; without one, what the providers have, free and local.
        rng: of jitter and exploration; seeded in tests.
        read: reads a learned router's file.
        ledger: where every request is reserved and settled; None enters nothing.
    """

    def __init__(
        self,
        providers: Iterable[Provider],
        receipts: Recorder,
        *,
        aliases: Mapping[str, str] | None = None,
        listeners: Iterable[Callable[[Receipt], None]] = (),
        catalog: Catalog | None = None,
        rng: random.Random | None = None,
        read: Callable[[str], bytes] = lambda path: Path(path).read_bytes(),
        breaker_s: float = BASE_S,
        ledger: Ledger | None = None,
    ) -> None:
        self.ledger = ledger
        self.receipts = receipts
        self.catalog = catalog or Catalog(aliases)
        self.listeners = list(listeners)
        self.state: State = "loading"
        self.failure: str | None = None
        self.active = 0
        """Requests between arrival and receipt."""
        self.running: set[Answer] = set()
        self._rng = rng or random.Random()
        self._read = read
        self._breaker_s = breaker_s
        self._health: dict[str, Health] = {}
        self._hedges: Budget | None = None
        self.chooser = self._choose_over(self.catalog)
        for provider in providers:
            self.add(provider)

    def _choose_over(self, catalog: Catalog) -> Chooser:
        share = catalog.policy.hedge_share
        self._hedges = Budget(share, floor=1.0, cap=10.0) if share > 0 else None
        return Chooser(catalog, self.health, rng=self._rng, read=self._read)

    def health(self, key: str) -> Health:
        """The state of an upstream, by offer key."""
        found = self._health.get(key)
        if found is None:
            found = Health(
                time.monotonic,
                self._rng,
                retry_share=self.catalog.policy.retry_share,
                open_s=self._breaker_s,
            )
            self._health[key] = found
        return found

    def add(self, provider: Provider) -> None:
        """Serve a provider's models from now on."""
        self.catalog.add(provider)
        if self.state == "loading":
            self.state = "ready"

    def reload(self, catalog: Catalog, providers: Iterable[Provider]) -> None:
        """Go on with another catalog and these providers. Requests under way keep what they were given; the
        health of upstreams and the conversations stay. Raises ConfigError, and then nothing has changed."""
        for provider in providers:
            catalog.add(provider)
        chooser = Chooser(catalog, self.health, rng=self._rng, read=self._read)
        chooser.inherit(self.chooser)
        share = catalog.policy.hedge_share
        self._hedges = Budget(share, floor=1.0, cap=10.0) if share > 0 else None
        self.catalog, self.chooser = catalog, chooser

    async def probe(self) -> None:
        """Ask the health page of each upstream whose breaker is open and due. One that fails stays open for
        longer without costing a request; one that answers is left to a real request, one at a time."""
        due = [key for key, health in self._health.items() if health.breaker.state == "open"]
        for key in due:
            breaker = self._health[key].breaker
            provider = self.catalog.provider(key.rpartition("@")[2])
            if breaker.waits() > 0 or not isinstance(provider, RemoteProvider):
                continue
            if not await provider.healthy(PROBE_S):
                ticket = breaker.take()
                if ticket is not None:
                    breaker.back(ticket, False)

    def fail(self, why: str) -> None:
        """Loading failed: requests are refused with the reason."""
        self.state, self.failure = "failed", why

    def drain(self) -> None:
        """Admit no more requests; those running go on (CAN-6)."""
        self.state = "draining"

    async def abort(self) -> None:
        """Cancel whatever runs, and wait until the engine has let go of it. Each answer then ends with an
        error of code ``cancelled``, and with its receipt once its reader has taken that."""
        await asyncio.gather(*(answer.abort() for answer in list(self.running)))

    def admit(self) -> None:
        """Raises Overloaded unless requests are being taken."""
        if self.state == "loading":
            raise Overloaded("The model is still loading.", code="model_loading", retry_after_s=1.0)
        if self.state == "draining":
            raise Overloaded("The server is shutting down.", code="shutting_down", retry_after_s=5.0)
        if self.state == "failed":
            raise GalleyError(f"The model could not be loaded: {self.failure}", code="model_failed")

    def decide(self, request: Request) -> Decision:
        """The decision and its reason. Raises Overloaded, ModelNotFound, PolicyRefused."""
        self.admit()
        return self.chooser.decide(request)

    def pursue(
        self, request: Request, decision: Decision, started: float, purse: Purse | None = None
    ) -> Pursuit:
        """The attempts to carry out a decision, not yet begun."""
        policy = self.catalog.policy
        limit = policy.deadline_s
        if request.max_total_s is not None:
            limit = min(limit, request.max_total_s)
        return Pursuit(
            request,
            decision.sequence,
            lambda candidate: self.catalog.served(candidate.offer),
            self.health,
            retries=policy.retries,
            patience_s=policy.patience_s,
            hedges=self._hedges,
            hedge_after_s=policy.hedge_after_s,
            started=started,
            deadline=started + limit,
            rng=self._rng,
            purse=purse,
            ask=decision.ask,
        )

    def open(
        self, request: Request, *, receipt_id: str | None = None, gone: Callable[[], bool] = lambda: False
    ) -> "Answer":
        """``async with router.open(request) as answer``: routed, prepared and started on entry.

        Args:
            gone: tells whether the client has left; decides between ``cancelled`` and ``disconnected``.
        """
        return Answer(self, request, receipt_id or new_receipt_id(), gone)

    def refuse(
        self, request: Request, error: BaseException | None, *, receipt_id: str, started: float
    ) -> None:
        """A receipt for a request that ended before it could be opened: refused with ``error``, or, without
        one, left by its client before it was understood."""
        self.record(
            assemble(
                receipt_id=receipt_id,
                request=request,
                route=None,
                digests=None,
                meters={},
                status="error" if error else "disconnected",
                error=error,
                started=started,
                ended=time.monotonic(),
            )
        )

    def record(self, receipt: Receipt) -> None:
        """Store a receipt and tell the listeners."""
        self.receipts.record(receipt)
        for listener in self.listeners:
            listener(receipt)


class Answer:
    """One request under way. Its ``__aexit__`` is where the receipt is made, on every path.

    Attributes:
        receipt_id: known from the start, so that a header can name it.
        card, provider, prepared: set on entry.
        receipt: set on exit.
    """

    card: ModelCard
    provider: Provider
    prepared: Prepared

    def __init__(self, router: Router, request: Request, receipt_id: str, gone: Callable[[], bool]) -> None:
        self.request = request
        self.receipt_id = receipt_id
        self.receipt: Receipt | None = None
        self._router = router
        self._gone = gone
        self._started = time.monotonic()
        self._meter = Meter(capture=request.capture)
        self._route: Route | None = None
        self._run: Run | None = None
        self._aborted = False
        self._pursuit: Pursuit | None = None
        self._decision: Decision | None = None
        self._won: Won | None = None
        self._served: Won | None = None
        self._cascade: Cascading | None = None
        self.purse = Purse(router.ledger, request, receipt_id)

    async def __aenter__(self) -> "Answer":
        self._router.active += 1
        self._router.running.add(self)
        try:
            self.request = self.purse.capped(self.request)
            decision = self._decision = self._router.decide(self.request)
            self._route = decision.route(decision.sequence[0])
            self.purse.rivals = decision.sequence
            self._pursuit = self._router.pursue(self.request, decision, self._started, self.purse)
            won = self._won = await self._pursuit.win()
            judge = decision.choice.judge
            if judge is not None and won.candidate.offer.model == decision.choice.order[0]:
                self._cascade = Cascading(won, judge, self._pursuit, limit_pico=decision.limit_pico)
                # Until it is settled this is what runs, and what a cancellation has to stop.
                self._run, self._meter = self._cascade.trial, won.meter
                won = self._won = await self._cascade.settle()
            self._route = decision.route(won.candidate)
            self.card, self.provider, self.prepared = won.card, won.provider, won.prepared
            self.request = won.prepared.request  # with what the provider had to adjust
            self._run, self._meter = won.run, won.meter
            self._check_aborted()
        except BaseException as error:
            await self._settle(error)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._settle(error)

    async def deltas(self) -> AsyncIterator[Delta]:
        """The pieces of output. To be iterated once."""
        assert self._run is not None
        async for delta in self._run.deltas():
            self.purse.deliver(delta)
            yield delta
        if len(self._meter.finish) < self.prepared.count:
            self._check_aborted()

    async def abort(self) -> None:
        """End it now, from outside: its reader gets an error of code ``cancelled``. Idempotent."""
        self._aborted = True
        if self._run is not None:
            await self._run.stop()

    def _check_aborted(self) -> None:
        if self._aborted:
            raise GalleyError("The server was stopped before the answer was complete.", code="cancelled")

    @property
    def warnings(self) -> list[str]:
        """What went wrong so far in reading the output, such as a malformed tool call."""
        return self._meter.warnings

    @property
    def judgement(self) -> Judgement | None:
        """What a cascade decided; None where there was none."""
        return self._cascade.judgement if self._cascade is not None else None

    def usage(self) -> Usage:
        """Tokens so far; final once ``deltas`` has ended."""
        if self.receipt is not None:
            return self.receipt.usage
        return add_usage(self._meter.jobs, self._meter.choices(), max(1, self.request.params.n))

    async def _settle(self, error: BaseException | None) -> None:
        try:
            if isinstance(self._run, RemoteRun) and self._run.over:
                await self._run.stop()  # which waits for nobody
            elif self._run is not None:
                # Shielded: a second cancellation must not keep the meters from arriving.
                await asyncio.shield(asyncio.ensure_future(self._run.stop()))
        finally:
            self._router.active -= 1
            self._router.running.discard(self)
            self._leave(error)
            self._finish(error)

    def _leave(self, error: BaseException | None) -> None:
        """Tell the upstream's health and the conversation how it ended. Idempotent."""
        won, self._won = self._won, None
        if won is None:
            return
        self._served = won
        health = self._router.health(won.candidate.offer.key)
        health.inflight -= 1
        if isinstance(error, Upstream) and error.kind == "cut":
            health.failures += 1
            health.breaker.cut()
        elif error is None and self._decision is not None:
            session = self._decision.facts.session
            if session is not None:
                usage = self.usage()
                tokens = usage.prompt_tokens + usage.completion_tokens
                self._router.chooser.remember(session, won.candidate, tokens)

    def _finish(self, error: BaseException | None) -> None:
        """Make and record the receipt. A fault of this very code is shouted, never raised over the answer."""
        if self.receipt is not None:
            return
        prepared = getattr(self, "prepared", None)
        provider = getattr(self, "provider", None)
        status = self._status(error, prepared)
        served = self._served
        try:
            money = self.purse.settle(self.usage(), served, status=status, estimated=self._meter.estimated)
            self.receipt = assemble(
                receipt_id=self.receipt_id,
                request=self.request,
                route=self._route,
                digests=provider.digests if provider else None,
                meters=self._meter.jobs,
                status=status,
                error=error if status == "error" or isinstance(error, GalleyError) else None,
                choices=self._meter.choices(),
                params=prepared.params if prepared else None,
                seeds=[prepared.params.seed or 0] if prepared else (),
                started=self._started,
                ended=time.monotonic(),
                output=self._meter.output(),
                output_ids=self._meter.output_ids(),
                attempts=self._pursuit.attempts if self._pursuit is not None else (),
                price_lines=[
                    *(self.purse.price(served.candidate).lines(self.usage()) if served is not None else ()),
                    *(self._cascade.lines if self._cascade is not None else ()),
                    *self.purse.lines,
                ],
                money=money,
                notes={"usage": "estimated: the upstream gave no token counts"}
                if self._meter.estimated
                else None,
                warnings=self._meter.warnings,
                judgement=self.judgement,
            )
            self._router.record(self.receipt)
        except Exception:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"galley: NO RECEIPT for {self.receipt_id}: {traceback.format_exc()}\n")

    def _status(self, error: BaseException | None, prepared: Prepared | None) -> ReceiptStatus:
        if isinstance(error, GalleyError) and error.code != "cancelled":
            return "error"
        if error is None and prepared is not None and len(self._meter.finish) == prepared.count:
            return "ok"
        if self._gone() and not self._aborted:
            return "disconnected"
        if error is None or isinstance(error, (GalleyError, asyncio.CancelledError, GeneratorExit)):
            return "cancelled"
        return "error"
