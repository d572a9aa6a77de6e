"""Prices: what a token of each kind costs at a provider on a day, and the one way to turn tokens into money.

Money is whole pico-dollars (1e-12 USD); a price is whole pico-dollars a token, which is micro-dollars per
million tokens. A price that is not known is refused, or is the declared ceiling: never zero.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from datetime import date
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

import msgspec

from galley.errors import ConfigError, GalleyError
from galley.types import Usage

__all__ = ["FREE", "KINDS", "PriceBook", "PriceVersion", "Quote", "Tier", "UnknownPrice", "own_price"]

KINDS = ("input", "cached", "cache_write", "output")
Quality = Literal["exact", "estimated", "ceiling", "own"]


class UnknownPrice(GalleyError):
    """No price is known and none may be assumed."""

    status = 503
    code = "unknown_price"
    exit_code = 5


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """Other prices, for the whole of a request whose prompt has more than ``above`` tokens."""

    above: int
    input: int
    output: int
    cached: int
    cache_write: int
    cache_write_1h: int | None = None


class PriceVersion(msgspec.Struct, frozen=True, kw_only=True):
    """Pico-dollars a token by kind, from a day on.

    ``id`` names source, provider, model and day; a receipt that carries it can be priced again.
    """

    id: str
    input: int
    output: int
    cached: int
    cache_write: int
    request: int = 0
    """Pico-dollars a request."""
    batch_points: int = 10_000
    """Of our own engines: what a line of a batch is charged, in ten-thousandths of these prices."""
    draft_saving: int = 0
    """Of our own engines: pico-dollars of machine time that an accepted draft token saves."""
    cache_write_1h: int | None = None
    """Of tokens written to a cache for an hour; None is ``cache_write``."""
    tiers: tuple[Tier, ...] = ()
    """By ``above``, ascending; the last that applies holds for every token."""
    valid_from: date = date.min
    quality: Quality = "exact"

    @property
    def free(self) -> bool:
        """Whether nothing costs anything."""
        return not (self.input or self.output or self.cached or self.cache_write or self.request)

    def for_batch(self) -> "PriceVersion":
        """The price of a line of a batch, each rounded up to a whole pico-dollar; itself where there is no
        discount."""
        if self.batch_points == 10_000:
            return self
        cut = {name: -(-getattr(self, name) * self.batch_points // 10_000) for name in (*KINDS, "request")}
        # An own price has neither tiers nor lifetimes of caches: it is read by ``version``.
        return msgspec.structs.replace(self, id=f"{self.id}#batch", batch_points=10_000, **cut)

    @property
    def digest(self) -> str:
        """Of everything it says, so that an id which comes with other numbers is told apart."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]

    def lines(self, usage: Usage) -> list[dict[str, Any]]:
        """Price lines of a usage: kind, quantity, pico-dollars a unit and in all, price version; lines with
        a quantity of 0 are left out. Whole numbers only, so nothing is rounded. Our own engines have none
        unless the operator gives them a price: what they use is on the receipt as resources."""
        if self.quality == "own" and self.free:
            return []
        fresh = usage.prompt_tokens - usage.cached_tokens - usage.cache_write_tokens
        if fresh < 0:
            raise ValueError(f"more cached tokens than prompt tokens: {usage}")
        unit = self.at(usage.prompt_tokens)
        hour = min(usage.cache_write_ttl.get("1h", 0), usage.cache_write_tokens)
        hourly = unit.cache_write if unit.cache_write_1h is None else unit.cache_write_1h
        quantities = (
            ("input", fresh, unit.input),
            ("cached", usage.cached_tokens, unit.cached),
            ("cache_write", usage.cache_write_tokens - hour, unit.cache_write),
            ("cache_write_1h", hour, hourly),
            ("output", usage.completion_tokens, unit.output),
            ("request", 1 if self.request else 0, self.request),
        )
        return [
            {"kind": kind, "quantity": n, "unit_pico": each, "pico": n * each, "price_version": self.id}
            for kind, n, each in quantities
            if n
        ]

    def at(self, prompt_tokens: int) -> "PriceVersion | Tier":
        """What holds for a prompt of so many tokens."""
        found: PriceVersion | Tier = self
        for tier in self.tiers:
            if prompt_tokens > tier.above:
                found = tier
        return found

    def price(self, usage: Usage) -> int:
        """Pico-dollars of a usage."""
        return sum(line["pico"] for line in self.lines(usage))

    def quote(self, prompt_tokens: int, max_tokens: int, cached_tokens: int = 0) -> "Quote":
        """What a request may cost: expected with a share of the prompt cached, most with none and every token
        used (a cache write may cost more than plain input)."""
        expected = Usage(
            prompt_tokens=prompt_tokens, cached_tokens=cached_tokens, completion_tokens=max_tokens
        )
        # With fewer tokens a lower tier may hold; a tier that is cheaper than the one below must not hide it.
        may: list[PriceVersion | Tier] = [self, *(tier for tier in self.tiers if prompt_tokens > tier.above)]
        dearest = max(max(unit.input, unit.cache_write, unit.cache_write_1h or 0) for unit in may)
        most = prompt_tokens * dearest + max_tokens * max(unit.output for unit in may) + self.request
        return Quote(expected=self.price(expected), most=most, version=self.id, quality=self.quality)


class Quote(msgspec.Struct, frozen=True, kw_only=True):
    """Pico-dollars before the fact."""

    expected: int
    most: int
    version: str
    quality: Quality


FREE = PriceVersion(id="own-machine", input=0, output=0, cached=0, cache_write=0, quality="own")
"""Our own engines: their cost is resources on the receipt, not a list price."""


