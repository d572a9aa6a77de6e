"""A scheduler made to a backend's measure."""

from collections.abc import Callable, Mapping
from functools import partial

from galley.errors import ConfigError
from galley.runtime.backend.base import Backend
from galley.runtime.cost import CostModel
from galley.runtime.fairness import Fairness
from galley.runtime.journal import Journal, Recorded
from galley.runtime.meter import Costs
from galley.runtime.policy import Policy
from galley.runtime.scheduler import Scheduler

__all__ = ["build_scheduler"]


def build_scheduler(
    backend: Backend,
    *,
    eos_ids: tuple[int, ...] | frozenset[int],
    token_budget: int,
    max_jobs: int,
    max_queue: int,
    context: int | None,
    model_key: str = "",
    chunk: int | None = None,
    policy: Policy | None = None,
    max_wait_s: float | None = None,
    weights: Mapping[str, float] | None = None,
    journal: Journal | None = None,
    cost: CostModel | None = None,
    adapters: int = 8,
) -> Scheduler:
    """A scheduler of the backend's sizes.

    ``context=None`` is the model's own, or what the KV pool holds where that is less. Raises ConfigError when
    an explicit context is more than either.
    """
    spec = backend.spec
    most = min(spec.context, backend.num_blocks * backend.block_size)
    if context is not None and not 1 <= context <= most:
        raise ConfigError(
            f"a context of {context} tokens is not within 1..{most} (model: {spec.context}, "
            f"KV memory: {backend.num_blocks * backend.block_size})",
            param="engine.context",
        )
    make: Callable[..., Scheduler] = Scheduler if journal is None else partial(Recorded, journal)
    return make(
        num_blocks=backend.num_blocks,
        block_size=backend.block_size,
        vocab=spec.vocab,
        context=context or most,
        eos=frozenset(eos_ids),
        token_budget=token_budget,
        chunk=chunk,
        max_jobs=max_jobs,
        max_queue=max_queue,
        max_wait_s=max_wait_s,
        model_key=f"{model_key}/{backend.fingerprint}",
        policy=policy,
        fairness=Fairness(weights=weights),
        costs=Costs.of(
            spec, weight_bytes=backend.weight_bytes, kv_bytes_per_token=backend.kv_bytes_per_token
        ),
        cost=cost,
        adapters=adapters,
    )
