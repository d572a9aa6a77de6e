"""What one job cost: counts, times and modelled use of the machine."""

from typing import TYPE_CHECKING

import msgspec

from galley.model.spec import ModelSpec

if TYPE_CHECKING:
    from galley.runtime.job import Job

__all__ = ["Costs", "Counters", "JobMeter"]


class JobMeter(msgspec.Struct, kw_only=True):
    """Filled in by the scheduler alone; handed out once, on the job's last StepOut.

    Times are seconds of the engine's monotonic clock, None for what never happened.

    Attributes:
        cached_tokens: prompt tokens found in the prefix cache at the first admission.
        cache_write_tokens: prompt tokens this job published for others.
        cache_ends: explicit breakpoints: prompt tokens before each, and seconds to keep them.
        computed_tokens: positions run through the model, recomputation included.
        recomputed_tokens: positions run again after a preemption.
        prefill_flop: of every position that was not a decode step (recomputation included): 2 per weight of
            the layers' matrices, 4·layers·heads·head_dim per attended position, 2 per weight of the LM head
            where logits were made.
        decode_bytes: of every decode step, the job's equal share of the weights read, plus the KV read.
        kv_byte_seconds: bytes of all blocks in the job's table over wall time. A shared block is charged in
            full to each holder: it says what the job needed, not what sharing saved.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    cache_ends: tuple[tuple[int, int], ...] = ()
    completion_tokens: int = 0
    arrived: float = 0.0
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None
    itl_max_s: float | None = None
    steps: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    prefill_flop: float = 0.0
    decode_bytes: float = 0.0
    kv_byte_seconds: float = 0.0
    peak_blocks: int = 0

    def drew(self, now: float, count: int = 1) -> bool:
        """Count output tokens that came together; whether they are the first."""
        self.completion_tokens += count
        before, self.last_token = self.last_token, now
        if before is None:
            self.first_token = now
            return True
        self.itl_max_s = max(self.itl_max_s or 0.0, now - before)
        return False


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """The model's constants behind ``JobMeter``; zeros (the default) switch the modelled figures off."""

    token_flop: float = 0.0
    """Per computed position, without attention and head."""
    attention_flop: float = 0.0
    """Per computed position and attended position."""
    head_flop: float = 0.0
    """Per row of logits."""
    weight_bytes: float = 0.0
    kv_bytes_per_token: float = 0.0

    @classmethod
    def of(cls, spec: ModelSpec, *, weight_bytes: int, kv_bytes_per_token: int) -> "Costs":
        """Constants of a dense decoder."""
        return cls(
            token_flop=2.0 * spec.linear_params,
            attention_flop=4.0 * spec.layers * spec.heads * spec.head_dim,
            head_flop=2.0 * spec.vocab * spec.hidden,
            weight_bytes=float(weight_bytes),
            kv_bytes_per_token=float(kv_bytes_per_token),
        )

    def prefill(self, context: int, count: int, *, outputs: int) -> float:
        """FLOP of ``count`` positions after ``context`` computed ones."""
        attended = count * context + count * (count + 1) // 2
        return self.token_flop * count + self.attention_flop * attended + self.head_flop * outputs

    def hold(self, job: "Job", block_size: int, now: float) -> None:
        """Charge the blocks in the job's table up to now."""
        held, meter = len(job.table.blocks), job.meter
        meter.kv_byte_seconds += held * block_size * self.kv_bytes_per_token * (now - job.accounted_at)
        job.accounted_at = now
        meter.peak_blocks = max(meter.peak_blocks, held)

    def step(
        self,
        job: "Job",
        count: int,
        *,
        share: float,
        outputs: int,
        counters: "Counters",
        block_size: int,
        now: float,
    ) -> None:
        """Charge one step of ``count`` tokens that has just advanced ``job.computed``, and ``hold``.

        ``share`` is the job's part of the weight bytes the step read, ``outputs`` its rows of logits.
        """
        end, known, meter = job.computed, len(job.tokens), job.meter
        start = end - count
        meter.steps += 1
        meter.computed_tokens += count
        if start < job.reached:
            redone = min(end, job.reached) - start
            meter.recomputed_tokens += redone
            counters.recomputed_tokens += redone
        job.reached = max(job.reached, end)
        held = len(job.table.blocks)
        meter.kv_byte_seconds += held * block_size * self.kv_bytes_per_token * (now - job.accounted_at)
        job.accounted_at = now
        meter.peak_blocks = max(meter.peak_blocks, held)
        if count == 1 and end == known > job.prompt_len:
            meter.decode_bytes += share + end * self.kv_bytes_per_token
        else:
            meter.prefill_flop += self.prefill(start, count, outputs=outputs)


class Counters(msgspec.Struct):
    """Running totals since start; other threads may read single fields."""

    steps: int = 0
    rows: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cache_query_tokens: int = 0
    cache_hit_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
