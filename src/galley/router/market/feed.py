"""A provider's feed of its lots: signed JSON over HTTP, whole at every turn, and stale soon."""

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

import msgspec

from galley.errors import ConfigError, GalleyError, Upstream
from galley.providers.http import Pool
from galley.router.market.lot import Lot
from galley.router.market.need import Need
from galley.router.market.sheet import LotRow, lots_of

__all__ = ["Feed", "FeedRefused", "Message", "sign"]

MAX_BYTES = 4 << 20
MAX_LOTS = 10_000
AHEAD_S = 60
"""How far the provider's clock may be ahead of ours."""
MOST_MOVE = 10
"""A price that is this many times what it was, or this small a part of it, is an error until a human says
otherwise (by withdrawing the lot first)."""
LEAST_KEY = 16
PROBE = Need(model="", input=3_000_000, output=1_000_000)
"""Work by which prices of one lot are compared over time."""


class FeedRefused(GalleyError):
    """A message of a feed was not taken: the book stays as it was."""

    status = 502
    code = "feed_refused"


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a feed sends: every lot that it has. Times are Unix seconds.

    ``seq`` rises with every change; ``expires`` ends all of it unless a later message comes.
    """

    provider: str
    seq: int
    issued: int
    expires: int
    lots: list[LotRow]


class Feed:
    """One provider's feed.

    Args:
        key: shared secret of the signature, at least 16 bytes; never logged.
        max_age_s: an older message is stale and not taken.
    Raises ConfigError: the key is too short, the URL is none.
    """

    def __init__(
        self, provider: str, url: str, key: bytes, *, max_age_s: int = 300, timeout_s: float = 10.0
    ) -> None:
        if len(key) < LEAST_KEY:
            raise ConfigError(f"feed of {provider!r}: its key is shorter than {LEAST_KEY} bytes")
        base, _, path = url.rpartition("/")
        self.provider = provider
        self._pool = Pool(base, connect_s=timeout_s)
        self._path = f"/{path}"
        self._key = key
        self._max_age_s = max_age_s
        self._timeout_s = timeout_s
        self._seq = -1
        self._before: dict[str, Lot] = {}

    async def fetch(self, now: int) -> list[Lot]:
        """Ask for the lots. Raises FeedRefused, and Upstream when nobody answers."""
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await self._pool.request("GET", self._path, {"accept": "application/json"})
                body = await reply.read(MAX_BYTES)
        except TimeoutError as error:
            raise Upstream(
                f"no offers within {self._timeout_s:g} s", kind="timeout", provider=self.provider
            ) from error
        if reply.status != 200:
            raise Upstream(
                f"its feed answers {reply.status}",
                kind="server",
                provider=self.provider,
                upstream_status=reply.status,
            )
        return self.take(body, reply.headers.get("x-galley-signature", ""), now)

    def take(self, body: bytes, signature: str, now: int) -> list[Lot]:
        """The lots of a message, checked in full before any is used: signature, provider, age, order, rows,
        and that no price jumped. Each ends no later than the message does. Raises FeedRefused."""
        if not hmac.compare_digest(signature.encode(), sign(self._key, body).encode()):
            raise self._refuse("its signature is not by the key")
        try:
            message = msgspec.json.decode(body, type=Message)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._refuse(f"it makes no sense: {error}") from error
        if message.provider != self.provider or any(row.provider != self.provider for row in message.lots):
            raise self._refuse("it speaks for another provider")
        if message.issued > now + AHEAD_S or message.issued < now - self._max_age_s or message.expires <= now:
            raise self._refuse(f"it is of {message.issued} until {message.expires}, now is {now}")
        if message.seq < self._seq:
            raise self._refuse(f"number {message.seq} comes after {self._seq}: an old message again")
        if len(message.lots) > MAX_LOTS:
            raise self._refuse(f"it has more than {MAX_LOTS} lots")
        try:
            lots = lots_of(message.lots, source=f"feed {self.provider}", listed=message.issued)
        except ConfigError as error:
            raise self._refuse(error.message) from error
        self._check_moves(lots)
        self._seq = message.seq
        self._before = {lot.id: lot for lot in lots}
        return [
            msgspec.structs.replace(lot, valid_to=min(lot.valid_to, message.expires))
            for lot in lots
            if lot.valid_from < message.expires
        ]

    def _check_moves(self, lots: Sequence[Lot]) -> None:
        for lot in lots:
            before = self._before.get(lot.id)
            if before is None:
                continue
            old, new = before.expected(PROBE), lot.expected(PROBE)
            if new > old * MOST_MOVE or old > new * MOST_MOVE:
                raise self._refuse(f"the price of {lot.id!r} moved by more than {MOST_MOVE} times at once")

    def _refuse(self, why: str) -> FeedRefused:
        return FeedRefused(f"the feed of {self.provider}: {why}")

    def close(self) -> None:
        """Close its connections."""
        self._pool.close()


def sign(key: bytes, body: bytes) -> str:
    """The ``x-galley-signature`` of a message: HMAC-SHA256 (RFC 2104) of its bytes."""
    return "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()
