"""Model: one opened file with everything read from it but the weights themselves."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from galley.errors import BadModelFile
from galley.model.chat import ChatTemplate
from galley.model.embedding import EmbeddingSpec
from galley.model.families import spec_from_gguf
from galley.model.gguf import GGUF
from galley.model.spec import ModelSpec
from galley.model.tokenizer import Tokenizer

_DEFAULTS = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
"""``general.sampling.*`` keys and what SamplingParams calls them."""


class Model:
    """Weights on disk, ready for a backend.

    Attributes:
        path: the file. name: what users call it.
        gguf: the mapped file. spec: its shape. tokenizer: text and ids.
        template: the chat template, or None when the file has none: chatting is then refused by the
            caller, never guessed.
        defaults: sampling defaults the file asks for, by SamplingParams name.
        embedding: how texts are embedded.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        gguf: GGUF,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        defaults: dict[str, Any],
        embedding: EmbeddingSpec,
    ) -> None:
        self.path = path
        self.name = name
        self.gguf = gguf
        self.spec = spec
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults
        self.embedding = embedding
        self._digest: str | None = None

    @classmethod
    def open(cls, path: Path, name: str) -> "Model":
        """Open a GGUF file. Raises BadModelFile, or TemplateError for a template that does not compile."""
        gguf = GGUF.open(path)
        try:
            spec = spec_from_gguf(gguf)
            tokenizer = Tokenizer.from_gguf(gguf)
            if tokenizer.vocab_size > spec.vocab:
                problem = f"{tokenizer.vocab_size} tokens, but the embedding has {spec.vocab} rows"
                raise BadModelFile(gguf.path, "metadata[tokenizer.ggml.tokens]", problem)
            return cls(
                path,
                name,
                gguf=gguf,
                spec=spec,
                tokenizer=tokenizer,
                template=_template(gguf, tokenizer),
                defaults=_defaults(gguf),
                embedding=EmbeddingSpec.from_gguf(
                    gguf, spec.arch, hidden=spec.hidden, vocab=tokenizer.vocab_size
                ),
            )
        except BaseException:
            gguf.close()
            raise

    @property
    def weights_digest(self) -> str:
        """sha256 of the file, hex. The first call reads the whole file, unless a note beside it says.

        The note ``<file>.sha256.json`` holds digest, size and mtime, and counts only while both still
        match. Where the folder cannot be written the digest is kept in memory alone.
        """
        if self._digest is None:
            self._digest = file_digest(self.path)
        return self._digest

    def close(self) -> None:
        self.gguf.close()


def file_digest(path: Path) -> str:
    """sha256 of a file, cached beside it by size and mtime. See ``Model.weights_digest``."""
    state = path.stat()
    note = path.with_name(path.name + ".sha256.json")
    stamp = {"size": state.st_size, "mtime_ns": state.st_mtime_ns}
    try:
        known = json.loads(note.read_bytes())
        if isinstance(known, dict) and {key: known.get(key) for key in stamp} == stamp:
            digest = known.get("sha256")
            if isinstance(digest, str) and len(digest) == 64:
                return digest
    except (OSError, ValueError):
        # No note, or a damaged one: it is only a cache, so the file itself is read.
        known = None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    scratch = note.with_name(f"{note.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps({"sha256": digest, **stamp}))
        scratch.replace(note)
    except OSError:
        scratch.unlink(missing_ok=True)  # a read-only folder: the next process reads the file again
    return digest


def _template(gguf: GGUF, tokenizer: Tokenizer) -> ChatTemplate | None:
    source = gguf.metadata.get("tokenizer.chat_template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise BadModelFile(gguf.path, "metadata[tokenizer.chat_template]", "is not a string")

    def text(key: str) -> str:
        token = gguf.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(token, int) or not 0 <= token < tokenizer.vocab_size:
            return ""
        return tokenizer.token_str(token)

    bos = "" if tokenizer.bos_id is None else tokenizer.token_str(tokenizer.bos_id)
    return ChatTemplate(source, bos, text("eos_token_id"))


def _defaults(gguf: GGUF) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, name in _DEFAULTS.items():
        value = gguf.metadata.get(f"general.sampling.{key}")
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise BadModelFile(gguf.path, f"metadata[general.sampling.{key}]", "is not a number")
        found[name] = value
    return found
