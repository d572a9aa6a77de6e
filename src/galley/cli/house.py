"""House: model, engine, router and receipts of this process, opened for one command and closed after it."""

import contextlib
import time
import uuid
from typing import Any, Self

import click
import msgspec

from galley.audit.pii import Redactor
from galley.audit.receipts import ReceiptStore
from galley.audit.scribe import Scribe
from galley.config import Config
from galley.model.store import Store
from galley.providers.opened import EngineOptions, Opened, disk_options
from galley.router.router import Answer, Router
from galley.types import CacheBreakpoint, Request, SamplingParams


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
            clean = Redactor.of(config.redact.stores, config.redact.kinds)
            receipts = ReceiptStore(config.receipts.path, clean=clean["receipts"].receipt)
            opened.callback(receipts.close)
            scribe = Scribe.opened(receipts, **msgspec.structs.asdict(config.audit))
            if scribe is not None:
                opened.callback(scribe.close)
            disk, costs = disk_options(config), config.home / "cost"
            running = Opened(entry.path, entry.name, options, disk=disk, costs=costs)
            opened.callback(running.close)
            for note in running.notes:
                if note.startswith("warning:"):
                    click.echo(f"galley: {note}", err=True)
            self.model = running.model
            self.provider = running.provider
            self.engine = running.engine
            self.router = Router([running.provider], receipts, auditor=scribe)
            self._capture = config.receipts.capture
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    async def prefix(self, text: str, *, raw: bool) -> list[int]:
        """Ids of a text as it begins a prompt: alone, or as the system message of a conversation."""
        if raw:
            return self.model.tokenizer.encode(text)
        messages = [{"role": "system", "content": text}, {"role": "user", "content": "?"}]
        mark = CacheBreakpoint(message=0, chars=len(text), ttl="5m", ttl_s=300)
        prepared = await self.provider.prepare(
            self._request(
                SamplingParams(max_tokens=1), "cli.cache", messages=messages, cache_breakpoints=[mark]
            )
        )
        hint = prepared.cache[0]
        return prepared.prompts[0][: hint.ends[0][0]] if hint is not None and hint.ends else []

    def open(self, params: SamplingParams, *, api: str, **asked: Any) -> Answer:
        """An answer under way, for ``async with``. ``asked`` is ``messages=`` or ``prompts=``, and more."""
        return self.router.open(self._request(params, api, **asked))

    def _request(self, params: SamplingParams, api: str, **asked: Any) -> Request:
        return Request(
            id=f"req_{uuid.uuid4().hex}",
            api=api,
            model=self.model.name,
            params=params,
            created=time.time(),
            stream=True,
            capture=self._capture,
            **asked,
        )
