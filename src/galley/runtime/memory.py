"""What fits: how much memory the KV cache gets, said before anything is loaded."""

import msgspec

from galley.errors import ConfigError
from galley.model.spec import ModelSpec

__all__ = ["MemoryPlan", "kv_bytes_per_token", "plan_memory"]

SHARE = 0.5
"""Most of the available memory that the cache takes unasked: weights and others need some too."""
MOST_TOKENS = 2**31 - 1
"""Places in the cache are 32-bit numbers in a plan."""
TYPICAL = 2048
"""Tokens a running choice is expected to hold when nothing better is known."""


def kv_bytes_per_token(spec: ModelSpec, kv_type: str) -> int:
    """Bytes of one token's keys and values in all layers.

    ``f16`` and ``int8`` (with a float scale for a token's key and one for its value in each kv head) are the
    native arena's, ``f32`` is the reference's.
    """
    width = {"f16": 2, "int8": 1, "f32": 4}[kv_type]
    scales = 4 * spec.kv_heads if kv_type == "int8" else 0
    return spec.layers * 2 * (spec.kv_rows * width + scales)


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks of the KV arena, its bytes, and why so many, in words for a person."""

    num_blocks: int
    kv_bytes: int
    explanation: str


def plan_memory(
    spec: ModelSpec,
    kv_bytes_per_token: int,
    block_size: int,
    *,
    available: int,
    limit: int | None,
    max_jobs: int,
    total: int | None = None,
) -> MemoryPlan:
    """Size the KV arena.

    By default it holds one full context, or 2,048 tokens for each of ``max_jobs`` where that is more, but
    takes at most half of the ``available`` bytes. A ``limit`` in bytes is obeyed as given, up to the
    ``total`` that there is at all. Where less than a full context fits, the explanation says what context is
    left; nothing is cut silently.

    Raises ConfigError when not even one block fits, when there would be more than can be numbered, or more
    than ``total``.
    """
    block = kv_bytes_per_token * block_size
    wanted = -(-max(spec.context, max_jobs * TYPICAL) // block_size)
    if limit is not None:
        num_blocks = limit // block
        why = f"as asked ({size(limit)})"
        if available and num_blocks * block > available:
            why += f", more than the {size(available)} available now"
    else:
        num_blocks = min(wanted, int(available * SHARE) // block)
        if num_blocks < wanted:
            why = f"half of the {size(available)} available"
        elif spec.context >= max_jobs * TYPICAL:
            why = f"one full context of {spec.context} tokens"
        else:
            why = f"{TYPICAL} tokens for each of {max_jobs} jobs"
    if num_blocks < 1:
        raise ConfigError(
            f"no room for a KV cache: one block of {block_size} tokens takes {size(block)}, "
            + (f"the limit is {size(limit)}" if limit is not None else f"{size(available)} are available"),
            param="engine.kv_memory",
        )
    tokens = num_blocks * block_size
    if tokens > MOST_TOKENS:
        raise ConfigError(
            f"a KV cache of {size(num_blocks * block)} would hold {tokens} tokens; "
            f"{MOST_TOKENS} ({size(MOST_TOKENS // block_size * block)}) is the most that can be numbered",
            param="engine.kv_memory",
        )
    if total is not None and num_blocks * block > total:
        raise ConfigError(
            f"a KV cache of {size(num_blocks * block)} does not fit: this system has {size(total)} of memory",
            param="engine.kv_memory",
        )
    cut = (
        f"; context limited to {tokens} of the model's {spec.context} tokens" if tokens < spec.context else ""
    )
    return MemoryPlan(
        num_blocks=num_blocks,
        kv_bytes=num_blocks * block,
        explanation=f"{size(num_blocks * block)} for {tokens} tokens: {why}{cut}",
    )


def size(count: int) -> str:
    """Bytes for people, in powers of 1024."""
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if amount >= 100 or unit == "B" else f"{amount:.1f} {unit}"
