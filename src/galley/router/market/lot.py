"""A lot: capacity that somebody offers at a price, for a time, with promises about it."""

import msgspec

from galley.economics.price import PriceVersion
from galley.router.market.need import Need

__all__ = ["Lot"]

HOUR_PPM = 3600 * 1_000_000


class Lot(msgspec.Struct, frozen=True, kw_only=True):
    """Priced by the token (``price``) or by the second of a unit (``second_pico``): exactly one of them.

    A unit is what one request, or one stretch of work, occupies. Time is whole Unix seconds.

    Attributes:
        provider, model: the catalog's offer that this is capacity of.
        capacity: units.
        valid_from, valid_to: when it may be used; ``valid_to`` is outside.
        listed: since when it stands at this price; of two equal prices the older comes first.
        digest, quant: sha256 and number format of the weights it promises; empty says nothing.
        prefill_tps, decode_tps: promised tokens a second of a unit, reading and writing. Needed with
            ``second_pico``; with them a duration is known.
        ttft_ms: promised time to the first token; None promises nothing.
        preemptible: may be taken away, ``notice_s`` seconds after saying so.
        start_s: seconds from buying a unit until it serves.
        min_s: least seconds billed.
        interrupt_ppm: how likely it is taken away within an hour, in millionths; raises the expected price.
        source: the file or feed that says so.
        simulated: it stands in a simulation and can be bought nowhere.
    """

    id: str
    provider: str
    model: str
    capacity: int
    valid_from: int
    valid_to: int
    listed: int = 0
    region: str = ""
    digest: str = ""
    quant: str = ""
    price: PriceVersion | None = None
    second_pico: int | None = None
    prefill_tps: int = 0
    decode_tps: int = 0
    ttft_ms: int | None = None
    preemptible: bool = False
    notice_s: int = 0
    start_s: int = 0
    min_s: int = 1
    interrupt_ppm: int = 0
    source: str = ""
    simulated: bool = False

    def lasts(self, need: Need) -> int:
        """Unit-seconds that the work takes here, start-up apart. 0 where nothing is promised of speed."""
        if need.seconds:
            return need.seconds
        spent = -(-(self.ttft_ms or 0) // 1000)
        for tokens, speed in ((need.input - need.cached, self.prefill_tps), (need.output, self.decode_tps)):
            if tokens and speed:
                spent += -(-tokens // speed)
        return spent

    def done(self, need: Need, at: int) -> int:
        """When the work would be done if bought at ``at``."""
        return at + self.start_s + self.lasts(need)

    def expected(self, need: Need) -> int:
        """Pico-dollars that the work is expected to cost in all, what an interruption would make it do again
        included. Rounded up. A start-up is billed where seconds are."""
        lasts = self.lasts(need)
        if self.second_pico is not None:
            base = max(self.min_s, lasts + self.start_s) * self.second_pico
        else:
            assert self.price is not None
            base = self.price.quote(need.input, need.output, need.cached).expected
        if not self.preemptible or not self.interrupt_ppm or self.notice_s >= max(1, need.drain_s):
            return base
        # Taken away with too little notice, at worst ``redo_s`` of it, at most all of it, is done again.
        again = min(lasts, need.redo_s or lasts)
        risk = min(1_000_000, -(-self.interrupt_ppm * lasts // 3600))
        return base + -(-base * again * risk // (max(1, lasts) * 1_000_000))

    def tokens(self) -> PriceVersion:
        """The price of a token here, for a receipt. Of capacity priced by the second it is what a token
        occupies at the promised speed, rounded up and marked ``estimated``."""
        if self.price is not None:
            return self.price
        assert self.second_pico is not None
        read = -(-self.second_pico // self.prefill_tps)
        return PriceVersion(
            id=f"{self.id}@{self.listed}",
            input=read,
            cached=0,
            cache_write=read,
            output=-(-self.second_pico // self.decode_tps),
            quality="estimated",
        )

    def refuses(self, need: Need, at: int) -> str | None:
        """Why it cannot take this work now, by hard limits alone; None when it can. Free capacity apart."""
        if self.model != need.model:
            return f"it serves {self.model}"
        if not self.valid_from <= at < self.valid_to:
            return "it is not offered at this time"
        if need.regions and self.region not in need.regions:
            return (
                f"its region {self.region or 'is unknown and'} is not among {', '.join(sorted(need.regions))}"
            )
        if need.steady and self.preemptible:
            return "it may be taken away"
        if need.max_ttft_ms is not None and (self.ttft_ms is None or self.ttft_ms > need.max_ttft_ms):
            promised = "nothing" if self.ttft_ms is None else f"{self.ttft_ms} ms"
            return f"it promises {promised} to the first token, wanted are {need.max_ttft_ms} ms"
        if need.deadline is not None and self.done(need, at) > need.deadline:
            return f"it would be done {self.done(need, at) - need.deadline} s after the deadline"
        cost = self.expected(need)
        if need.max_pico is not None and cost > need.max_pico:
            return f"it is expected to cost {cost} pico-dollars, the limit is {need.max_pico}"
        return None
