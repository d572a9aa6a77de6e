"""What requests of our own engine cost: the machine's money of a period, divided to the last pico-dollar.

What a request used is on its receipt, modelled from counts (FLOP, bytes, byte-seconds), and so are its times,
which are measured. The money comes from what the operator declares the machine to cost. No rate of the
machine is assumed: how long it was busy, and with what, is read from the receipts.
"""

from collections.abc import Iterable, Sequence

import msgspec

from galley.economics.apportion import apportion, nearest
from galley.machine import Machine
from galley.types import Receipt

__all__ = ["Parts", "Units", "Work", "divide", "work"]


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What one request took of the machine. Whole numbers, so that every division of money is exact."""

    id: str
    model: str = ""
    user: str | None = None
    began_us: int = 0
    """First scheduled step, microseconds since 1970."""
    prefill_us: int = 0
    decode_us: int = 0
    queue_us: int = 0
    flop: int = 0
    bytes: int = 0
    kv_byte_us: int = 0
    """Byte-microseconds."""
    millijoules: int | None = None
    """None unless measured."""
    fresh_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def ended_us(self) -> int:
        """When it left the engine."""
        return self.began_us + self.prefill_us + self.decode_us


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of one request, in pico-dollars."""

    id: str
    prefill: int
    decode: int
    kv: int
    idle: int
    """Its share of the time in which the machine served nobody, by how long it was in the system, queue
    included."""
    energy: int | None
    """None where electricity is not declared."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.prefill + self.decode + self.kv + self.idle + (self.energy or 0)


class Units(msgspec.Struct, frozen=True, kw_only=True):
    """A period. The requests' parts and ``unused`` add up to ``capital`` + ``energy``."""

    period_us: int
    busy_us: int
    """In which at least one request was being served."""
    capital: int
    energy: int | None
    measured: bool
    """Energy follows joules measured for every request, not the time they took."""
    unused: int
    """Cost of a period without any request."""
    works: list[Work]
    parts: list[Parts]

    @property
    def cost(self) -> int:
        """What the machine cost."""
        return self.capital + (self.energy or 0)

    def part(self, name: str) -> int:
        """Sum of a part over all requests."""
        return sum(getattr(each, name) or 0 for each in self.parts)


def work(receipt: Receipt) -> Work | None:
    """What a receipt says; None of a request that did not run on an engine of this machine."""
    if receipt.route is None or receipt.route.location != "local":
        return None
    times, used, usage = receipt.times, receipt.resources, receipt.usage
    if not used.steps:
        return None
    return Work(
        id=receipt.id,
        model=receipt.model,
        user=receipt.user or receipt.tenant,
        began_us=round((receipt.created + times.queue_s) * 10**6),
        prefill_us=round(times.prefill_s * 10**6),
        decode_us=round(times.decode_s * 10**6),
        queue_us=round(times.queue_s * 10**6),
        flop=round(used.prefill_flop),
        bytes=round(used.decode_bytes),
        kv_byte_us=round(used.kv_byte_seconds * 10**6),
        millijoules=None if used.joules is None else round(used.joules * 1000),
        fresh_tokens=usage.prompt_tokens - usage.cached_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
    )


def divide(machine: Machine, works: Iterable[Work], *, since_us: int, until_us: int) -> Units:
    """Divide what the machine cost from ``since_us`` to ``until_us`` (microseconds since 1970) among its
    requests.

    1. Time: the share in which some request was being served (the union of their intervals) is busy; the
       rest is idle, and borne by how long each was in the system.
    2. Of the busy money ``memory_points`` go by KV byte-seconds. The rest is split between prefill and decode
       as the requests' own measured seconds are; prefill goes by FLOP, decode by bytes read.
    3. Electricity goes by measured joules where every request has them, else by seconds of service.

    Where nobody has any of what a part goes by, it goes by time. Every step is ``apportion``, so the parts
    add up exactly. O(n log n). Raises ConfigError: the machine's cost is not declared; ValueError: no period.
    """
    if until_us <= since_us:
        raise ValueError("a period ends after it begins")
    mine = [each for each in works if since_us <= each.began_us < until_us]
    period = until_us - since_us
    capital, power = nearest(machine.capital(period)), machine.electricity(period)
    energy = None if power is None else nearest(power)
    busy = busy_us(mine, until_us)
    measured = bool(mine) and all(each.millijoules is not None for each in mine)
    if not mine:
        return Units(
            period_us=period, busy_us=0, capital=capital, energy=energy, measured=False,
            unused=capital + (energy or 0), works=[], parts=[],
        )  # fmt: skip
    in_use, idle = apportion(capital, [busy, period - busy])
    memory, rest = apportion(in_use, [machine.memory_points, 10_000 - machine.memory_points])
    prefill_time, decode_time = sum(w.prefill_us for w in mine), sum(w.decode_us for w in mine)
    prefill, decode = apportion(rest, [prefill_time, decode_time] if prefill_time + decode_time else [1, 1])
    served = [w.prefill_us + w.decode_us for w in mine]
    present = [w.queue_us + took for w, took in zip(mine, served, strict=True)]
    joules = [w.millijoules or 0 for w in mine] if measured else served
    columns = [
        shares(prefill, [w.flop for w in mine], [w.prefill_us for w in mine]),
        shares(decode, [w.bytes for w in mine], [w.decode_us for w in mine]),
        shares(memory, [w.kv_byte_us for w in mine], served),
        shares(idle, present, present),
        shares(energy or 0, joules, served),
    ]
    parts = [
        Parts(id=w.id, prefill=a, decode=b, kv=c, idle=d, energy=None if energy is None else e)
        for w, a, b, c, d, e in zip(mine, *columns, strict=True)
    ]
    return Units(
        period_us=period, busy_us=busy, capital=capital, energy=energy, measured=measured, unused=0,
        works=mine, parts=parts,
    )  # fmt: skip


def shares(total: int, weights: Sequence[int], otherwise: Sequence[int]) -> list[int]:
    """By the weights; where all of them are 0 by the others, and evenly where those are too."""
    for each in (weights, otherwise):
        if any(each):
            return apportion(total, each)
    return apportion(total, [1] * len(weights))


def busy_us(works: Sequence[Work], until_us: int) -> int:
    """Length of the union of the intervals of service, as far as they lie before the end."""
    busy, reached = 0, 0
    for each in sorted(works, key=lambda each: each.began_us):
        start, end = max(each.began_us, reached), min(each.ended_us, until_us)
        if end > start:
            busy += end - start
            reached = end
    return busy
