"""CostBook: measured cost models on disk, one for each machine, model and way of computing."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from galley.runtime.backend.base import Backend
from galley.runtime.cost import CostModel
from galley.runtime.processors import Processors

__all__ = ["CostBook", "Found"]

VERSION = 1


class Page(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file's form. ``digest`` is that of ``key`` and ``model`` as written."""

    version: int
    key: dict[str, str]
    model: CostModel
    digest: str


class Found(NamedTuple):
    """A kept model, or None; and, when a file is there that cannot be used, what is wrong with it."""

    model: CostModel | None
    problem: str | None


class CostBook:
    """The cost model of one backend with one set of weights on this machine, kept in ``folder``.

    A model counts only for the same processor, instruction set, threads, kernels (their revision is in the
    backend's fingerprint), weights and room for context.

    Args:
        folder: made when first written to.
        weights: digest of the weights.
    """

    def __init__(self, folder: Path, backend: Backend, weights: str) -> None:
        self.key = {
            "processor": Processors.read().name,
            "backend": backend.name,
            "isa": backend.isa,
            "threads": str(backend.threads),
            "kernels": backend.fingerprint,
            "weights": weights,
        }
        self.path = folder / f"{_digest(self.key)[:24]}.json"

    def read(self) -> Found:
        """The kept model. A damaged file is no model and a problem told, never an exception."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return Found(None, None)
        except OSError as error:
            return Found(None, f"{self.path} cannot be read ({error.strerror}); to be measured again")
        try:
            page = msgspec.json.decode(data, type=Page)
            if page.version != VERSION:
                raise ValueError(f"version {page.version}, not {VERSION}")
            if page.key != self.key:
                raise ValueError("it is another machine's or model's")
            if page.digest != _digest([page.key, page.model]):
                raise ValueError("its digest does not match")
        except (ValueError, msgspec.DecodeError) as error:
            return Found(None, f"{self.path} is damaged ({error}); to be measured again")
        return Found(page.model, None)

    def write(self, model: CostModel) -> None:
        """Keep a model; the file is replaced whole or not at all. Raises OSError."""
        page = Page(version=VERSION, key=self.key, model=model, digest=_digest([self.key, model]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".cost-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(page), indent=1))
            Path(name).replace(self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise


def _digest(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()
