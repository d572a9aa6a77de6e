"""What Ollama's pages tell of a model, read from its file."""

from pathlib import Path
from typing import Any

import msgspec

from galley.errors import GalleyError
from galley.model.gguf import GGUF
from galley.model.model import file_digest
from galley.model.store import Store
from galley.runtime.text.formats import detect

__all__ = ["FactsBook", "ModelFacts", "read_facts"]

SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A model file from outside."""

    bytes: int
    modified: float
    """Unix seconds."""
    digest: str
    """sha256, hex."""
    family: str
    parameters: int
    """Weights."""
    quantization: str
    template: str
    thinks: bool
    license: str
    defaults: dict[str, Any]
    """Sampling that the file recommends."""
    info: dict[str, Any]
    """Its metadata by key; None in place of long lists."""


class FactsBook:
    """Facts of the models of a store, read once for each state of a file. From any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[Path, tuple[int, ModelFacts]] = {}

    def __call__(self, name: str) -> ModelFacts | None:
        """None for a model whose file is not here."""
        try:
            entry = self._store.resolve(name)
        except GalleyError:
            return None  # served by somebody else
        stamp = entry.path.stat().st_mtime_ns
        known = self._known.get(entry.path)
        if known is None or known[0] != stamp:
            known = (stamp, read_facts(entry.path, entry.license or ""))
            self._known[entry.path] = known
        return known[1]


def read_facts(path: Path, license: str = "") -> ModelFacts:
    """The facts of a GGUF file. Raises BadModelFile. The digest of a file never seen takes a pass over it."""
    state = path.stat()
    with GGUF.open(path) as gguf:
        metadata = gguf.metadata
        counts: dict[str, int] = {}
        parameters = 0
        for tensor in gguf.tensors.values():
            counts[tensor.type.name] = counts.get(tensor.type.name, 0) + tensor.nbytes
            size = 1
            for side in tensor.shape:
                size *= side
            parameters += size
        template = metadata.get("tokenizer.chat_template")
        template = template if isinstance(template, str) else ""
        return ModelFacts(
            bytes=state.st_size,
            modified=state.st_mtime,
            digest=file_digest(path),
            family=str(metadata.get("general.architecture", "")),
            parameters=parameters,
            quantization=max(counts, key=lambda name: counts[name], default=""),
            template=template,
            thinks=detect(template).think is not None,
            license=license or str(metadata.get("general.license", "")),
            defaults={
                ours: metadata[f"general.sampling.{theirs}"]
                for theirs, ours in SAMPLING.items()
                if f"general.sampling.{theirs}" in metadata
            },
            info={key: value if plain(value) else None for key, value in metadata.items()},
        )


def plain(value: Any) -> bool:
    """Whether a value of the metadata is short enough to be shown."""
    return isinstance(value, str | int | float | bool)
