"""One request's money: reserved before it runs, followed while it runs, settled once when it has ended."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from galley.economics.acts import Extension, Grant, Opening, Rate, Settlement, Subject, Sunk
from galley.economics.amount import Amount
from galley.economics.bill import Bill, Rival, bill
from galley.economics.board import NOTE_BYTES
from galley.economics.ledger import Ledger
from galley.economics.price import PriceVersion
from galley.economics.store import LedgerUnavailable
from galley.errors import InvalidRequest
from galley.types import Usage

__all__ = ["Ask", "Hold"]


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What one attempt may need at most.

    Attributes:
        prompt_most: no fewer tokens than the prompt can have; ``prompt_likely`` a fair estimate.
        output_most: completion tokens of all choices together.
        local: our own engine counts the prompt itself, so both are the true count.
    """

    provider: str
    model: str
    price: PriceVersion
    prompt_most: int
    prompt_likely: int
    output_most: int
    local: bool

    @property
    def pico(self) -> int:
        """Worst case in pico-dollars."""
        return self.price.quote(self.prompt_most, self.output_most).most


class Hold:
    """From reservation to settlement. ``settle`` may be called in every state; only its first call counts.

    Attributes:
        grant: what the ledger said, once it has.
        bill: once settled.
        unrecorded: the ledger could not be written when the request began; it is entered later.
    """

    def __init__(self, ledger: Ledger, id: str, subject: Subject) -> None:
        self.id = id
        self.subject = subject
        self.grant: Grant | None = None
        self.bill: Bill | None = None
        self.unrecorded = False
        self._ledger = ledger
        self._opening: Opening | None = None
        self._sent = False
        self._settled = False
        self._slot: int | None = None
        self._asks: dict[int, Ask] = {}
        self._sunk: list[Sunk] = []
        self._held_pico = 0
        self._extends = 0
        self._lock = asyncio.Lock()
        self._completion = 0
        self._later = False
        """Nobody waits for the ledger: there is no limit."""

    def cap(self) -> tuple[str, int] | None:
        """The smallest output cap among its scopes, with the scope it comes from."""
        rules = self._ledger.rules
        scopes = self.subject.party.scopes(rules.tags)
        plan = rules.plan(scopes)
        found: tuple[str, int] | None = None
        for scope in scopes:
            rule = rules.of(scope, plan)
            most = rule.hard.max_output if rule is not None else None
            if most is not None and (found is None or most < found[1]):
                found = (scope, most)
        return found

    async def cover(self, ask: Ask, number: int) -> None:
        """Hold enough for another attempt beside those under way. The first opens the reservation; a record
        of it is in the database when this returns. Raises QuotaExceeded, RateExceeded, LedgerUnavailable."""
        async with self._lock:
            self._asks[number] = ask
            try:
                if self._opening is None:
                    await self._open(ask)
                else:
                    await self._extend(ask)
            except BaseException:
                self._asks.pop(number, None)
                raise

    async def _open(self, ask: Ask) -> None:
        now = self._ledger.clock_us()
        most = ask.prompt_most + ask.output_most
        self.subject = msgspec.structs.replace(
            self.subject, provider=ask.provider, model=ask.model, local=ask.local
        )
        opening = Opening(
            id=self.id,
            subject=self.subject,
            need=Amount(ask.pico, most, 1, 1),
            rate_tokens=ask.prompt_likely + ask.output_most,
            price=ask.price,
            owner=self._ledger.owner,
            now_us=now,
            day=datetime.fromtimestamp(now / 1e6, UTC).date().isoformat(),
            lease_us=now + self._ledger.lease_us,
            prompt_tokens=ask.prompt_likely,
        )
        note = msgspec.json.encode(opening)
        self._later = self._ledger.quiet and len(note) <= NOTE_BYTES
        try:
            board = self._ledger.board
            self._slot = board.take(self.id, ask.prompt_likely, note if self._later else b"")
        except (LedgerUnavailable, OSError) as error:
            self._later = False
            self._go_on_without(error)
        self._sent = True
        self._opening = opening  # before it is known to hold: a cancelled wait must be settled too
        try:
            if self._later:
                self._ledger.note(msgspec.structs.replace(opening, enforce=False))
                scopes = self.subject.party.scopes()
                self.grant = Grant(txn=f"{self.id}:reserve", subject=self.subject, scopes=scopes)
            elif not self.unrecorded:
                self.grant = await self._ledger.reserve(opening)
        except LedgerUnavailable as error:
            self._go_on_without(error)
        except Exception:
            self._drop()
            raise
        if self.grant is not None:
            self.subject = self.grant.subject
        self._held_pico = ask.pico
        if self._slot is not None:
            self._ledger.track(self.id, self._slot)

    def _go_on_without(self, error: Exception) -> None:
        """Where nothing may be refused by any limit it runs, and is entered as a whole when it is settled.
        Raises LedgerUnavailable otherwise."""
        if self._ledger.strict or self._ledger.rules.enforced:
            self._drop()
            if isinstance(error, LedgerUnavailable):
                raise error
            raise LedgerUnavailable(f"The ledger cannot be used: {error}", retry_after_s=1.0) from error
        self.unrecorded = True

    def _drop(self) -> None:
        """It was refused: there is nothing to settle."""
        self._sent, self._opening = False, None
        if self._slot is not None:
            self._ledger.board.free(self._slot)
            self._slot = None

    async def _extend(self, ask: Ask) -> None:
        self.subject = msgspec.structs.replace(
            self.subject, provider=ask.provider, model=ask.model, local=ask.local
        )
        wanted = sum(each.pico for each in self._asks.values()) + sum(lost.pico for lost in self._sunk)
        more = max(0, wanted - self._held_pico)
        if self.unrecorded:
            return
        self._extends += 1
        if self._slot is not None:
            self._ledger.board.note_prompt(self._slot, ask.prompt_likely, 0)
        grant = await self._ledger.extend(
            Extension(
                id=self.id,
                number=self._extends,
                need=Amount(pico=more),
                price=ask.price,
                provider=ask.provider,
                model=ask.model,
                local=ask.local,
                now_us=self._ledger.clock_us(),
                sunk=tuple(self._sunk),
            )
        )
        self._held_pico += more
        if self.grant is not None:
            warnings = tuple(dict.fromkeys((*self.grant.warnings, *grant.warnings)))
            self.grant = msgspec.structs.replace(self.grant, warnings=warnings, left_pico=grant.left_pico)

    def lost(self, number: int, pico: int) -> None:
        """An attempt ended without serving; ``pico`` is what it cost."""
        ask = self._asks.pop(number, None)
        if ask is not None and pico:
            self._sunk.append(Sunk(provider=ask.provider, pico=pico, version=ask.price.id))

    def prompt(self, cached: int) -> None:
        """How much of the prompt the engine found in its cache."""
        if self._slot is not None:
            known = self._ledger.board.read_slot(self._slot)
            self._ledger.board.note_prompt(self._slot, known.prompt_tokens, cached)

    def deliver(self, tokens: int) -> None:
        """So many more tokens of output go out with the next chunk. A memory write."""
        self._completion += tokens
        if self._slot is not None:
            self._ledger.board.note(self._slot, self._completion)

    def settle(
        self,
        usage: Usage,
        *,
        price: PriceVersion | None,
        provider: str | None,
        model: str | None,
        status: str,
        ran: bool,
        estimated: bool = False,
        rival: Rival | None = None,
        undiscounted: PriceVersion | None = None,
    ) -> None:
        """Enter what it cost. Never blocks and never raises for the ledger's sake: what cannot be entered now
        is tried until it is, by this process or the next.

        Args:
            price, provider, model: of who served; None where nobody did.
            ran: it counts as a request.
        """
        if self._settled or not self._sent:
            return
        self._settled = True
        opening, slot = self._opening, self._slot
        assert opening is not None
        self._ledger.untrack(self.id)
        served = price or opening.price
        self.bill = bill(
            self.subject,
            provider or self.subject.provider,
            served,
            usage if price is not None else Usage(),
            sunk=self._sunk,
            rival=rival,
            undiscounted=undiscounted,
        )
        tokens = usage.total_tokens if price is not None else 0
        settlement = Settlement(
            id=self.id,
            spent=Amount(self.bill.cost_pico, tokens, int(ran)),
            usage=usage,
            entries=self.bill.entries,
            price=served,
            prices=tuple(
                each
                for each in (rival.price if rival is not None else None, undiscounted)
                if each is not None
            ),
            provider=provider or self.subject.provider,
            model=model or self.subject.model,
            now_us=self._ledger.clock_us(),
            estimated=estimated,
            status=status,
            opening=opening if self.unrecorded or self._later else None,
        )
        self._slot = None
        later = self._later and self._ledger.quiet
        self._ledger.settle(settlement, releasing(self._ledger, slot), later=later)

    @property
    def txn(self) -> str | None:
        """Id of the settling transaction; None where nothing was reserved."""
        return f"{self.id}:settle" if self._sent else None

    @property
    def rates(self) -> tuple[Rate, ...]:
        """For the headers."""
        return self.grant.rates if self.grant is not None else ()


def releasing(ledger: Ledger, slot: int | None) -> Callable[[], None]:
    """Frees a slot of the board once its request is settled for good."""

    def free() -> None:
        if slot is not None:
            ledger.board.free(slot)

    return free


def capped(asked: int | None, cap: tuple[str, int] | None) -> tuple[int | None, str | None]:
    """The completion tokens a choice may have under an output cap, and a note where the request had set none.
    Raises InvalidRequest where it asks for more than the cap."""
    if cap is None or (asked is not None and asked <= cap[1]):
        return asked, None
    if asked is not None:
        raise InvalidRequest(
            f"'max_tokens' is {asked}; {cap[0]} may have {cap[1]} a choice.",
            param="max_tokens",
            code="max_tokens_above_cap",
        )
    return cap[1], f"limited to {cap[1]} by the output cap of {cap[0]}"
