"""What fits, said before anything is loaded: context and concurrency of a model on this machine, and why."""

import msgspec

from galley.errors import ConfigError
from galley.model.families import spec_from_gguf
from galley.model.gguf import GGUF
from galley.model.store import Entry
from galley.providers.opened import BLOCK, EngineOptions, memory_available
from galley.runtime.backend import native_missing
from galley.runtime.memory import TYPICAL, kv_bytes_per_token, plan_memory, size

__all__ = ["Fit", "plan_fit"]


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """A model's memory on this machine, without having loaded it. All in bytes or tokens.

    Attributes:
        at_once: jobs that fit at the same time, by the tokens that each may hold.
        fits: whether at least one full context fits beside the weights.
        why: the arithmetic in words, one line each.
    """

    model: str
    weight_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    kv_bytes: int
    context: int
    model_context: int
    available: int | None
    at_once: dict[int, int]
    fits: bool
    why: list[str]

    @property
    def total_bytes(self) -> int:
        """Weights and KV cache."""
        return self.weight_bytes + self.kv_bytes


def plan_fit(entry: Entry, options: EngineOptions, *, available: int | None) -> Fit:
    """Read the file's header and do what opening it would do. O(header).

    The same arithmetic as at loading (``runtime.memory.plan_memory``); memory that weights take is what the
    kernels' packed copy needs, about the file's size, or four bytes a weight in the reference backend.

    Args:
        available: bytes free; None asks the system.

    Raises BadModelFile, ConfigError.
    """
    with GGUF.open(entry.path) as gguf:
        spec = spec_from_gguf(gguf)
    native = options.backend != "reference" and native_missing() is None
    weights = entry.path.stat().st_size
    if not native:
        weights += 4 * (spec.linear_params + spec.vocab * spec.hidden)
    kind = options.kv_type if native else "f32"
    per_token = kv_bytes_per_token(spec, kind)
    free = memory_available() if available is None else available
    if free is None and options.kv_memory is None:
        raise ConfigError("This system does not tell how much memory is free.", param="engine.kv_memory")
    room = max(0, (free or 0) - weights)
    plan = plan_memory(
        spec, per_token, BLOCK, available=room, limit=options.kv_memory, max_jobs=options.max_jobs
    )
    tokens = plan.num_blocks * BLOCK
    context = min(options.context or spec.context, spec.context, tokens)
    at_once = {
        length: min(options.max_jobs, tokens // (-(-length // BLOCK) * BLOCK))
        for length in sorted({512, TYPICAL, 8192, context})
        if length <= context
    }
    beside = free is None or weights + plan.kv_bytes <= free
    why = [
        f"weights take {size(weights)}"
        + ("" if free is None else f" of the {size(free)} available, which leaves {size(room)}"),
        f"KV cache {plan.explanation}",
        f"a token takes {size(per_token)}: {spec.layers} layers x 2 x {spec.kv_rows} values in {kind}",
    ]
    if context < spec.context:
        why.append(f"context {context} of the model's {spec.context} tokens")
    if not beside:
        why.append(
            f"together {size(weights + plan.kv_bytes)}: more than there is; give a smaller --kv-memory"
        )
    return Fit(
        model=entry.name,
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        kv_tokens=tokens,
        kv_bytes=plan.kv_bytes,
        context=context,
        model_context=spec.context,
        available=free,
        at_once=at_once,
        fits=beside and tokens >= context,
        why=why,
    )
