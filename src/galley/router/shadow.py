"""Shadow traffic: a share of the requests is asked of another model too, after their client has its answer.

Nothing of it reaches the client, the health of an upstream or the metrics: it runs when the answer is
complete, behind everybody else on our own engines, within what is eligible for that very request, and within
a budget for the day. What it did is a receipt with ``shadow_of``.
"""

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

import msgspec

from galley.audit.assemble import add_usage, assemble, receipt_id
from galley.economics.price import pico
from galley.errors import GalleyError
from galley.providers.base import Meter, Prepared, Provider, Run
from galley.router.catalog import Catalog, ShadowTable
from galley.router.decision import Chooser
from galley.router.eligible import Candidate
from galley.router.health import Health
from galley.types import Delta, Receipt, ReceiptStatus, Request, Route

__all__ = ["Shadows"]

BEHIND = 6
"""Priority on our own engines: that of ``flex``."""
LONGEST_S = 300.0


class Shadows:
    """Mirrors finished requests. Belongs to one event loop.

    Args:
        record: where receipts go; no listener hears of them.
        witness: keep the pieces of answers for it.

    Attributes:
        mirrored, skipped: how many were, and how many were drawn but not mirrored, by reason.
    """

    def __init__(
        self,
        record: Callable[[Receipt, Request, Mapping[int, Sequence[Delta]]], object],
        health: Callable[[str], Health],
        rng: random.Random,
        *,
        witness: bool = False,
        today: Callable[[], date] = lambda: datetime.now(UTC).date(),
    ) -> None:
        self.mirrored = 0
        self.skipped: dict[str, int] = {}
        self._record = record
        self._health = health
        self._rng = rng
        self._witness = witness
        self._today = today
        self._tasks: dict[ShadowTable, set[asyncio.Task[None]]] = {}
        self._spent: dict[tuple[ShadowTable, date], int] = {}

    def after(self, catalog: Catalog, chooser: Chooser, request: Request, receipt: Receipt) -> None:
        """A request was answered. Never raises, never waits."""
        for table in catalog.document.shadow:
            if request.model != table.of or self._rng.random() >= table.share:
                continue
            why = self._begin(catalog, chooser, table, request, receipt)
            if why is not None:
                self.skipped[why] = self.skipped.get(why, 0) + 1

    def _begin(
        self, catalog: Catalog, chooser: Chooser, table: ShadowTable, request: Request, receipt: Receipt, /
    ) -> str | None:
        """Start one, or say why not."""
        running = self._tasks.setdefault(table, set())
        if len(running) >= table.at_once:
            return "too many at once"
        asked = msgspec.structs.replace(
            request, model=table.to, priority=BEHIND, service_tier="flex", session=None, max_queue_s=None
        )
        try:
            decision = chooser.decide(asked)
        except GalleyError:
            return "not eligible"
        candidate = next((c for c in decision.sequence if c.offer.model == table.to), None)
        if candidate is None:
            return "not eligible"
        if self._health(candidate.offer.key).waits() > 0:
            return "its provider is failing"
        today = (table, self._today())
        spent = self._spent.get(today, 0)
        most = pico(table.max_usd_day, "max_usd_day") * 1_000_000
        if spent + candidate.quote.most > most:
            return "the day's budget is spent"
        # The most it may cost is held back until it is known what it did cost.
        self._spent = {key: value for key, value in self._spent.items() if key[1] == today[1]}
        self._spent[today] = spent + candidate.quote.most
        self.mirrored += 1
        route = decision.route(candidate)
        route = msgspec.structs.replace(
            route, rule="shadow", propensity=table.share, reason=f"mirrors {receipt.id}"
        )
        provider = catalog.served(candidate.offer)[1]
        mirror = Mirror(provider, candidate, asked, route, of=receipt.id, witness=self._witness)
        task = asyncio.ensure_future(self._run(mirror, today))
        running.add(task)
        task.add_done_callback(running.discard)
        return None

    async def _run(self, mirror: "Mirror", today: tuple[ShadowTable, date]) -> None:
        try:
            await mirror.run()
        finally:
            left = self._spent.get(today, 0) - mirror.candidate.quote.most
            self._spent[today] = max(0, left + sum(line["pico"] for line in mirror.lines))
            self._record(mirror.receipt, mirror.request, mirror.meter.pieces)

    def cancel(self) -> None:
        """End what runs; each leaves its receipt. Idempotent."""
        for running in self._tasks.values():
            for task in running:
                task.cancel()


class Mirror:
    """One mirrored request.

    Attributes:
        lines: price lines, set by ``run``.
        receipt: set by ``run``, on every path.
    """

    receipt: Receipt

    def __init__(
        self,
        provider: Provider,
        candidate: Candidate,
        request: Request,
        route: Route,
        *,
        of: str,
        witness: bool,
    ) -> None:
        self.candidate = candidate
        self.lines: list[dict[str, Any]] = []
        self.meter = Meter(capture=request.capture, witness=witness)
        self._provider = provider
        # An id of its own: it is other work than the request it mirrors.
        self.request = msgspec.structs.replace(request, id=f"{request.id}-shadow")
        self._route = route
        self._of = of

    async def run(self) -> None:
        """Ask, and read the answer to its end. Raises nothing but cancellation."""
        began, meter = time.monotonic(), self.meter
        prepared: Prepared | None = None
        run: Run | None = None
        status: ReceiptStatus = "cancelled"
        fault: BaseException | None = None
        try:
            async with asyncio.timeout(LONGEST_S):
                prepared = await self._provider.prepare(self.request)
                run = await self._provider.start(prepared, meter)
                async for _ in run.deltas():
                    pass
            status = "ok"
        except (GalleyError, TimeoutError) as error:
            status, fault = "error", error
        finally:
            if run is not None:
                await asyncio.shield(asyncio.ensure_future(run.stop()))
            if meter.jobs:
                usage = add_usage(meter.jobs, meter.choices(), max(1, self.request.params.n))
                self.lines = self.candidate.price.lines(usage)
            whole = assemble(
                receipt_id=receipt_id(),
                request=self.request,
                route=self._route,
                digests=self._provider.digests,
                meters=meter.jobs,
                status=status,
                error=fault,
                choices=meter.choices(),
                params=prepared.params if prepared is not None else None,
                started=began,
                ended=time.monotonic(),
                output=meter.output(),
                output_ids=meter.output_ids(),
                price_lines=self.lines,
                warnings=meter.warnings,
            )
            self.receipt = msgspec.structs.replace(
                whole, shadow_of=self._of, tenant="shadow", user=None, key=None
            )
