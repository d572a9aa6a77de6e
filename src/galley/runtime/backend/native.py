"""The native backend: C++ kernels chosen at run time, one call a step."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from galley.errors import ConfigError, EngineFault
from galley.model.spec import ModelSpec
from galley.runtime.plan import Drawn, Draws, Rows
from galley.runtime.processors import Processors

if TYPE_CHECKING:
    from galley.model.adapter import Adapter
    from galley.model.gguf import GGUF

KERNEL_REVISION = 6
"""Raised whenever a kernel, layout or reduction order changes the bits of a result, or what a step costs
(measured costs are kept by it)."""


class NativeBackend:
    """CPU kernels over repacked weights, with a paged f16 KV arena. Satisfies ``Backend``.

    Weights are repacked at construction into the layouts of ``native/kernels.hpp`` (16 rows interleaved); the
    embedding rows stay in the GGUF mapping, so ``gguf`` must stay open while the backend lives. Activations
    of quantised matrices are int8 with one scale per 16 values.

    Args:
        threads: None takes what ``Processors.threads`` chooses.
        num_blocks: KV blocks of 16 tokens. The arena is reserved at once and touched only as it is used.
        kv: ``f16``, or ``int8`` with one scale per token and kv head: half the memory and half the bytes that
            a long context reads, at a small cost in accuracy (docs/ACCURACY.md).
        isa: force one of ``avx512-vnni``, ``avx512vl-vnni``, ``avx2-vnni`` and ``avx2`` (x86-64),
            ``neon-dotprod`` (arm64) or ``portable``; None takes the best this processor has.

    Raises:
        ConfigError: ``isa`` unknown or not available here.
        ImportError: the extension was not built.
        ValueError: a tensor is missing or of a shape the kernels cannot take.
    """

    name = "native"
    block_size = 16

    def __init__(
        self,
        gguf: "GGUF",
        spec: ModelSpec,
        *,
        threads: int | None,
        num_blocks: int,
        isa: str | None = None,
        kv: str = "f16",
    ) -> None:
        from galley import _native

        available: list[str] = _native.isa_available()
        if isa is not None and isa not in available:
            raise ConfigError(
                f"instruction set {isa!r} is not available on this processor; it has: {', '.join(available)}",
                param="isa",
            )
        self.isa = isa or available[0]
        self.threads = threads if threads is not None else Processors.read().threads().count
        self.spec = spec
        self.num_blocks = num_blocks
        tensors: dict[str, tuple[int, int, int, npt.NDArray[np.uint8]]] = {}
        for name, info in gguf.tensors.items():
            rows, cols = (1, info.shape[0]) if len(info.shape) == 1 else (info.shape[0], info.shape[-1])
            tensors[name] = (int(info.type), rows, cols, gguf.raw(name))
        shape: dict[str, Any] = {
            name: getattr(spec, name)
            for name in (
                "layers",
                "hidden",
                "ffn",
                "heads",
                "kv_heads",
                "head_dim",
                "vocab",
                "rms_eps",
                "rope_base",
                "rope_scale",
                "rope_dim",
                "rope_interleaved",
                "qkv_bias",
                "qk_norm",
            )
        }
        shape["rope_factors"] = list(spec.rope_factors or ())
        self._model = _native.Model(shape, tensors, self.isa, self.threads, num_blocks, kv)
        self.weight_bytes = int(self._model.weight_bytes)
        self.kv_bytes_per_token = int(self._model.kv_bytes_per_token)
        self.block_bytes = int(self._model.block_bytes)
        self.kv_dtype = kv
        self.fingerprint = f"native-{KERNEL_REVISION}-{self.isa}-kv{kv}"

    def run(self, rows: Rows) -> None:
        """One forward step. See ``Backend.run``."""
        try:
            self._model.step(
                rows.tokens,
                rows.seq_start,
                rows.context,
                rows.blocks,
                rows.block_start,
                rows.out,
                rows.states,
                rows.adapters,
            )
        except (ValueError, RuntimeError, MemoryError) as e:
            raise EngineFault(f"native step failed: {e}") from e

    def sample(self, draws: Draws) -> Drawn:
        """Draw one token per output row. See ``Backend.sample``."""
        d = draws
        try:
            ids, logprobs, ranks, tops = self._model.sample(
                d.temperature,
                d.top_k,
                d.top_p,
                d.min_p,
                d.repetition,
                d.frequency,
                d.presence,
                d.seed,
                d.position,
                d.lane,
                d.logprobs,
                d.given,
                d.bias_start,
                d.bias_ids,
                d.bias_values,
                d.ban_start,
                d.ban_ids,
                d.seen_start,
                d.seen_ids,
                d.seen_counts,
                d.mask_row,
                d.masks,
            )
        except (ValueError, RuntimeError, MemoryError) as e:
            raise EngineFault(f"native sampling failed: {e}") from e
        return Drawn(ids, logprobs, ranks, tops)

    def logits(self) -> npt.NDArray[np.float32]:
        """Copy of the last step's logits, float32 [outputs, vocab]."""
        out = np.empty((self._model.outputs, self.spec.vocab), np.float32)
        self._model.logits(out)
        return out

    def place_adapter(self, slot: int, adapter: "Adapter | None") -> None:
        """See ``Backend.place_adapter``."""
        try:
            self._model.set_adapter(slot, {} if adapter is None else adapter.pairs)
        except (ValueError, RuntimeError, MemoryError, TypeError) as e:
            raise EngineFault(f"placing an adapter failed: {e}") from e

    def states(self) -> npt.NDArray[np.float32]:
        """See ``Backend.states``."""
        out = np.empty((self._model.states_count, self.spec.hidden), np.float32)
        self._model.states(out)
        return out

    def read_block(self, block: int) -> bytes:
        """See ``Backend.read_block``."""
        try:
            raw: bytes = self._model.read_block(block)
        except (ValueError, RuntimeError, MemoryError) as e:
            raise EngineFault(f"reading a KV block failed: {e}") from e
        return raw

    def write_block(self, block: int, data: bytes | memoryview) -> None:
        """See ``Backend.write_block``."""
        try:
            self._model.write_block(block, np.frombuffer(data, np.uint8))
        except (ValueError, RuntimeError) as e:
            raise EngineFault(f"writing a KV block failed: {e}") from e

    def close(self) -> None:
        """Free weights and KV. Idempotent."""
        self._model.close()
