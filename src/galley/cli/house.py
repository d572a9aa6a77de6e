"""House: model, engine, router and receipts of this process, opened for one command and closed after it."""

import contextlib
import time
import uuid
from typing import Any, Self

import click

from galley.audit.receipts import ReceiptStore
from galley.cli.machine import Machine
from galley.config import Config
from galley.errors import GalleyError
from galley.model.model import Model
from galley.model.spec import ModelSpec
from galley.model.store import Store
from galley.providers.local import LocalProvider
from galley.router.router import Answer, Router
from galley.runtime.backend import native_missing, open_backend
from galley.runtime.engine import Engine
from galley.runtime.memory import plan_memory
from galley.types import Request, SamplingParams

BLOCK = 16


def kv_bytes_per_token(spec: ModelSpec, *, native: bool) -> int:
    """Bytes of keys and values of one token: f16 in the native arena, f32 in the reference."""
    return spec.layers * 2 * spec.kv_rows * (2 if native else 4)


class House:
    """The way every request goes, in one process: request → router → provider → engine → receipt.

    Raises ModelNotFound, BadModelFile, ConfigError on construction.
    """

    def __init__(self, config: Config, name: str) -> None:
        with contextlib.ExitStack() as opened:
            entry = Store(config.home).resolve(name)
            model = Model.open(entry.path, entry.name)
            opened.callback(model.close)
            native = config.engine.backend != "reference" and native_missing() is None
            available = Machine.read().memory_available
            if available is None and config.engine.kv_memory is None:
                raise GalleyError(
                    "This system does not tell how much memory is free.", hint="give --kv-memory SIZE"
                )
            memory = plan_memory(
                model.spec,
                kv_bytes_per_token(model.spec, native=native),
                BLOCK,
                available=available or 0,
                limit=config.engine.kv_memory,
                max_jobs=config.engine.max_jobs,
            )
            backend, warning = open_backend(
                config.engine.backend,
                model.gguf,
                model.spec,
                threads=config.engine.threads,
                num_blocks=memory.num_blocks,
                isa=config.engine.isa,
            )
            opened.callback(backend.close)
            if warning:
                click.echo(f"galley: warning: {warning}", err=True)
            engine = Engine(
                backend,
                eos_ids=model.tokenizer.eos_ids,
                token_budget=config.engine.token_budget,
                max_jobs=config.engine.max_jobs,
                max_queue=config.engine.max_queue,
                context=config.engine.context,
                model_key=model.weights_digest,
            )
            opened.callback(engine.close)
            engine.start()
            receipts = ReceiptStore(config.receipts.path)
            opened.callback(receipts.close)
            self.model = model
            self.router = Router([LocalProvider(model, engine, context=engine.context)], receipts)
            self._capture = config.receipts.capture
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def open(self, params: SamplingParams, *, api: str, **asked: Any) -> Answer:
        """An answer under way, for ``async with``. ``asked`` is ``messages=`` or ``prompts=``."""
        return self.router.open(
            Request(
                id=f"req_{uuid.uuid4().hex}",
                api=api,
                model=self.model.name,
                params=params,
                created=time.time(),
                stream=True,
                capture=self._capture,
                **asked,
            )
        )
