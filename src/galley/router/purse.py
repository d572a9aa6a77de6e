"""The money of one request on its way through the router: every attempt is covered before it starts, and what
each has cost is known when all is over. With a ledger it is also entered there."""

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from galley.economics.acts import Rate, Subject
from galley.economics.bill import Rival
from galley.economics.hold import Ask, Hold, capped
from galley.economics.ledger import Ledger
from galley.economics.price import PriceVersion
from galley.economics.scope import Party
from galley.errors import GalleyError, Upstream
from galley.providers.base import Prepared
from galley.router.eligible import Candidate
from galley.types import Delta, Money, Request
from galley.usage import Usage

__all__ = ["Purse", "party_of"]

OVERHEAD = 64
"""Tokens that a server elsewhere may add to a prompt: its template's marks, and as many for each message."""
BILLED = ("timeout", "protocol", "cut")
"""Failures after which a server elsewhere may have read the prompt, and bill it."""


def party_of(request: Request) -> Party:
    """On whose account it runs. Metadata of our own (``galley.…``) are no tags."""
    tags = tuple(
        f"{name}={value}" for name, value in request.metadata.items() if not name.startswith("galley.")
    )
    return Party(
        tenant=request.tenant,
        org=request.org,
        team=request.team,
        user=request.user,
        key=request.key,
        session=request.session or request.metadata.get("galley.session"),
        tags=tags,
    )


class Served(Protocol):
    """The attempt that answered (``router.attempts.Won``)."""

    candidate: Candidate
    number: int


