"""Low-rank adapters (LoRA, Hu et al. 2021) on disk: PEFT folders, and GGUF files as llama.cpp makes them.

``W x`` becomes ``W x + s B (A x)``, with ``s`` = alpha / rank, or alpha / sqrt(rank) for rsLoRA
(Kalajdzievski 2023). What an adapter asks beyond that is refused by name; nothing of it is left out.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from galley.errors import AdapterRefused, BadModelFile
from galley.model.gguf import GGUF
from galley.model.quant.blocks import dequantize
from galley.model.safetensors import Safetensors
from galley.model.spec import ModelSpec

__all__ = ["Adapter"]

Floats = npt.NDArray[np.float32]

PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Linear maps that can be adapted, by their names in transformers and in GGUF."""
PEFT_NAME = re.compile(
    r"base_model\.model\.(?:model\.)?layers\.(\d+)\.([a-z_]+\.[a-z_]+)\.lora_([AB])(?:\.[^.]+)?\.weight"
)
GGUF_NAME = re.compile(r"blk\.(\d+)\.([a-z_]+)\.weight\.lora_([ab])")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (None, False),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "megatron_config": (None,),
    "corda_config": (None,),
    "velora_config": (None,),
}
"""Keys of ``adapter_config.json`` that ask for more than ``s B A``, and the values with which they do not."""
SPLIT_BASES = ("pissa", "olora", "corda")
"""Initialisations that change the base weights too, unless the adapter was converted when saved."""


class Adapter:
    """One adapter, checked against a model's shape. Immutable.

    Attributes:
        name: what requests call it. path: where it came from.
        digest: sha256 of its files, hex.
        rank: the largest of its ranks.
        pairs: by GGUF tensor without ``.weight``: A float32 [rank, in] and B float32 [out, rank], the scale
            in B, rows in the order of the model's own.
        nbytes: of all pairs.
    """

    def __init__(
        self, name: str, path: Path, digest: str, pairs: Mapping[str, tuple[Floats, Floats]]
    ) -> None:
        self.name = name
        self.path = path
        self.digest = digest
        self.pairs = dict(pairs)
        self.rank = max(len(a) for a, _ in pairs.values())
        self.nbytes = sum(a.nbytes + b.nbytes for a, b in pairs.values())

    @property
    def key(self) -> str:
        """Name and revision, for the keys of its KV (LRA-2, KV-5)."""
        return f"{self.name}@{self.digest}"

    @classmethod
    def open(cls, path: Path, name: str, spec: ModelSpec, *, max_rank: int) -> "Adapter":
        """Read a PEFT folder or a GGUF file. O(its bytes).

        Raises AdapterRefused for what is no adapter of this model or asks for more than is done here,
        BadModelFile for a damaged file.
        """
        reader = Reader(path, spec, max_rank)
        found = reader.gguf() if path.suffix == ".gguf" else reader.peft()
        if not found:
            raise AdapterRefused(f"{path}: the adapter has no tensors.")
        return cls(name, path, reader.digest(), found)


