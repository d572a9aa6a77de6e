"""What the machine costs, bought or rented, and its electricity: exact fractions of pico-dollars."""

from fractions import Fraction

import msgspec

from galley import values
from galley.errors import ConfigError
from galley.setting import Setting

__all__ = ["MACHINE", "Economics", "Machine"]

DAY_US = 86_400 * 10**6
KWH = 3_600_000 * 10**9
"""Of milliwatts times microseconds, which are 1e-9 joules."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The settings ``economics.machine``. All None (the default) is a machine whose cost is not known."""

    price_usd: int | None = None
    """Pico-dollars it was bought for."""
    lifetime_days: int | None = None
    """Over which that is spread evenly."""
    rent: tuple[int, int] | None = None
    """Pico-dollars for so many seconds."""
    watts: int | None = None
    """Milliwatts it draws on average, as the operator declares it: no measurement of any request."""
    electricity_usd: int | None = None
    """Pico-dollars a kilowatt-hour."""
    memory_points: int = 1000
    """Ten-thousandths of the price that are memory's, and so borne by whoever holds KV."""

    def checked(self) -> "Machine":
        """Itself. Raises ConfigError where it is neither bought nor rented, both, or half declared."""
        if self.rent is None and self.price_usd is None:
            raise ConfigError(
                "What this machine costs is not declared.",
                param="economics.machine",
                hint="GALLEY_MACHINE_RENT=0.80/h, or GALLEY_MACHINE_PRICE_USD=2400 and "
                "GALLEY_MACHINE_LIFETIME_DAYS=1460",
            )
        if self.rent is not None and self.price_usd is not None:
            raise ConfigError(
                "economics.machine: it is either bought (price_usd) or rented (rent).",
                param="economics.machine.rent",
            )
        if (self.price_usd is None) != (self.lifetime_days is None):
            raise ConfigError(
                "economics.machine: price_usd and lifetime_days belong together.",
                param="economics.machine.lifetime_days",
            )
        if (self.watts is None) != (self.electricity_usd is None):
            raise ConfigError(
                "economics.machine: watts and electricity_usd belong together.",
                param="economics.machine.watts",
            )
        return self

    def capital(self, period_us: int) -> Fraction:
        """Pico-dollars of owning or renting it for so many microseconds. Raises ConfigError."""
        self.checked()
        if self.rent is not None:
            pico, seconds = self.rent
            return Fraction(pico * period_us, seconds * 10**6)
        assert self.price_usd is not None and self.lifetime_days is not None
        return Fraction(self.price_usd * period_us, self.lifetime_days * DAY_US)

    def electricity(self, period_us: int) -> Fraction | None:
        """Pico-dollars of its electricity; None where draw and price are not declared. Raises ConfigError."""
        self.checked()
        if self.watts is None or self.electricity_usd is None:
            return None
        return Fraction(self.watts * self.electricity_usd * period_us, KWH)


class Economics(msgspec.Struct, frozen=True, kw_only=True):
    """The settings ``economics``."""

    machine: Machine


MACHINE = (
    Setting(
        "economics.machine.price_usd",
        "GALLEY_MACHINE_PRICE_USD",
        values.dollars,
        None,
        "dollars this machine was bought for",
    ),
    Setting(
        "economics.machine.lifetime_days",
        "GALLEY_MACHINE_LIFETIME_DAYS",
        values.integer(1, 36_500),
        None,
        "days over which that is spread",
    ),
    Setting(
        "economics.machine.rent",
        "GALLEY_MACHINE_RENT",
        values.rent,
        None,
        "or what it is rented for, such as 0.80/h",
    ),
    Setting("economics.machine.watts", "GALLEY_MACHINE_WATTS", values.milliwatts, None, "watts it draws"),
    Setting(
        "economics.machine.electricity_usd",
        "GALLEY_MACHINE_ELECTRICITY_USD",
        values.dollars,
        None,
        "dollars a kilowatt-hour",
    ),
    Setting(
        "economics.machine.memory_points",
        "GALLEY_MACHINE_MEMORY_POINTS",
        values.integer(0, 10_000),
        1000,
        "ten-thousandths of its price that whoever holds KV bears",
    ),
)
"""Their rows of ``settings.SETTINGS``."""