class Purse:
    """One per request.

    Args:
        ledger: None enters nothing; costs are on the receipt all the same.
    """

    def __init__(self, ledger: Ledger | None, request: Request, receipt_id: str) -> None:
        self._hold: Hold | None = None
        if ledger is not None:
            subject = Subject(party=party_of(request), api=request.api, model=request.model)
            self._hold = Hold(ledger, receipt_id, subject)
        self._batch = request.batch
        self._numbers = itertools.count(1)
        self._running: dict[int, tuple[Candidate, Ask]] = {}
        self._characters = 0
        self._estimated = 0
        self._cached_known = False
        self.rivals: Sequence[Candidate] = ()
        """Whatever was eligible."""
        self.lines: list[dict[str, Any]] = []
        """Price lines of attempts that failed or lost, for the receipt."""

    def capped(self, request: Request) -> Request:
        """The request under the output cap of its scopes. Raises InvalidRequest where it asks for more."""
        if self._hold is None:
            return request
        most, note = capped(request.params.max_tokens, self._hold.cap())
        if note is None:
            return request
        params = msgspec.structs.replace(request.params, max_tokens=most)
        return msgspec.structs.replace(
            request, params=params, clamped={**request.clamped, "max_tokens": note}
        )

    def price(self, candidate: Candidate) -> PriceVersion:
        """What applies to this request: our own engines charge lines of batches less, where so declared."""
        if self._batch and candidate.offer.location == "local":
            return candidate.price.for_batch()
        return candidate.price

    async def cover(self, candidate: Candidate, prepared: Prepared) -> int:
        """Reserve an attempt's worst case; its number. Raises QuotaExceeded, RateExceeded,
        LedgerUnavailable."""
        number = next(self._numbers)
        exact = sum(len(prompt) for prompt in prepared.prompts)
        local = candidate.offer.location == "local"
        ask = Ask(
            provider=candidate.offer.provider,
            model=candidate.offer.model,
            price=self.price(candidate),
            prompt_most=exact if local else most_tokens(prepared.request),
            prompt_likely=exact if local else likely_tokens(prepared.request),
            output_most=sum(prepared.max_tokens) * prepared.params.n,
            local=local,
        )
        self._running[number] = (candidate, ask)
        if self._hold is not None:
            try:
                await self._hold.cover(ask, number)
            except BaseException:
                self._running.pop(number, None)
                raise
        return number

    def failed(self, number: int, error: BaseException) -> int:
        """An attempt ended without an answer. Pico-dollars it is taken to have cost: of a server elsewhere
        that had begun and refused nothing, its prompt."""
        candidate, ask = self._running.pop(number)
        begun = not isinstance(error, GalleyError) or (isinstance(error, Upstream) and error.kind in BILLED)
        if ask.local or not begun:
            return self._lost(number, candidate, Usage())
        return self._lost(number, candidate, Usage(prompt_tokens=ask.prompt_likely))

    def lost(self, number: int, usage: Usage) -> int:
        """An attempt that had begun to answer is not the answer; what it cost."""
        candidate, _ = self._running.pop(number)
        return self._lost(number, candidate, usage)

    def escalated(self, number: int, usage: Usage) -> None:
        """The same, where somebody else shows its lines."""
        shown = list(self.lines)
        self.lost(number, usage)
        self.lines = shown

    def _lost(self, number: int, candidate: Candidate, usage: Usage) -> int:
        price = self.price(candidate)
        lines = price.lines(usage)
        if not usage.total_tokens:  # a price of the request as such is for one that was served
            lines = []
        cost: int = sum(line["pico"] for line in lines)
        self.lines += [{**line, "attempt": candidate.offer.key} for line in lines]
        if self._hold is not None:
            self._hold.lost(number, cost)
        return cost

    def deliver(self, delta: Delta) -> None:
        """Called before a piece goes out. Of a server elsewhere, which counts its tokens only at the end, a
        fourth of the characters."""
        if self._hold is None:
            return
        if delta.token_ids:
            if not self._cached_known and delta.cached_tokens is not None:
                self._cached_known = True
                self._hold.prompt(delta.cached_tokens)
            self._hold.deliver(len(delta.token_ids))
        elif delta.text or delta.reasoning:
            self._characters += len(delta.text) + len(delta.reasoning)
            tokens = -(-self._characters // 4)
            self._hold.deliver(tokens - self._estimated)
            self._estimated = tokens

    def settle(
        self,
        usage: Usage,
        served: "Served | None",
        *,
        status: str,
        estimated: bool,
    ) -> Money | None:
        """Enter it all, and say what it came to. None where nothing was ever reserved. Only the first call
        counts."""
        hold = self._hold
        if hold is None:
            return None
        won = served.candidate if served is not None else None
        price = self.price(won) if won is not None else None
        undiscounted = None
        if won is not None and price is not None and price.id != won.price.id:
            undiscounted = won.price
        for number in list(self._running):
            if served is None or number != served.number:  # ended before it could say anything of itself
                self.failed(number, TimeoutError())
        hold.settle(
            usage,
            price=price,
            provider=won.offer.provider if won is not None else None,
            model=won.offer.model if won is not None else None,
            status=status,
            ran=won is not None or bool(self.lines),
            estimated=estimated,
            rival=rival(self.rivals, won, usage) if won is not None else None,
            undiscounted=undiscounted,
        )
        if hold.bill is None:
            return None
        grant = hold.grant
        return Money(
            txn=hold.txn or "",
            cost_pico=hold.bill.cost_pico,
            revenue_pico=hold.bill.revenue_pico,
            saved_pico=hold.bill.saved,
            scopes=list(grant.scopes) if grant is not None else [],
            plan=hold.subject.plan,
            warnings=list(grant.warnings) if grant is not None else [],
            left_pico=grant.left_pico if grant is not None else None,
            late=hold.unrecorded,
        )

    @property
    def rates(self) -> tuple[Rate, ...]:
        """For ``x-ratelimit-*``."""
        return self._hold.rates if self._hold is not None else ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """Soft limits that are crossed."""
        if self._hold is None or self._hold.grant is None:
            return ()
        return self._hold.grant.warnings


def rival(sequence: Sequence[Candidate], won: Candidate, usage: Usage) -> Rival | None:
    """The dearest other offer that could have served the same."""
    others = [each for each in sequence if each.offer.key != won.offer.key]
    if not others:
        return None
    dearest = max(others, key=lambda each: each.price.price(usage))
    return Rival(name=dearest.offer.key, price=dearest.price)


def most_tokens(request: Request) -> int:
    """No prompt has more tokens than bytes, whatever the tokenizer; and a template adds some."""
    if request.messages is None:
        return sum(
            len(prompt.encode()) + OVERHEAD if isinstance(prompt, str) else len(prompt) + OVERHEAD
            for prompt in request.prompts or ()
        )
    size = len(msgspec.json.encode((request.messages, request.tools)))
    return size + OVERHEAD * (1 + len(request.messages))


def likely_tokens(request: Request) -> int:
    """A third of the characters, or the ids."""
    if request.messages is not None:
        return len(msgspec.json.encode((request.messages, request.tools))) // 3 + 4 * len(request.messages)
    return sum(
        len(prompt) // 3 + 1 if isinstance(prompt, str) else len(prompt) for prompt in request.prompts or ()
    )
