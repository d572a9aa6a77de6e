"""What somebody wants to buy: how much work, by when, within which limits."""

import msgspec

__all__ = ["Need"]


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of work for one unit of capacity. Money is whole pico-dollars, time whole Unix seconds.

    Attributes:
        model: the logical model it needs.
        input, cached, output: tokens it is expected to read, to find cached (of ``input``), and to produce.
        seconds: unit-seconds of work, where it is measured so; then tokens play no part.
        deadline: when it must be done; None has none, and it is never put off.
        max_pico: most it may cost in all; None for no limit.
        max_ttft_ms: slowest first token it bears.
        regions: where it may run; empty is anywhere.
        steady: it takes no capacity that can be taken away.
        drain_s: seconds it needs to leave a unit with nothing lost.
        redo_s: most seconds of work that are lost when it has less than that.
    """

    model: str
    input: int = 0
    cached: int = 0
    output: int = 0
    seconds: int = 0
    deadline: int | None = None
    max_pico: int | None = None
    max_ttft_ms: int | None = None
    regions: frozenset[str] = frozenset()
    steady: bool = False
    drain_s: int = 0
    redo_s: int = 0
