"""Who may ask: the API key, the Host header, and the refusal to stand open to a network by accident."""

import hashlib
import hmac
import ipaddress
import time
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from galley.audit.assemble import receipt_id
from galley.endpoint.client import Client
from galley.errors import AuthenticationError, ConfigError, GalleyError, PermissionDenied

__all__ = ["Access", "check_bind", "is_loopback"]

OPEN_PATHS = frozenset(("/health", "/ready"))
"""Probes answer without a key; they tell nothing about requests."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address bound to."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, api_key: str | None) -> None:
    """Raises ConfigError for an address beyond loopback without a key."""
    if not is_loopback(host) and not api_key:
        raise ConfigError(
            f"Refusing to listen on {host} without an API key: anyone who reaches this machine could use it.",
            param="server.api_key",
            hint="Set GALLEY_API_KEY (or server.api_key), or bind 127.0.0.1.",
        )


class Access:
    """Pure ASGI middleware: gives every request an id, checks Host and key, times the exchange.

    On a loopback bind the Host header must name this machine or an allowed name: a web page that points its
    own name at 127.0.0.1 (DNS rebinding) sends its own name. No CORS headers are sent, ever.

    Args:
        keys: accepted API keys; none switches the check off.
        allowed_hosts: further Host names; ``*`` switches the check off.
        refused: told of every request turned away; returns the id of its receipt, if it has one.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str = "127.0.0.1",
        keys: Iterable[str] = (),
        allowed_hosts: Iterable[str] = (),
        refused: Callable[[Scope, GalleyError], str | None] = lambda scope, error: None,
    ) -> None:
        self._app = app
        self._refused = refused
        self._keys = [(hashlib.sha256(key.encode()).digest(), key_id(key)) for key in keys]
        names = {name.lower() for name in allowed_hosts}
        self._check_host = is_loopback(host) and "*" not in names
        self._hosts = names | {"localhost", "127.0.0.1", "::1", host.lower().strip("[]")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = receipt_id().replace("rcp_", "req_")
        began = time.perf_counter()

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                spent = f"{(time.perf_counter() - began) * 1000:.0f}"
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", spent.encode()),
                ]
            await send(message)

        client = Client(scope, receive, send_marked)
        try:
            self._admit_host(client)
            key = self._admit_key(client)
        except (PermissionDenied, AuthenticationError) as error:
            scope["state"] = {**scope.get("state", {}), "request_id": request_id}
            receipt = self._refused(scope, error)
            if receipt is not None:
                client.headers.append((b"x-galley-receipt", receipt.encode()))
            await client.error(error)
            return
        # A plain dict of this request; the one uvicorn shares between requests stays as it is.
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "key": key}
        await self._app(scope, receive, send_marked)

    def _admit_host(self, client: Client) -> None:
        if not self._check_host:
            return
        given = (client.header(b"host") or b"").decode("latin-1").lower()
        name = given.rpartition("]")[0].lstrip("[") if given.startswith("[") else given.partition(":")[0]
        if name not in self._hosts:
            raise PermissionDenied(
                "This Host header is not served here.",
                code="host_not_allowed",
                hint="Add the name to server.allowed_hosts.",
            )

    def _admit_key(self, client: Client) -> str | None:
        """The id of the key used; None where no key is asked for."""
        if not self._keys or client.scope["path"] in OPEN_PATHS:
            return None
        scheme, _, token = (client.header(b"authorization") or b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else client.header(b"x-api-key") or b""
        digest = hashlib.sha256(given).digest()
        found = None
        for known, name in self._keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = name
        if found is None:
            raise AuthenticationError("Missing or wrong API key. Send it as 'Authorization: Bearer KEY'.")
        return found


def key_id(key: str) -> str:
    """A name for a key that does not give it away."""
    return "key_" + hashlib.sha256(b"galley key id " + key.encode()).hexdigest()[:12]
