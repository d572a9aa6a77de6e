"""One request under way: decided, run, and ended in exactly one receipt."""

import asyncio
import contextlib
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any

from galley.audit.assemble import add_usage, assemble
from galley.errors import GalleyError, Upstream
from galley.providers.base import Meter, ModelCard, Prepared, Provider, Run
from galley.providers.remote import RemoteRun
from galley.router.attempts import Pursuit, Won
from galley.router.decision import Decision
from galley.router.judged import Cascading
from galley.router.purse import Purse
from galley.types import Delta, Judgement, Receipt, ReceiptStatus, Request, Route, Usage

if TYPE_CHECKING:
    from galley.router.router import Router

__all__ = ["Answer"]


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

    def __init__(self, router: "Router", request: Request, receipt_id: str, gone: Callable[[], bool]) -> None:
        self.request = self._asked = request
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
        self._approvals: list[dict[str, Any]] = []
        self._accounted: Future[None] | None = None
        self._served: Won | None = None
        self._cascade: Cascading | None = None
        self.purse = Purse(router.ledger, request, receipt_id)

    async def __aenter__(self) -> "Answer":
        self._router.active += 1
        self._router.running.add(self)
        try:
            self.request = self.purse.capped(self.request)
            if self._router.auditor is not None:
                self._router.admit()
                await self._router.auditor.admit(self.request, self.receipt_id)
            decision = self._decision = self._router.decide(self.request)
            self._route = decision.route(decision.sequence[0])
            self.purse.rivals = decision.sequence
            began = self._started
            if self._router.warden is not None:
                asked = time.monotonic()
                await self._router.warden.let_in(self.request, self._route.quote_pico, self._approvals)
                began += time.monotonic() - asked  # deadlines are about work, not about people
            self._pursuit = self._router.pursue(self.request, decision, began, self.purse)
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
        deltas: AsyncIterator[Delta] = self._run.deltas()
        warden = self._router.warden
        if warden is not None and warden.holds_calls:
            deltas = warden.watch(self.request, deltas, self._run.stop, self._approvals)
        async for delta in deltas:
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
        accounted, self._accounted = self._accounted, None
        if accounted is not None and error is None:
            # No log, no tokens: the last bytes wait for the entry, and are not sent without it.
            await asyncio.wrap_future(accounted)

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
            usage = self.usage()
            money = self.purse.settle(usage, served, status=status, estimated=self._meter.estimated)
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
                    *(self.purse.price(served.candidate).lines(usage) if served is not None else ()),
                    *(self._cascade.lines if self._cascade is not None else ()),
                    *self.purse.lines,
                ],
                money=money,
                notes={"usage": "estimated: the upstream gave no token counts"}
                if self._meter.estimated
                else None,
                warnings=self._meter.warnings,
                judgement=self.judgement,
                pooling=(prepared.pooling_note or None) if prepared else None,
            )
            self._accounted = self._router.record(
                self.receipt, self.request, self._meter.pieces, self._approvals
            )
            if status == "ok":
                self._router.shadows.after(
                    self._router.catalog, self._router.chooser, self._asked, self.receipt
                )
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
