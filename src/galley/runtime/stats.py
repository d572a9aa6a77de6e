"""EngineStats: the engine's gauges and totals at a glance."""

import msgspec

from galley.kv.figures import DiskStats
from galley.runtime.cost import Forecast
from galley.runtime.scheduler import Scheduler

__all__ = ["EngineStats"]


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot: gauges, then totals since start. Fields may be one step apart from each other."""

    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    blocks_used: int
    draining: bool
    steps: int
    computed_tokens: int
    recomputed_tokens: int
    prompt_tokens: int
    generation_tokens: int
    cache_query_tokens: int
    cache_hit_tokens: int
    evictions: int
    preemptions: int
    finished: int
    faults: int
    violations: int
    context: int
    block_size: int
    forecast: Forecast
    """Of the steps run under a cost model."""
    disk: DiskStats | None = None
    """The disk tier; None when there is none."""
    disk_hit_tokens: int = 0
    """Prompt tokens that came back from disk."""

    @classmethod
    def of(
        cls,
        scheduler: Scheduler,
        *,
        inbox: int,
        draining: bool,
        faults: int,
        violations: int,
        disk: DiskStats | None = None,
        disk_hit_tokens: int = 0,
        forecast: Forecast,
    ) -> "EngineStats":
        """Read them; cheap, and safe beside a running engine thread."""
        counters, pool = scheduler.counters, scheduler.pool
        return cls(
            running=len(scheduler.running),
            waiting=len(scheduler.queue) + inbox,
            blocks_total=pool.size,
            blocks_free=pool.free,
            blocks_cached=pool.idle,
            blocks_used=pool.in_use,
            draining=draining,
            steps=counters.steps,
            computed_tokens=counters.computed_tokens,
            recomputed_tokens=counters.recomputed_tokens,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            cache_query_tokens=counters.cache_query_tokens,
            cache_hit_tokens=counters.cache_hit_tokens,
            evictions=scheduler.tree.evictions,
            preemptions=counters.preemptions,
            finished=counters.finished,
            faults=faults,
            violations=violations,
            context=scheduler.admission.room,
            block_size=scheduler.block_size,
            disk=disk,
            disk_hit_tokens=disk_hit_tokens,
            forecast=msgspec.structs.replace(forecast),
        )
