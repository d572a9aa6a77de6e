"""How close steps come to what the machine can do: bytes and operations a second against measured limits."""

from collections.abc import Iterable

import msgspec

from galley.bench.machine import Placement
from galley.bench.plot import Chart, Series
from galley.bench.stats import Spread, spread
from galley.errors import ConfigError
from galley.runtime.backend.base import Backend
from galley.runtime.probe import CostProbe

__all__ = ["Point", "blocks_for", "chart", "roofline"]

BATCH = 64
"""Up to so many tokens a step is a batch of sequences with one each; above, one prompt."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One size of step.

    Attributes:
        tokens: in the step; outputs: rows of logits in it.
        gb_s: the weights' bytes a second (as the kernels keep them), gop_s: two operations a weight and token
            in the matrices, attention left out; both of the median step.
        limit: ``memory`` or ``arithmetic``, whichever takes longer at the limits measured around the steps.
        share: the time the limit asks for, of the time taken.
    """

    tokens: int
    outputs: int
    seconds: Spread
    gb_s: float
    gop_s: float
    limit: str
    share: float
    read_gb_s: float
    int8_gop_s: float
    roundtrip_ns: float


def blocks_for(sizes: Iterable[int], block_size: int) -> int:
    """KV blocks that ``roofline`` needs."""
    return max(size if size <= BATCH else -(-size // block_size) for size in sizes)


def roofline(backend: Backend, sizes: Iterable[int], *, repeats: int) -> list[Point]:
    """Time steps of every size, with the machine's limits probed right before and after each.

    The bandwidth is that of reading a buffer as large as the weights, so that caches help both alike. The
    backend's blocks are overwritten. Raises ConfigError where the kernels that probe are not built.
    """
    probe = CostProbe(backend, range(backend.num_blocks))
    spec = backend.spec
    found = []
    for size in sizes:
        batch = size <= BATCH
        pieces = [(1, 0, 1)] * size if batch else [(size, 0, 1)]
        outputs = size if batch else 1
        probe.time(pieces)
        before = _limits(backend)
        seconds = spread(probe.time(pieces) for _ in range(repeats))
        after = _limits(backend)
        read = (before.read_gb_s + after.read_gb_s) / 2
        peak = (before.int8_gop_s + after.int8_gop_s) / 2
        gb = backend.weight_bytes / 1e9
        gop = 2 * (spec.linear_params * size + spec.vocab * spec.hidden * outputs) / 1e9
        found.append(
            Point(
                tokens=size,
                outputs=outputs,
                seconds=seconds,
                gb_s=gb / seconds.median,
                gop_s=gop / seconds.median,
                limit="memory" if gb / read > gop / peak else "arithmetic",
                share=max(gb / read, gop / peak) / seconds.median,
                read_gb_s=read,
                int8_gop_s=peak,
                roundtrip_ns=(before.roundtrip_ns + after.roundtrip_ns) / 2,
            )
        )
    return found


def _limits(backend: Backend) -> Placement:
    megabytes = max(1.0, backend.weight_bytes / 1e6)
    limits = Placement.probe(backend.threads, seconds=0.2, megabytes=megabytes)
    if limits is None:
        raise ConfigError("the limits are probed by the native kernels, which are not built here")
    return limits


def chart(points: list[Point], title: str) -> Chart:
    """Achieved operations a second under the roof."""
    roof = [(float(p.tokens), p.gop_s / p.share) for p in points]
    return Chart(
        title=title,
        x="tokens in the step",
        y="GOP/s",
        log_x=True,
        log_y=True,
        series=[
            Series("limit", roof, dashed=True),
            Series("achieved", [(float(p.tokens), p.gop_s) for p in points]),
        ],
    )
