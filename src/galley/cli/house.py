"""House: model, engine, router and receipts of this process, opened for one command and closed after it."""

import contextlib
import time
import uuid
from typing import Any, Self

import click

from galley.audit.receipts import ReceiptStore
from galley.config import Config
from galley.model.store import Store
from galley.providers.opened import EngineOptions, Opened
from galley.router.router import Answer, Router
from galley.types import Request, SamplingParams


class House:
    """The way every request goes, in one process: request → router → provider → engine → receipt.

    Raises ModelNotFound, BadModelFile, TemplateError, ConfigError on construction.
    """

    def __init__(self, config: Config, name: str) -> None:
        entry = Store(config.home).resolve(name)
        options = EngineOptions(
            **{key: getattr(config.engine, key) for key in EngineOptions.__struct_fields__}
        )
        with contextlib.ExitStack() as opened:
            # Receipts are closed last: the engine's end is the last to write any.
            receipts = ReceiptStore(config.receipts.path)
            opened.callback(receipts.close)
            running = Opened(entry.path, entry.name, options, costs=config.home / "cost")
            opened.callback(running.close)
            for note in running.notes:
                if note.startswith("warning:"):
                    click.echo(f"galley: {note}", err=True)
            self.model = running.model
            self.router = Router([running.provider], receipts)
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
