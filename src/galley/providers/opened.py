"""Opening a model for running: file, memory plan, backend, engine, provider, in the one right order."""

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec

from galley.config import Config
from galley.errors import ConfigError
from galley.kv.disk import DiskStore
from galley.model.model import Model
from galley.providers.adapters import Adapters
from galley.providers.local import LocalProvider
from galley.runtime.backend import native_missing, open_backend
from galley.runtime.cost import CostModel
from galley.runtime.costbook import CostBook, Found
from galley.runtime.engine import Engine
from galley.runtime.journal import Journal
from galley.runtime.memory import kv_bytes_per_token, plan_memory, size
from galley.runtime.processors import Processors
from galley.runtime.tier import DiskOptions

__all__ = ["EngineOptions", "Opened", "disk_options", "memory_available", "options_of"]

log = logging.getLogger(__name__)

BLOCK = 16
"""Tokens in a KV block, of both backends."""
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def memory_available() -> int | None:
    """Bytes that may be taken without swapping: what the kernel says, within the control group's limit.
    None where the system does not tell."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        table = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(table["MemAvailable"].split()[0]) * 1024)
    if not found:
        with contextlib.suppress(OSError, ValueError):
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit, used in CGROUPS:
        with contextlib.suppress(OSError, ValueError):
            found.append(max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
    return min(found, default=None)


def memory_total() -> int | None:
    """Bytes of memory there are, within the control group's limit. None where the system does not tell."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit, _ in CGROUPS:
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(limit).read_text()))
    return min(found, default=None)


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to run a model; the names of ``config.engine``."""

    backend: str = "auto"
    isa: str | None = None
    kv_type: str = "f16"
    threads: int | None = None
    token_budget: int = 512
    max_jobs: int = 64
    max_queue: int = 1024
    kv_memory: int | None = None
    context: int | None = None
    max_wait_s: float = 0.0
    tenant_weights: tuple[tuple[str, float], ...] = ()
    journal: Path | None = None
    lora_dirs: tuple[Path, ...] = ()
    max_loras: int = 8
    max_lora_rank: int = 64


def options_of(config: Config) -> EngineOptions:
    """The engine's part of the settings."""
    return EngineOptions(**{name: getattr(config.engine, name) for name in EngineOptions.__struct_fields__})


def disk_options(config: Config) -> DiskOptions | None:
    """The disk tier as configured; None when it is switched off."""
    if config.kv.disk_bytes == 0:
        return None
    return DiskOptions(path=config.kv.disk_path, limit=config.kv.disk_bytes)


def usable(disk: DiskOptions | None) -> tuple[DiskOptions | None, str | None]:
    """The disk tier, or why there can be none: a server without it still serves."""
    if disk is None:
        return None, None
    try:
        disk.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=disk.path):
            return disk, None
    except OSError as error:
        return None, f"KV is kept in memory alone: {error}"


def kept_on_disk(store: DiskStore) -> str:
    """One line about the disk tier, for the start of a server."""
    stats = store.stats()
    return (
        f"KV on disk: {size(stats.bytes)} of {size(store.limit)} in {store.path} "
        f"(kv.disk_bytes = 0 switches it off)"
    )


