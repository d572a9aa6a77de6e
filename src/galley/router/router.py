"""The one way through: a request is routed, prepared, run, and ends in exactly one receipt."""

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

from galley.audit.assemble import assemble
from galley.audit.assemble import receipt_id as new_receipt_id
from galley.audit.warden import Warden
from galley.economics.ledger import Ledger
from galley.errors import GalleyError, Overloaded
from galley.providers.base import Provider
from galley.providers.remote import RemoteProvider
from galley.router.answer import Answer
from galley.router.attempts import Pursuit
from galley.router.catalog import Catalog
from galley.router.decision import Chooser, Decision
from galley.router.health import BASE_S, Budget, Health
from galley.router.purse import Purse
from galley.router.recorder import Auditor, Recorder
from galley.router.shadow import Shadows
from galley.types import Delta, Receipt, Request

__all__ = ["Answer", "Recorder", "Router"]

PROBE_S = 2.0
"""Seconds a health page may take."""
State = Literal["loading", "ready", "draining", "failed"]


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
        warden: holds back what needs an approval.
        auditor: lets requests in and passes their receipts on; without one they go to ``receipts`` directly.
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
        auditor: Auditor | None = None,
        warden: Warden | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.ledger = ledger
        self.receipts = receipts
        self.auditor = auditor
        self.warden = warden
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
        self.shadows = Shadows(self.keep, self.health, self._rng, witness=auditor is not None)
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
        self.shadows.cancel()

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
            witness=self.auditor is not None,
            purse=purse,
            ask=decision.ask,
        )

    def learn(self, receipt: Receipt, reward: float) -> bool:
        """What an answer was worth; True when a bandit learned from it. Raises ValueError outside 0..1."""
        return receipt.route is not None and self.chooser.learn(receipt.route, reward)

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
            ),
            request,
        )

    def record(
        self,
        receipt: Receipt,
        request: Request,
        pieces: Mapping[int, Sequence[Delta]] | None = None,
        approvals: Sequence[Mapping[str, Any]] = (),
    ) -> "Future[None] | None":
        """Store a receipt and tell the listeners. In strict audit the result tells when its entry is
        durable."""
        done = self.keep(receipt, request, pieces or {}, approvals)
        for listener in self.listeners:
            listener(receipt)
        return done

    def keep(
        self,
        receipt: Receipt,
        request: Request,
        pieces: Mapping[int, Sequence[Delta]],
        approvals: Sequence[Mapping[str, Any]] = (),
    ) -> "Future[None] | None":
        """Store a receipt, and tell nobody."""
        if self.auditor is not None:
            return self.auditor.put(receipt, request, pieces, approvals)
        self.receipts.record(receipt)
        return None
