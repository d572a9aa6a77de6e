"""Parsers of setting values: text or a TOML value in; ValueError saying what was expected."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any


def size(value: Any) -> int:
    """``4096``, ``"512MiB"``, ``"2GB"`` to bytes; decimal and binary units."""
    if isinstance(value, bool):
        raise ValueError("expected a size such as 512MiB or 2GB")
    if isinstance(value, int):
        size = float(value)
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)(b?)\s*", str(value), re.IGNORECASE)
        if match is None or (match[3] and not match[2]):
            raise ValueError("expected a size such as 512MiB or 2GB")
        power = " kmgt".index(match[2].lower() or " ")
        size = float(match[1]) * float((1024 if match[3] else 1000) ** power)
    if size <= 0:
        raise ValueError("expected a size above zero")
    return math.floor(size)


def budget(value: Any) -> int:
    """A size as ``size`` reads it, or ``0`` or ``"off"`` for none."""
    if value is not False and str(value).strip().lower() in ("0", "off"):
        return 0
    return size(value)


def tokens(value: Any) -> int:
    """``8192`` or ``"8K"`` (1024s) or ``"8k"`` (1000s) to a token count of at least 1. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]+)([kK]?)\s*", str(value))
    if match is None or isinstance(value, bool):
        raise ValueError("expected a token count such as 4096 or 32K")
    count = int(match[1]) * {"": 1, "k": 1000, "K": 1024}[match[2]]
    if count < 1:
        raise ValueError("expected at least 1")
    return count


def integer(low: int, high: int) -> Callable[[Any], int]:
    """A parser of whole numbers in ``low..high``, both included."""

    def parse(value: Any) -> int:
        if isinstance(value, bool | float) or not re.fullmatch(r"\s*[+-]?[0-9]+\s*", str(value)):
            raise ValueError("expected an integer")
        number = int(value)
        if not low <= number <= high:
            raise ValueError(f"expected {low} to {high}")
        return number

    return parse


def seconds(value: Any) -> float:
    """A number of seconds, 0 or more."""
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 <= number < math.inf:
        raise ValueError("expected a number of seconds, 0 or more")
    return number


def weights(value: Any) -> tuple[tuple[str, float], ...]:
    """``alice=2,bob=0.5`` or a list of such pairs: names with a weight above zero each."""
    found: dict[str, float] = {}
    for pair in names(value):
        name, mark, number = pair.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not mark or not name.strip() or not 0 < weight < math.inf:
            raise ValueError("expected pairs such as alice=2, with weights above zero")
        found[name.strip()] = weight
    return tuple(found.items())


def text(value: Any) -> str:
    """Text that is not empty."""
    if not isinstance(value, str | Path) or not str(value).strip():
        raise ValueError("expected text that is not empty")
    return str(value)


def places(value: Any) -> tuple[tuple[str, Path], ...]:
    """``name=path`` pairs, separated by commas."""
    found: dict[str, Path] = {}
    for pair in names(value):
        name, mark, where = pair.partition("=")
        if not mark or not name.strip() or not where.strip() or name.strip() in found:
            raise ValueError("expected pairs such as poet=/adapters/poet, each name once")
        found[name.strip()] = path(where.strip())
    return tuple(found.items())


def paths(value: Any) -> tuple[Path, ...]:
    """A list of paths, or paths separated by commas."""
    return tuple(path(one) for one in names(value))


def path(value: Any) -> Path:
    """An absolute path; ``~`` is the user's home."""
    return Path(text(value)).expanduser().absolute()


def boolean(value: Any) -> bool:
    """true/yes/on/1 or false/no/off/0, in any case."""
    if isinstance(value, bool):
        return value
    words = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
    }
    if str(value).strip().lower() not in words:
        raise ValueError("expected true or false")
    return words[str(value).strip().lower()]


def tiers(value: Any) -> tuple[tuple[str, str], ...]:
    """``delete_*=destructive,send=write``: patterns of tool names with a tier each, in order."""
    found = []
    for part in names(value):
        pattern, _, tier = (each.strip() for each in part.rpartition("="))
        if not pattern or tier not in ("write", "destructive"):
            raise ValueError("expected pairs such as send_*=write,delete_*=destructive")
        found.append((pattern, tier))
    return tuple(found)


def dollars(value: Any) -> int:
    """``0.25`` to whole pico-dollars; at most twelve decimals."""
    try:
        pico = Decimal(str(value).strip().removeprefix("$")) * 10**12
    except InvalidOperation as error:
        raise ValueError("expected an amount of dollars such as 0.25") from error
    if isinstance(value, bool) or not pico.is_finite() or pico < 0 or pico != int(pico):
        raise ValueError("expected an amount of dollars such as 0.25")
    return int(pico)


def rent(value: Any) -> tuple[int, int]:
    """``0.80/h`` or ``0.0002/s`` to whole pico-dollars and the seconds they pay for."""
    amount, _, unit = str(value).strip().partition("/")
    spans = {"s": 1, "second": 1, "min": 60, "h": 3600, "hour": 3600, "day": 86_400, "month": 30 * 86_400}
    if unit.strip() not in spans:
        raise ValueError("expected dollars a time such as 0.80/h, 0.0002/s, 19/day or 400/month (30 days)")
    return dollars(amount), spans[unit.strip()]


def milliwatts(value: Any) -> int:
    """``65`` or ``12.5`` watts to whole milliwatts."""
    try:
        milli = Decimal(str(value).strip()) * 1000
    except InvalidOperation as error:
        raise ValueError("expected watts such as 65 or 12.5") from error
    if isinstance(value, bool) or not milli.is_finite() or milli < 0 or milli != int(milli):
        raise ValueError("expected watts such as 65 or 12.5, with at most three decimals")
    return int(milli)


def names(value: Any) -> tuple[str, ...]:
    """A list of names, or names separated by commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError("expected a list of names, or names separated by commas")
    return tuple(part.strip() for part in parts if part.strip())


def some_of(*words: str) -> Callable[[Any], tuple[str, ...]]:
    """A parser of lists of these words."""

    def parse(value: Any) -> tuple[str, ...]:
        found = names(value)
        if any(name not in words for name in found):
            raise ValueError(f"expected some of {', '.join(words)}")
        return found

    return parse


def one_of(*words: str) -> Callable[[Any], str]:
    """A parser that takes exactly these words."""

    def parse(value: Any) -> str:
        if value not in words:
            raise ValueError(f"expected one of {', '.join(words)}")
        return str(value)

    return parse


def flat(table: Mapping[str, Any], known: Iterable[str], above: str = "") -> dict[str, Any]:
    """A TOML table by dotted key. A table that is no section of the known keys stays whole."""
    names = list(known)
    found: dict[str, Any] = {}
    for name, value in table.items():
        key = above + name
        section = isinstance(value, dict) and any(each.startswith(key + ".") for each in names)
        found |= flat(value, names, key + ".") if section else {key: value}
    return found
