"""When requests come: drawn from a Poisson process, or read from a trace."""

import math
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec

from galley.errors import ConfigError

__all__ = ["Arrival", "poisson", "read_trace"]


class Arrival(msgspec.Struct, frozen=True):
    """One request of a trace. Lengths that the trace does not give are the workload's."""

    at: float
    """Seconds after the start."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None


def poisson(rate: float, count: int, seed: int) -> Iterator[Arrival]:
    """``count`` arrivals at ``rate`` a second, gaps exponentially distributed; the first comes after a gap.

    The same arguments give the same times. Raises ConfigError for a rate that is not above zero.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise ConfigError(f"an arrival rate of {rate} requests a second is none", param="rate")
    noise, at = random.Random(seed), 0.0
    for _ in range(count):
        at += noise.expovariate(rate)
        yield Arrival(at)


def read_trace(path: Path) -> list[Arrival]:
    """Arrivals from a JSON Lines file: ``{"at": seconds, "prompt_tokens": n, "output_tokens": m}`` a line.

    Both lengths may be left out. Raises ConfigError naming the line: not such an object, a time that is
    negative or before the one above, a length below 1.
    """
    found: list[Arrival] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the trace {path} cannot be read: {error}", param="trace") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            arrival = msgspec.json.decode(line, type=Arrival)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}, line {number}: {error}", param="trace") from error
        lengths = [n for n in (arrival.prompt_tokens, arrival.output_tokens) if n is not None]
        if not 0.0 <= arrival.at < 1e9 or (found and arrival.at < found[-1].at):
            problem = f"the time {arrival.at} is negative or before that of the line above"
            raise ConfigError(f"{path}, line {number}: {problem}", param="trace")
        if any(n < 1 for n in lengths):
            raise ConfigError(f"{path}, line {number}: a length is below 1", param="trace")
        found.append(arrival)
    if not found:
        raise ConfigError(f"the trace {path} holds no arrival", param="trace")
    return found
