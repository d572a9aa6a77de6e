"""``/v1/batches``: create, look, list, cancel."""

import asyncio
import secrets
import time
from collections.abc import Callable, Collection
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from galley.endpoint.batches.filestore import read_expiry
from galley.endpoint.batches.journal import Batch, Journal, Status
from galley.endpoint.paging import Page, principal_of, respond
from galley.endpoint.params import read_metadata
from galley.endpoint.wire import Fields, header_list, parse_object
from galley.errors import InvalidRequest, PayloadTooLarge

__all__ = ["BatchPages"]

WINDOWS = {"1h": 3600, "4h": 4 * 3600, "24h": 24 * 3600}


class BatchPages:
    """The pages; the work is the runner's.

    Args:
        endpoints: paths a batch may be for.
        wake: tells the runner.
    """

    def __init__(
        self, journal: Journal, endpoints: Collection[str], wake: Callable[[], None], *, max_body: int
    ) -> None:
        self._journal = journal
        self._endpoints = tuple(endpoints)
        self._wake = wake
        self._max_body = max_body

    async def create(self, request: HTTPRequest) -> Response:
        """``{"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}``."""
        raw = await request.body()
        if len(raw) > self._max_body:
            raise PayloadTooLarge(f"The body is larger than this server's limit of {self._max_body} bytes.")
        fields = Fields(parse_object(raw))
        fields.need("input_file_id")
        fields.need("endpoint")
        fields.need("completion_window")
        id = fields.text("input_file_id", 128) or ""
        endpoint = fields.choice("endpoint", self._endpoints) or ""
        window = fields.choice("completion_window", tuple(WINDOWS)) or ""
        expires = fields.object("output_expires_after")
        expires_s = None
        if expires is not None:
            expires_s = read_expiry(expires.need("anchor"), expires.need("seconds"), "output_expires_after")
        metadata = read_metadata(fields)
        principal = principal_of(request)
        owner = principal.key or ""
        file = await asyncio.to_thread(self._journal.file, id, owner)
        if file.purpose != "batch":
            raise InvalidRequest(f"{id!r} was not uploaded for a batch.", param="input_file_id")
        now = time.time()
        batch = Batch(
            id="batch_" + secrets.token_hex(12),
            endpoint=endpoint,
            input_file_id=id,
            completion_window=window,
            created_at=now,
            expires_at=now + WINDOWS[window],
            metadata=metadata,
            principal=principal,
            output_expires_s=expires_s,
        )
        await asyncio.to_thread(self._journal.add, batch, owner)
        self._wake()
        response = respond(await self._shown(batch))
        ignored = fields.rest() + (expires.rest() if expires is not None else [])
        if ignored:
            response.headers["x-galley-ignored-params"] = header_list(ignored)
        return response

    async def get(self, request: HTTPRequest) -> Response:
        """A batch as it is now."""
        return respond(await self._shown(await self._find(request)))

    async def list(self, request: HTTPRequest) -> Response:
        """``?after=&limit=``, newest first."""
        page = Page.read(request)
        owner = principal_of(request).key or ""
        found = await asyncio.to_thread(self._journal.batches, owner)
        listed = page.cut([{"id": batch.id, "batch": batch} for batch in found])
        return respond({**listed, "data": [await self._shown(item["batch"]) for item in listed["data"]]})

    async def cancel(self, request: HTTPRequest) -> Response:
        """No further lines are begun, those under way are stopped; what has ended stays as it ended."""
        batch = await self._find(request)
        when: tuple[Status, ...] = ("validating", "in_progress")
        if batch.status not in (*when, "cancelling", "cancelled"):
            raise InvalidRequest(f"The batch is {batch.status}; it cannot be cancelled.", param="batch_id")
        batch = await asyncio.to_thread(
            self._journal.change, batch.id, when=when, status="cancelling", cancelling_at=time.time()
        )
        self._wake()
        return respond(await self._shown(batch))

    async def _find(self, request: HTTPRequest) -> Batch:
        owner = principal_of(request).key or ""
        return await asyncio.to_thread(self._journal.get, request.path_params["id"], owner)

    async def _shown(self, batch: Batch) -> dict[str, Any]:
        """A batch on the wire."""
        facts = msgspec.to_builtins(batch)
        del facts["principal"], facts["output_expires_s"]
        for name, value in facts.items():
            if name.endswith("_at") and value is not None:
                facts[name] = int(value)
        total, completed, failed = await asyncio.to_thread(self._journal.counts, batch.id)
        facts["errors"] = {"object": "list", "data": batch.errors} if batch.errors else None
        counts = {"total": total, "completed": completed, "failed": failed}
        return {"object": "batch", **facts, "request_counts": counts}