class PriceBook:
    """Prices by provider and model as named on the wire.

    Looked up in order: declared versions (the catalog's), ``genai-prices`` when the provider has a
    ``price_id``, the ceiling. Answers are cached per day.

    Args:
        ceiling: the price assumed of the unknown; None refuses them.
    """

    def __init__(self, *, ceiling: PriceVersion | None = None) -> None:
        self.ceiling = ceiling
        self._declared: dict[tuple[str, str], list[PriceVersion]] = {}
        self._known: dict[tuple[str, str, date, tuple[tuple[str, str], ...]], PriceVersion | None] = {}

    def declare(self, provider: str, model: str, versions: Sequence[PriceVersion]) -> None:
        """Prices from the catalog. Raises ConfigError when two begin on the same day."""
        ordered = sorted(versions, key=lambda version: version.valid_from)
        for a, b in itertools.pairwise(ordered):
            if a.valid_from == b.valid_from:
                raise ConfigError(f"two prices of {model} at {provider} begin on {a.valid_from}")
        self._declared[provider, model] = ordered
        self._known.clear()

    def declared(self, provider: str, model: str) -> bool:
        """Whether the catalog has a price for it."""
        return (provider, model) in self._declared

    def find(
        self,
        provider: str,
        model: str,
        price_id: str | None,
        on: date,
        context: tuple[tuple[str, str], ...] = (),
    ) -> PriceVersion:
        """The price in force on a day. ``context`` is how the provider is used, as ``genai-prices`` names it
        (``processing`` = ``batch``, ``service_tier`` = ``flex``). Raises UnknownPrice."""
        key = (provider, model, on, context)
        if key not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            self._known[key] = self._look(provider, model, price_id, on, context)
        found = self._known[key] or self.ceiling
        if found is None:
            raise UnknownPrice(
                f"No price is known for {model} at {provider}.",
                hint="Declare one in the catalog, or a ceiling under [policy].",
            )
        return found

    def _look(
        self,
        provider: str,
        model: str,
        price_id: str | None,
        on: date,
        context: tuple[tuple[str, str], ...],
    ) -> PriceVersion | None:
        current = [v for v in self._declared.get((provider, model), ()) if v.valid_from <= on]
        if current:
            return current[-1]
        if price_id is None:
            return None
        from galley.economics.packaged import packaged

        return packaged(price_id, model, on, context)


def pico(text: object, what: str) -> int:
    """USD per million tokens (a decimal string or an integer, never a float) as pico-dollars a token.

    Raises ConfigError: not a number, negative, or finer than a millionth of a dollar per million tokens.
    """
    if isinstance(text, float | bool):
        raise ConfigError(f'{what} = {text!r}: write prices as strings, such as "0.15"; floats are not exact')
    try:
        amount = Decimal(str(text)) * 1_000_000
    except InvalidOperation as error:
        raise ConfigError(f"{what} = {text!r} is not a number") from error
    if not amount.is_finite() or amount < 0 or amount != amount.to_integral_value():
        raise ConfigError(f"{what} = {text!r} must be a number >= 0 with at most six decimals")
    return int(amount)


def points(text: object, what: str) -> int:
    """A share 0..1 as ten-thousandths. Raises ConfigError."""
    share = pico(text, what)
    if share > 1_000_000 or share % 100:
        raise ConfigError(f"{what} = {text!r} must lie in 0..1, with at most four decimals")
    return share // 100


def own_price(text: str | None) -> PriceVersion:
    """What local models cost by the settings: ``input=0.10,output=0.40``; None is nothing. The id has a
    digest of the numbers, so that a changed price is another version. Raises ConfigError."""
    if text is None:
        return FREE
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    table = {name.strip(): value.strip() for name, _, value in pairs}
    if len(table) != len(pairs):
        raise ConfigError(f"ledger.local_price = {text!r} names something twice")
    found = version(table, "own-machine", quality="own")
    return msgspec.structs.replace(found, id=f"own-machine/{found.digest}")


def version(table: Mapping[str, Any], name: str, quality: Quality = "exact") -> PriceVersion:
    """A price from a TOML table: ``input`` and ``output`` needed; ``cached`` and ``cache_write`` default to
    ``input``; ``request`` in USD per million requests; ``from`` a date. Of our own engines also ``batch``,
    the share of these prices that lines of batches pay, and ``draft``, what an accepted draft token saves.
    Raises ConfigError."""
    names = {"input", "output", "cached", "cache_write", "request", "from"}
    if quality == "own":
        names |= {"batch", "draft"}
    strangers = set(table) - names
    if strangers or "input" not in table or "output" not in table:
        raise ConfigError(
            f"{name}: a price has input and output, and may have cached, cache_write, request and from"
            + (f"; not {', '.join(sorted(strangers))}" if strangers else "")
        )
    start = table.get("from", date.min)
    if isinstance(start, str):
        try:
            start = date.fromisoformat(start)
        except ValueError as error:
            raise ConfigError(f"{name}: from = {start!r} is no date") from error
    if not isinstance(start, date):
        raise ConfigError(f"{name}: from = {start!r} is no date")
    base = pico(table["input"], f"{name}.input")
    return PriceVersion(
        id=f"{name}@{start.isoformat() if start != date.min else 'always'}",
        input=base,
        output=pico(table["output"], f"{name}.output"),
        cached=pico(table.get("cached", table["input"]), f"{name}.cached"),
        cache_write=pico(table.get("cache_write", table["input"]), f"{name}.cache_write"),
        request=pico(table.get("request", 0), f"{name}.request"),
        batch_points=points(table.get("batch", 1), f"{name}.batch"),
        draft_saving=pico(table.get("draft", 0), f"{name}.draft"),
        valid_from=start,
        quality=quality,
    )