class Reader:
    """Reads one adapter for one shape of model."""

    def __init__(self, path: Path, spec: ModelSpec, max_rank: int) -> None:
        self.path = path
        self.spec = spec
        self.max_rank = max_rank
        self._files: list[Path] = []
        self._shapes = {
            "attn_q": (spec.q_rows, spec.hidden),
            "attn_k": (spec.kv_rows, spec.hidden),
            "attn_v": (spec.kv_rows, spec.hidden),
            "attn_output": (spec.hidden, spec.q_rows),
            "ffn_gate": (spec.ffn, spec.hidden),
            "ffn_up": (spec.ffn, spec.hidden),
            "ffn_down": (spec.hidden, spec.ffn),
        }

    def digest(self) -> str:
        """sha256 over the files read, each with its length."""
        found = hashlib.sha256()
        for file in self._files:
            data = file.read_bytes()
            found.update(len(data).to_bytes(8, "little") + data)
        return found.hexdigest()

    def peft(self) -> dict[str, tuple[Floats, Floats]]:
        """``adapter_config.json`` and ``adapter_model.safetensors`` of a folder."""
        place = self.path / "adapter_config.json"
        self._files = [place, self.path / "adapter_model.safetensors"]
        try:
            config: Any = json.loads(place.read_bytes())
        except OSError as error:
            hint = "an adapter is a PEFT folder, or a .gguf file"
            raise AdapterRefused(f"{place}: {error.strerror}", hint=hint) from error
        except (ValueError, RecursionError) as error:
            raise BadModelFile(str(place), "file", f"is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise BadModelFile(str(place), "file", "is not an object")
        if config.get("peft_type") != "LORA":
            raise self._refuse(f"peft_type {config.get('peft_type')!r} is not LORA")
        for key, neutral in NEUTRAL.items():
            if config.get(key) not in neutral:
                raise self._refuse(f"{key} = {str(config[key])[:80]!r} is not supported")
        start = config.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(SPLIT_BASES):
            raise self._refuse(f"init_lora_weights = {start[:40]!r} has changed the base weights as well")
        alpha, rank = config.get("lora_alpha", 8), config.get("r", 8)
        for key, value in (("lora_alpha", alpha), ("r", rank)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
                raise BadModelFile(str(place), key, f"{value!r} is no positive number")
        rooted = config.get("use_rslora") is True
        file = Safetensors(self._files[1])
        found: dict[str, dict[str, Floats]] = {}
        for tensor in file.names:
            match = PEFT_NAME.fullmatch(tensor)
            if match is None or match[2] not in PLACES:
                raise self._refuse(f"the tensor {tensor[:120]!r} adapts what cannot be adapted here")
            found.setdefault(f"blk.{int(match[1])}.{PLACES[match[2]]}", {})[match[3].lower()] = file.array(
                tensor
            )
        return self._pairs(
            found,
            lambda own: alpha / math.sqrt(own) if rooted else alpha / own,
            interleave=self.spec.rope_interleaved,
        )

    def gguf(self) -> dict[str, tuple[Floats, Floats]]:
        """A GGUF file of type ``adapter``; its rows are in the model's order already."""
        self._files = [self.path]
        with GGUF.open(self.path) as file:
            said = file.metadata
            kind = said.get("general.type"), said.get("adapter.type")
            if kind != ("adapter", "lora"):
                raise self._refuse(f"it is a GGUF of type {kind[0]!r}, {kind[1]!r}, not a LoRA adapter")
            if said.get("general.architecture") != self.spec.arch:
                arch = said.get("general.architecture")
                raise self._refuse(f"it is for {arch!r}, the model is {self.spec.arch!r}")
            if "adapter.alora.invocation_tokens" in said:
                raise self._refuse("activated LoRA (invocation tokens) is not supported")
            alpha = said.get("adapter.lora.alpha", 0.0)
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise BadModelFile(str(self.path), "metadata[adapter.lora.alpha]", f"{alpha!r} is no number")
            found: dict[str, dict[str, Floats]] = {}
            for name, info in file.tensors.items():
                match = GGUF_NAME.fullmatch(name)
                if match is None or match[2] not in self._shapes:
                    raise self._refuse(f"the tensor {name[:120]!r} adapts what cannot be adapted here")
                values = dequantize(file.raw(name), info.type, info.shape)
                found.setdefault(f"blk.{int(match[1])}.{match[2]}", {})[match[3]] = values
        return self._pairs(found, lambda own: alpha / own if alpha else 1.0, interleave=False)

    def _pairs(
        self,
        found: Mapping[str, Mapping[str, Floats]],
        scale: Callable[[int], float],
        *,
        interleave: bool,
    ) -> dict[str, tuple[Floats, Floats]]:
        """Both halves of every tensor, of the right shape, the scale of their rank in B."""
        made: dict[str, tuple[Floats, Floats]] = {}
        for name, halves in found.items():
            _, layer, place = name.split(".")
            if int(layer) >= self.spec.layers:
                raise self._refuse(f"{name}: the model has {self.spec.layers} layers")
            if set(halves) != {"a", "b"}:
                raise self._refuse(f"{name}: one half of it is missing")
            a, b = halves["a"], halves["b"]
            out, inner = self._shapes[place]
            rank = len(a)
            if a.shape != (rank, inner) or b.shape != (out, rank) or rank < 1:
                raise self._refuse(
                    f"{name}: A {a.shape} and B {b.shape} do not fit a [{out}, {inner}] matrix"
                )
            if rank > self.max_rank:
                raise self._refuse(f"{name}: rank {rank} is above the limit of {self.max_rank}")
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise self._refuse(f"{name}: it holds values that are not finite")
            if interleave and place in ("attn_q", "attn_k"):
                # GGUF's llama has the halves of each head's rotated pairs side by side.
                heads = out // self.spec.head_dim
                b = b.reshape(heads, 2, self.spec.head_dim // 2, rank).swapaxes(1, 2).reshape(out, rank)
            factor = np.float32(scale(rank))
            made[name] = (np.ascontiguousarray(a), np.ascontiguousarray(b * factor))
        return made

    def _refuse(self, why: str) -> AdapterRefused:
        return AdapterRefused(f"{self.path}: {why}.")
