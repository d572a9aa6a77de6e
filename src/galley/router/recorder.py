"""What a router tells of the requests it has seen through."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from galley.types import Delta, Receipt, Request

__all__ = ["Auditor", "Recorder"]


class Recorder(Protocol):
    """Where receipts go (``audit.receipts.ReceiptStore``)."""

    def record(self, receipt: Receipt) -> None: ...


class Auditor(Protocol):
    """Accounts for requests in a log that cannot be rewritten unseen (``audit.scribe.Scribe``)."""

    fault: str | None
    failures: int

    async def admit(self, request: Request, receipt: str) -> None: ...

    def put(
        self,
        receipt: Receipt,
        request: Request,
        pieces: Mapping[int, Sequence[Delta]],
        approvals: Sequence[Mapping[str, Any]] = (),
    ) -> "Future[None] | None": ...
