"""The Backend seam: where a step's flat arrays become logits and tokens."""

from typing import TYPE_CHECKING, Protocol

from galley.model.spec import ModelSpec
from galley.runtime.plan import Drawn, Draws, Rows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from galley.model.adapter import Adapter


class Backend(Protocol):
    """One loaded model with its KV arena on one device.

    Deterministic and batch-invariant: a row's logits depend on its own tokens and positions only, bit for
    bit, never on its batch mates, on chunk borders or on where its blocks lie (SMP-6).

    Not thread-safe: one thread calls ``run`` and ``sample``, alternately.
    """

    name: str
    """``native`` or ``reference``."""
    isa: str
    """Instruction set chosen, e.g. ``avx512-vnni``; ``numpy`` for the reference."""
    threads: int
    spec: ModelSpec
    block_size: int
    """Tokens in a KV block (16)."""
    num_blocks: int
    kv_bytes_per_token: int
    block_bytes: int
    """Raw bytes of one KV block, all layers, as ``read_block`` gives them."""
    kv_dtype: str
    """Of the arena, e.g. ``f16``."""
    weight_bytes: int
    """Bytes of weights read by a one-token step (embedding row excluded, LM head included)."""
    fingerprint: str
    """Changes when kernels, layouts or numerics change; part of ``system_fingerprint`` and KV keys."""

    def run(self, rows: Rows) -> None:
        """One forward step: writes KV of all tokens, keeps logits of ``rows.out`` for ``sample``/``logits``
        and the states of ``rows.states``.

        Raises EngineFault when the native step fails; KV blocks of the step are then undefined.
        """
        ...

    def sample(self, draws: Draws) -> Drawn:
        """Draw one token for each output row of the last ``run``; ``len(draws) == len(rows.out)``."""
        ...

    def logits(self) -> "npt.NDArray[np.float32]":
        """Copy of the last run's logits, float32 [len(rows.out), vocab]. For tests and evaluation."""
        ...

    def place_adapter(self, slot: int, adapter: "Adapter | None") -> None:
        """Put an adapter's weights into a slot, copied, for the steps to come; None empties it.

        Raises EngineFault when they do not fit the model.
        """
        ...

    def states(self) -> "npt.NDArray[np.float32]":
        """Copy of the last run's hidden states after the final norm, float32 [len(rows.states), hidden]."""
        ...

    def read_block(self, block: int) -> bytes:
        """Copy of one block's raw KV, ``block_bytes`` long; only this backend's fingerprint can use it.

        Between steps only. Raises EngineFault for a block outside the arena.
        """
        ...

    def write_block(self, block: int, data: "bytes | memoryview") -> None:
        """Put back what ``read_block`` gave, bit for bit, into any block. Between steps only.

        Raises EngineFault for a block outside the arena or data of another size.
        """
        ...

    def close(self) -> None:
        """Free weights and KV. Idempotent."""
        ...
