"""What a server keeps between requests: answers, files, batches and keys, all in its home."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from starlette.routing import Route

from galley.endpoint.batches.filestore import Files, Upload
from galley.endpoint.batches.journal import Journal
from galley.endpoint.batches.pages import BatchPages
from galley.endpoint.batches.runner import Runner
from galley.endpoint.generate import Generate, Limits
from galley.endpoint.keys import KeyStore
from galley.endpoint.shelf import Shelf
from galley.router.router import Router

__all__ = ["Keeping", "State"]


class Keeping(msgspec.Struct, frozen=True, kw_only=True):
    """How much is kept, and for how long."""

    store: bool = True
    """Whether a response is stored when its request does not say."""
    days: float = 30.0
    bytes: int = 1 << 30
    max_file: int = 200 << 20
    concurrency: int = 16
    """Lines of batches under way at once."""


class State:
    """Opened on first use, file by file. ``start`` and ``stop`` frame the work on batches."""

    def __init__(
        self, home: Path, keeping: Keeping | None = None, *, clean: Callable[[Any], Any] | None = None
    ) -> None:
        self.keeping = keeping or Keeping()
        self.home = home
        self.shelf = Shelf(
            home / "responses.db",
            max_age_s=self.keeping.days * 86_400,
            max_bytes=self.keeping.bytes,
            clean=clean,
        )
        self.keys = KeyStore(home / "keys.db")
        self.journal = Journal(home / "batches.db")
        self.files = Files(self.journal, home / "files")
        self.runner: Runner | None = None

    def routes(self, router: Router, doors: Mapping[str, Generate], limits: Limits) -> list[Route]:
        """The paths of files and batches."""
        self.runner = Runner(
            self.journal,
            self.files,
            self.keys,
            router,
            doors,
            concurrency=self.keeping.concurrency,
            lock=self.home / "batches.lock",
        )
        upload = Upload(self.files, max_file=self.keeping.max_file, body_s=limits.body_s)
        pages = BatchPages(self.journal, doors, self.runner.wake, max_body=limits.body)
        get, post = ["GET"], ["POST"]
        return [
            Route("/v1/files", self.files.list, methods=get),
            Route("/v1/files", upload, methods=post),
            Route("/v1/files/{id}", self.files.get, methods=get),
            Route("/v1/files/{id}", self.files.delete, methods=["DELETE"]),
            Route("/v1/files/{id}/content", self.files.content, methods=get),
            Route("/v1/batches", pages.list, methods=get),
            Route("/v1/batches", pages.create, methods=post),
            Route("/v1/batches/{id}", pages.get, methods=get),
            Route("/v1/batches/{id}/cancel", pages.cancel, methods=post),
        ]

    def start(self) -> None:
        """Begin to work on batches, in the running event loop."""
        if self.runner is not None:
            self.runner.start()

    async def stop(self) -> None:
        """Stop that and close every file."""
        if self.runner is not None:
            await self.runner.stop()
        self.close()

    def close(self) -> None:
        """Close every file. Idempotent."""
        for file in (self.shelf, self.keys, self.journal):
            file.close()
