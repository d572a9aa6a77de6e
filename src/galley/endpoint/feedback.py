"""``POST /v1/feedback``: what an answer was worth, by its receipt."""

import asyncio
from collections.abc import Callable

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from galley.audit.feedback import FeedbackStore
from galley.audit.receipts import ReceiptStore
from galley.endpoint.paging import principal_of, respond
from galley.endpoint.wire import Fields, parse_object
from galley.errors import GalleyError, NotFound, PayloadTooLarge
from galley.router.router import Router

__all__ = ["FeedbackPage"]


class FeedbackPage:
    """The door, and what the router learns from it.

    What was given while no server ran, or by the command line beside one, is learned by ``catch_up``.
    """

    def __init__(
        self, router: Router, receipts: ReceiptStore, store: FeedbackStore, *, max_body: int = 64 << 10
    ) -> None:
        self._router = router
        self._receipts = receipts
        self._store = store
        self._max_body = max_body
        self._seen = 0

    async def create(self, request: HTTPRequest) -> Response:
        """``{"receipt", "reward": 0..1, "comment"}``. 404 for a receipt that is not there, or another key's.
        ``learned`` tells whether a bandit learned from it."""
        raw = await request.body()
        if len(raw) > self._max_body:
            raise PayloadTooLarge(f"The body is larger than this server's limit of {self._max_body} bytes.")
        fields = Fields(parse_object(raw))
        id = fields.checked(fields.need("receipt"), "receipt", 64)
        fields.need("reward")
        reward = fields.number("reward", 0, 1) or 0.0
        comment = fields.text("comment", 2000) or ""
        principal = principal_of(request)
        receipt = await asyncio.to_thread(self._receipts.get, id)
        if receipt is None or (principal.key is not None and receipt.key not in (None, principal.key)):
            raise NotFound(f"There is no receipt {id!r}.", param="receipt")
        given = await asyncio.to_thread(self._store.add, id, reward, comment=comment, key=principal.key)
        learned = await self.catch_up()
        shown = {"object": "feedback", "receipt": id, "reward": given.reward, "created": int(given.at)}
        response = respond({**shown, "learned": id in learned}, 201)
        if fields.rest():
            response.headers["x-galley-ignored-params"] = ", ".join(fields.rest())
        return response

    async def catch_up(self) -> set[str]:
        """Learn from what was first given since the last time; the receipts that a bandit learned from."""
        fresh = await asyncio.to_thread(self._store.since, self._seen)
        learned = set()
        for one in fresh:
            if one.seq <= self._seen:
                continue  # another call was faster
            self._seen = one.seq
            receipt = await asyncio.to_thread(self._receipts.get, one.receipt)
            if receipt is not None and self._router.learn(receipt, one.reward):
                learned.add(one.receipt)
        return learned

    async def keep_up(self, tell: Callable[[str], None]) -> None:
        """``catch_up`` for a background loop: a file that cannot be read is told, and changes nothing."""
        try:
            await self.catch_up()
        except GalleyError as error:
            tell(f"feedback is not taken up: {error.message}")
