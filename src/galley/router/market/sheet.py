"""Lots as people and venues write them: rows of a TOML file, or of a feed's message."""

import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import msgspec

from galley.economics.price import version
from galley.errors import ConfigError
from galley.router.market.lot import Lot

__all__ = ["LotRow", "read_sheet"]

MOST_PICO_S = 10**12
"""A dollar a second: above it a row is an error of units."""


class LotRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[lot]]``. Prices are strings: ``price`` in USD per million tokens, as in the catalog, or ``second``
    in USD per second of a unit. Times are ISO 8601 with an offset, or Unix seconds. The other fields are
    those of ``Lot``."""

    id: str
    provider: str
    model: str
    capacity: int
    valid_from: int | datetime = msgspec.field(name="from", default=0)
    valid_to: int | datetime = msgspec.field(name="to")
    region: str = ""
    digest: str = ""
    quant: str = ""
    price: dict[str, Any] | None = None
    second: str | None = None
    prefill_tps: int = 0
    decode_tps: int = 0
    ttft_ms: int | None = None
    preemptible: bool = False
    notice_s: int = 0
    start_s: int = 0
    min_s: int = 1
    interrupt_ppm: int = 0

    def lot(self, *, source: str, listed: int, simulated: bool = False) -> Lot:
        """The lot that it says. Raises ConfigError naming the field."""
        where = f"lot {self.id!r}"
        if not self.id or not self.provider or not self.model:
            raise ConfigError(f"{where}: id, provider and model are needed")
        if (self.price is None) == (self.second is None):
            raise ConfigError(f"{where}: give price or second, one of them")
        numbers = (self.notice_s, self.start_s, self.interrupt_ppm, self.prefill_tps, self.decode_tps)
        if self.capacity < 0 or self.min_s < 0 or min(numbers) < 0 or self.interrupt_ppm > 1_000_000:
            raise ConfigError(f"{where}: a number is out of range")
        if self.second is not None and not (self.prefill_tps and self.decode_tps):
            raise ConfigError(f"{where}: a price by the second needs prefill_tps and decode_tps")
        if not self.preemptible and (self.notice_s or self.interrupt_ppm):
            raise ConfigError(f"{where}: notice_s and interrupt_ppm are of preemptible lots")
        start, end = moment(self.valid_from, f"{where}: from"), moment(self.valid_to, f"{where}: to")
        if end <= start:
            raise ConfigError(f"{where}: it ends before it begins")
        named = None if self.price is None else version(self.price, self.id)
        if named is not None and not named.input and not named.output:
            raise ConfigError(f"{where}: a lot for nothing is an error, or a trap")
        return Lot(
            id=self.id,
            provider=self.provider,
            model=self.model,
            capacity=self.capacity,
            valid_from=start,
            valid_to=end,
            listed=listed,
            region=self.region,
            digest=self.digest.removeprefix("sha256:"),
            quant=self.quant,
            price=named,
            second_pico=None if self.second is None else pico_second(self.second, f"{where}: second"),
            prefill_tps=self.prefill_tps,
            decode_tps=self.decode_tps,
            ttft_ms=self.ttft_ms,
            preemptible=self.preemptible,
            notice_s=self.notice_s,
            start_s=self.start_s,
            min_s=self.min_s,
            interrupt_ppm=self.interrupt_ppm,
            source=source,
            simulated=simulated,
        )


class Sheet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. ``simulated`` marks every lot of it as made up."""

    lot: list[LotRow] = []
    simulated: bool = False


def read_sheet(path: Path, at: int) -> list[Lot]:
    """The lots of a TOML file. Raises ConfigError naming file and place; ids must differ."""
    try:
        sheet = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Sheet)
        return lots_of(sheet.lot, source=path.name, listed=at, simulated=sheet.simulated)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}", param="market.sheets") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}", param="market.sheets") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}", param="market.sheets") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", param="market.sheets") from error


def lots_of(rows: Sequence[LotRow], *, source: str, listed: int, simulated: bool = False) -> list[Lot]:
    """Lots of rows. Raises ConfigError; two of one id are an error."""
    lots = {row.id: row.lot(source=source, listed=listed, simulated=simulated) for row in rows}
    if len(lots) != len(rows):
        raise ConfigError(f"{source}: two lots have the same id")
    return list(lots.values())


def moment(value: int | datetime, what: str) -> int:
    """Unix seconds. Raises ConfigError; a time without an offset is an error."""
    if isinstance(value, int):
        return value
    if value.tzinfo is None:
        raise ConfigError(f"{what} has no offset from UTC")
    return int(value.astimezone(UTC).timestamp())


def pico_second(text: str, what: str) -> int:
    """USD a second as whole pico-dollars. Raises ConfigError: no number, not above 0, finer than a
    pico-dollar, or above a dollar."""
    try:
        amount = Decimal(text) * 10**12
    except InvalidOperation as error:
        raise ConfigError(f"{what} = {text!r} is not a number") from error
    if not amount.is_finite() or amount != amount.to_integral_value() or not 0 < amount <= MOST_PICO_S:
        raise ConfigError(f"{what} = {text!r} must lie in (0, 1] USD with at most twelve decimals")
    return int(amount)
