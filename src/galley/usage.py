"""What a request took: tokens, time and the machine. Parts of a receipt, named from ``galley.types``."""

import msgspec

__all__ = ["Money", "Resources", "Times", "Usage"]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts. ``prompt_tokens`` includes ``cached_tokens`` (the OpenAI convention)."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_ttl: dict[str, int] = {}
    """Of the cache-write tokens, those before an explicit breakpoint, by its lifetime (``5m``, ``1h``)."""
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, measured on a monotonic clock."""

    queue_s: float = 0.0
    """Arrival to first scheduled step."""
    prefill_s: float = 0.0
    """First scheduled step to first token."""
    decode_s: float = 0.0
    """First token to last token."""
    ttft_s: float | None = None
    itl_mean_s: float | None = None
    itl_max_s: float | None = None
    total_s: float = 0.0


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """What the request used of the machine. Modelled from counts, not sampled; see docs/DESIGN.md."""

    computed_tokens: int = 0
    """Positions run through the model, recomputation included."""
    recomputed_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    prefill_flop: float = 0.0
    decode_bytes: float = 0.0
    """Weight bytes (this request's share of each step) plus KV bytes read while decoding."""
    kv_byte_seconds: float = 0.0
    joules: float | None = None


class Money(msgspec.Struct, frozen=True, kw_only=True):
    """What it cost, as entered in the ledger. Whole pico-dollars (1e-12 USD)."""

    txn: str
    """Id of the settling transaction."""
    cost_pico: int
    """What the providers charge, attempts that did not serve included; the sum of the price lines."""
    revenue_pico: int
    """What the tenant is charged."""
    saved_pico: dict[str, int] = {}
    """Against named counterfactuals: ``cache``, ``route``, ``batch``, ``speculation``."""
    scopes: list[str] = []
    """Where it is counted."""
    plan: str | None = None
    warnings: list[str] = []
    """Soft limits that it crosses."""
    left_pico: int | None = None
    """Least money left in a hard limit when it was let in, all worst cases taken off; None without one."""
    late: bool = False
    """The ledger could not be written when it began; it was entered as a whole afterwards."""