class Opened:
    """A running model: ``provider`` answers until ``close``.

    Takes seconds (weights are repacked, digests computed): call it off the event loop.

    Raises BadModelFile, TemplateError, ConfigError.

    Args:
        model: the open file, when it is kept open between runs; then the caller closes it.
        costs: folder of measured cost models; the one that fits is used. None: no cost model.
        measure: where none fits, measure in idle time and keep it there.
        lora: adapters to load at once, by name. adapters: those that were loaded when it ran before.
        threaded: start the engine's own thread; without it the caller drives ``engine.turn``.

    Attributes:
        bytes: memory of weights and KV cache, by the plan.
        warning: why the backend is not the one hoped for, if so.
        notes: what a user should be told at start, one line each, warnings first.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        options: EngineOptions,
        *,
        available: int | None = None,
        model: Model | None = None,
        disk: DiskOptions | None = None,
        costs: Path | None = None,
        measure: bool = False,
        threaded: bool = True,
        lora: Sequence[tuple[str, Path]] = (),
        adapters: Adapters | None = None,
    ) -> None:
        with contextlib.ExitStack() as opened:
            self.model = model or Model.open(path, name)
            self._owner = model is None
            opened.callback(self._drop_model)
            spec = self.model.spec
            native = options.backend != "reference" and native_missing() is None
            if available is None:
                available = memory_available()
            if available is None and options.kv_memory is None:
                raise ConfigError(
                    "This system does not tell how much memory is free.",
                    param="engine.kv_memory",
                    hint="Set engine.kv_memory (--kv-memory SIZE).",
                )
            memory = plan_memory(
                spec,
                kv_bytes_per_token(spec, options.kv_type if native else "f32"),
                BLOCK,
                available=available or 0,
                limit=options.kv_memory,
                max_jobs=options.max_jobs,
                total=memory_total(),
            )
            backend, warning = open_backend(
                options.backend,
                self.model.gguf,
                spec,
                threads=options.threads,
                num_blocks=memory.num_blocks,
                isa=options.isa,
                kv_type=options.kv_type,
            )
            opened.callback(backend.close)
            journal = None
            if options.journal is not None:
                try:
                    journal = Journal(options.journal)
                except OSError as error:
                    raise ConfigError(
                        f"{options.journal}: cannot be written: {error}", param="engine.journal"
                    ) from error
                opened.callback(journal.close)
            disk, no_disk = usable(disk)
            threads = Processors.read().threads(backend.threads)
            book = CostBook(costs, backend, self.model.weights_digest) if costs is not None else None
            known = book.read() if book is not None else Found(None, None)
            self.engine = Engine(
                backend,
                eos_ids=self.model.tokenizer.eos_ids,
                token_budget=options.token_budget,
                max_jobs=options.max_jobs,
                max_queue=options.max_queue,
                context=options.context,
                model_key=self.model.weights_digest,
                max_wait_s=options.max_wait_s or None,
                weights=dict(options.tenant_weights),
                journal=journal,
                adapters=options.max_loras,
                disk=disk,
                cost=known.model,
                measure=partial(_keep, book) if measure and book is not None else None,
            )
            opened.callback(self.engine.close)
            if threaded:
                self.engine.start()
            if adapters is None:
                adapters = Adapters(allowed=options.lora_dirs, max_rank=options.max_lora_rank)
                for called, place in lora:
                    adapters.add(adapters.read(called, place, spec))
            self.provider = LocalProvider(
                self.model, self.engine, created=int(time.time()), adapters=adapters
            )
            card = self.provider.cards[0]
            self.bytes = path.stat().st_size + memory.kv_bytes
            self.memory = memory
            self.warning = warning
            told = (warning, no_disk, known.problem, *threads.warnings)
            self.notes = [f"warning: {text}" for text in told if text]
            self.notes += [
                f"model {name}: {spec.arch}, mostly {card.quantization}, {path.stat().st_size / 1e6:.0f} MB",
                f"backend {backend.name}, {backend.isa}, {backend.threads} threads",
                f"KV {memory.explanation}; context {card.context} tokens",
            ]
            if self.engine.disk is not None:
                self.notes.append(kept_on_disk(self.engine.disk))
            self._opened = opened.pop_all()

    def release(self) -> Model:
        """The open file, which ``close`` then leaves open: the caller's to close."""
        self._owner = False
        return self.model

    def _drop_model(self) -> None:
        if self._owner:
            self.model.close()

    def close(self) -> None:
        """Cancel what runs, stop the engine, free weights and KV. Idempotent."""
        self._opened.close()


def _keep(book: CostBook, model: CostModel) -> None:
    """Write a cost model down; a disk that cannot take it costs the next start a measurement, no more."""
    try:
        book.write(model)
    except OSError as error:
        log.warning("the cost model cannot be kept in %s: %s", book.path, error)
