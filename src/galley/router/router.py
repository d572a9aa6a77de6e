"""The one way through: a request is routed, prepared, run, and ends in exactly one receipt."""

import asyncio
import contextlib
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import Literal, Protocol

from galley.audit.assemble import add_usage, assemble
from galley.audit.assemble import receipt_id as new_receipt_id
from galley.errors import GalleyError, Overloaded
from galley.providers.base import Meter, ModelCard, Prepared, Provider, Run
from galley.router.catalog import Catalog
from galley.types import Delta, Receipt, ReceiptStatus, Request, Route, Usage

__all__ = ["Answer", "Recorder", "Router"]

State = Literal["loading", "ready", "draining", "failed"]


class Recorder(Protocol):
    """Where receipts go (``audit.receipts.ReceiptStore``)."""

    def record(self, receipt: Receipt) -> None: ...


class Router:
    """Chooses who runs a request. Today's rule is ``fixed``: the model named, or what its alias names.

    Args:
        providers: what can be served from the start; none, and the state is ``loading`` until ``add``.
        listeners: called with every receipt after it is recorded (metrics). They must not raise.
    """

    def __init__(
        self,
        providers: Iterable[Provider],
        receipts: Recorder,
        *,
        aliases: Mapping[str, str] | None = None,
        listeners: Iterable[Callable[[Receipt], None]] = (),
    ) -> None:
        self.receipts = receipts
        self.catalog = Catalog(aliases)
        self.listeners = list(listeners)
        self.state: State = "loading"
        self.failure: str | None = None
        self.active = 0
        """Requests between arrival and receipt."""
        self.running: set[Answer] = set()
        for provider in providers:
            self.add(provider)

    def add(self, provider: Provider) -> None:
        """Serve a provider's models from now on."""
        self.catalog.add(provider)
        if self.state == "loading":
            self.state = "ready"

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

    def route(self, request: Request) -> tuple[Route, Provider, ModelCard]:
        """The decision and its reason. Raises Overloaded, ModelNotFound."""
        self.admit()
        card, provider = self.catalog.find(request.model)
        named = "named by the request" if card.id == request.model else f"alias {request.model!r}"
        route = Route(
            model=card.id, provider=provider.name, rule="fixed", reason=named, location=card.location
        )
        return route, provider, card

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

    async def __aenter__(self) -> "Answer":
        self._router.active += 1
        self._router.running.add(self)
        try:
            self._route, self.provider, self.card = self._router.route(self.request)
            self.prepared = await self.provider.prepare(self.request)
            self._check_aborted()
            self._run = await self.provider.start(self.prepared, self._meter)
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

    def usage(self) -> Usage:
        """Tokens so far; final once ``deltas`` has ended."""
        return add_usage(self._meter.jobs, self._meter.choices(), max(1, self.request.params.n))

    async def _settle(self, error: BaseException | None) -> None:
        try:
            if self._run is not None:
                # Shielded: a second cancellation must not keep the meters from arriving.
                await asyncio.shield(asyncio.ensure_future(self._run.stop()))
        finally:
            self._router.active -= 1
            self._router.running.discard(self)
            self._finish(error)

    def _finish(self, error: BaseException | None) -> None:
        """Make and record the receipt. A fault of this very code is shouted, never raised over the answer."""
        if self.receipt is not None:
            return
        prepared = getattr(self, "prepared", None)
        provider = getattr(self, "provider", None)
        status = self._status(error, prepared)
        try:
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
