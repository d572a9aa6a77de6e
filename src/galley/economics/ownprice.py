"""A price list of our own, derived from what the machine's requests cost."""

from fractions import Fraction

import msgspec

from galley.economics.unit import Units
from galley.errors import ConfigError

__all__ = ["OwnPrices", "own_prices"]


class OwnPrices(msgspec.Struct, frozen=True, kw_only=True):
    """Pico-dollars a token: micro-dollars per million tokens. ``input >= cached``.

    Attributes:
        discount_points: of a cached token against an input token, in ten-thousandths.
        busy_points: of the time, in ten-thousandths: what these prices rest on.
    """

    input: int
    cached: int
    output: int
    discount_points: int
    busy_points: int
    requests: int

    @property
    def setting(self) -> str:
        """As ``ledger.local_price`` takes it."""
        return ",".join(f"{name}={million(getattr(self, name))}" for name in ("input", "output", "cached"))


def own_prices(units: Units, busy_points: int | None = None) -> OwnPrices:
    """Prices at which the same requests pay for the machine of the period.

    Prefill money is borne by the prompt tokens that were computed, decode money by output tokens, and
    memory's by all tokens alike, since all are held. Idle time and electricity are added to each in
    proportion. A cached token was not computed, so it bears memory alone: that is its discount.
    Rounded up to a whole pico-dollar, so the list never earns less than the machine costs.

    Args:
        busy_points: price as though the same work filled this share of a period, in ten-thousandths above 0;
            None is the share it did fill.

    Raises ConfigError where the period has no computed prompt tokens or no output tokens to price, or, with
    ``busy_points``, no time of service.
    """
    fresh = sum(each.fresh_tokens for each in units.works)
    cached = sum(each.cached_tokens for each in units.works)
    output = sum(each.completion_tokens for each in units.works)
    if not fresh or not output:
        raise ConfigError(
            "A price cannot be derived: no request of the period ran on this machine with both prompt tokens "
            "that were computed and output tokens.",
            hint="galley log lists requests; --since and --until choose the period",
        )
    cost = Fraction(units.cost)
    if busy_points is not None:
        if not units.busy_us:
            raise ConfigError("No request of the period took any time, so its cost cannot be scaled.")
        cost = cost * Fraction(units.busy_us, units.period_us) / Fraction(busy_points, 10_000)
    direct = [units.part(name) for name in ("prefill", "decode", "kv")]
    whole = sum(direct)
    # Each part carries overhead in proportion; with nothing direct (a machine that costs nothing but its
    # electricity) the overhead goes by tokens.
    raised = [
        part * cost / whole if whole else count * cost / (fresh + output)
        for part, count in zip(direct, (fresh, output, 0), strict=True)
    ]
    held = raised[2] / (fresh + cached + output)
    prices = [up(raised[0] / fresh + held), up(held), up(raised[1] / output + held)]
    return OwnPrices(
        input=prices[0],
        cached=prices[1],
        output=prices[2],
        discount_points=(prices[0] - prices[1]) * 10_000 // prices[0] if prices[0] else 0,
        busy_points=units.busy_us * 10_000 // units.period_us if busy_points is None else busy_points,
        requests=len(units.works),
    )


def up(amount: Fraction) -> int:
    """The next whole number."""
    return -(-amount.numerator // amount.denominator)


def million(pico: int) -> str:
    """Pico-dollars a token as dollars per million tokens, exact."""
    digits = f"{pico % 10**6:06d}".rstrip("0")
    return f"{pico // 10**6}.{digits:0<2}"
