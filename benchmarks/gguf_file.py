"""GGUF files, written tensor by tensor so that a model larger than memory would do."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gguf
import numpy as np

from benchmarks.random_llama import Floats, RandomLlama
from galley.model.quant.blocks import GGMLType, quantize, tensor_nbytes

__all__ = ["GgufFile"]

_FILE_TYPES = {GGMLType.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0, GGMLType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0}


class GgufFile:
    """One file being written; it appears under its name only when it is whole.

    Matrices are quantised by Galley's encoder, whose bytes equal those of ggml's. The tied embedding and head
    stay Q8_0, as ``llama-quantize`` keeps them; norms are float32.
    """

    def __init__(self, path: Path, model: RandomLlama, kind: GGMLType, tokenizer: gguf.GGUFReader) -> None:
        """``tokenizer``: a file whose ``tokenizer.*`` keys are copied. Raises ValueError for other types."""
        if kind not in _FILE_TYPES:
            raise ValueError(f"{kind.name} is not one of {', '.join(k.name for k in _FILE_TYPES)}")
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path.with_suffix(".partial")
        self._types = {name: self._type(name, shape, kind) for name, shape in model.shapes().items()}
        self._writer = writer = gguf.GGUFWriter(self._partial, "llama")
        writer.add_name(f"{model.name} {kind.name}")
        writer.add_file_type(_FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(model.context)
        writer.add_embedding_length(model.hidden)
        writer.add_block_count(model.layers)
        writer.add_feed_forward_length(model.ffn)
        writer.add_head_count(model.heads)
        writer.add_head_count_kv(model.kv_heads)
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)
        writer.add_rope_dimension_count(model.head_dim)
        writer.add_rope_freq_base(model.rope_theta)
        writer.add_layer_norm_rms_eps(model.norm_epsilon)
        writer.add_vocab_size(model.vocab)
        self._copy_tokenizer(tokenizer.fields)
        for name, shape in model.shapes().items():
            width = tensor_nbytes(self._types[name], shape[-1:])
            size = tensor_nbytes(self._types[name], shape)
            raw = gguf.GGMLQuantizationType(self._types[name])
            writer.add_tensor_info(name, (*shape[:-1], width), np.dtype(np.uint8), size, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()

    @staticmethod
    def _type(name: str, shape: tuple[int, ...], kind: GGMLType) -> GGMLType:
        if len(shape) == 1:
            return GGMLType.F32
        return GGMLType.Q8_0 if name == "token_embd.weight" else kind

    def _copy_tokenizer(self, fields: Mapping[str, Any]) -> None:
        for key, field in fields.items():
            if key.startswith("tokenizer."):
                inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                self._writer.add_key_value(key, field.contents(), field.types[0], inner)

    def add(self, name: str, values: Floats) -> None:
        """The next tensor of ``model.shapes()``."""
        kind = self._types[name]
        raw = values.view(np.uint8) if kind is GGMLType.F32 else quantize(values, kind)
        self._writer.write_tensor_data(raw)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if kind is None:
            self._partial.replace(self.path)
        else:
            self._partial.unlink()
