"""Who may ask: the API key, the Host header, and the refusal to stand open to a network by accident."""

import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from galley.audit.assemble import receipt_id
from galley.endpoint.client import Client
from galley.endpoint.keys import SCOPES, KeyStore, Principal
from galley.endpoint.keys import Scope as KeyScope
from galley.errors import AuthenticationError, ConfigError, GalleyError, InvalidRequest, PermissionDenied

__all__ = ["Access", "check_bind", "is_loopback", "named", "tenant_of"]

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST, DELETE"),
    (
        b"access-control-allow-headers",
        b"authorization, content-type, x-api-key, anthropic-version, x-request-id",
    ),
    (b"access-control-max-age", b"600"),
]
SCOPE_OF: dict[str, KeyScope | None] = {
    "admin": None,  # has a key of its own
    "keys": "admin",
    "receipts": "receipts",
    "files": "batch",
    "batches": "batch",
    "models": None,
}
"""First part of a ``/v1`` path to what it asks of a key; ``inference`` where it is not listed."""
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


def check_bind(host: str, api_key: str | None, store: KeyStore | None = None) -> None:
    """Raises ConfigError for an address beyond loopback without a key."""
    if not is_loopback(host) and not api_key and (store is None or not store.used()):
        raise ConfigError(
            f"Refusing to listen on {host} without an API key: anyone who reaches this machine could use it.",
            param="server.api_key",
            hint="galley keys create, or set GALLEY_API_KEY (server.api_key), or bind 127.0.0.1.",
        )


class Access:
    """Pure ASGI middleware: gives every request an id, checks Host and key, times the exchange.

    On a loopback bind the Host header must name this machine or an allowed name: a web page that points its
    own name at 127.0.0.1 (DNS rebinding) sends its own name. CORS headers are sent to the origins listed and
    to nobody else; none are listed by default.

    A client's own ``x-request-id`` is kept when it is 1 to 128 characters of ``A-Za-z0-9._:-``; any other is
    replaced, and the answer says which id it got.

    Args:
        keys: accepted API keys, each with all scopes.
        store: further keys, with scopes and model lists. Without either kind no key is asked for, and admin
            paths are closed.
        allowed_hosts: further Host names; ``*`` switches the check off.
        cors_origins: web pages that may call, e.g. ``http://localhost:3000``.
        refused: told of every request turned away; returns the id of its receipt, if it has one.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str = "127.0.0.1",
        keys: Iterable[str] = (),
        store: KeyStore | None = None,
        allowed_hosts: Iterable[str] = (),
        cors_origins: Iterable[str] = (),
        refused: Callable[[Scope, GalleyError], str | None] = lambda scope, error: None,
    ) -> None:
        self._app = app
        self._refused = refused
        self._keys = [(hashlib.sha256(key.encode()).digest(), key_id(key)) for key in keys]
        self._store = store
        names = {name.lower() for name in allowed_hosts}
        self._check_host = is_loopback(host) and "*" not in names
        self._hosts = names | {"localhost", "127.0.0.1", "::1", host.lower().strip("[]")}
        self._origins = {origin.rstrip("/").encode() for origin in cors_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = dict(scope["headers"])
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = asked if REQUEST_ID.fullmatch(asked) else receipt_id().replace("rcp_", "req_")
        cors = self._cors(headers.get(b"origin"))

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                spent = f"{(time.perf_counter() - began) * 1000:.0f}"
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    (b"request-id", request_id.encode()),
                    (b"openai-processing-ms", spent.encode()),
                    *cors,
                ]
            await send(message)

        # A plain dict of this request; the one uvicorn shares between requests stays as it is.
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        client = Client(scope, receive, send_marked)
        try:
            self._admit_host(client)
            if cors and scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                await client.start(204, PREFLIGHT)
                await client.write(b"", more=False)
                return
            principal = self._admit_key(client)
            need = scope_of(scope["path"])
            if need is not None and scope["path"] not in OPEN_PATHS:
                principal.need(need)
        except GalleyError as error:
            receipt = self._refused(scope, error)
            if receipt is not None:
                client.headers.append((b"x-galley-receipt", receipt.encode()))
            await client.error(error)
            return
        scope["state"] |= {"principal": principal, "key": principal.key}
        await self._app(scope, receive, send_marked)

    def _cors(self, origin: bytes | None) -> list[tuple[bytes, bytes]]:
        if origin is None or origin not in self._origins:
            return []
        exposed = b"x-request-id, x-galley-receipt, x-galley-ignored-params, x-galley-clamped, "
        exposed += b", ".join(
            f"x-ratelimit-{what}-{resource}".encode()
            for resource in ("requests", "tokens")
            for what in ("limit", "remaining", "reset")
        )
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", exposed),
            (b"vary", b"origin"),
        ]

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

    def _admit_key(self, client: Client) -> Principal:
        """Who asks. Raises AuthenticationError."""
        if client.scope["path"] in OPEN_PATHS:
            return Principal()
        if not self._keys and (self._store is None or not self._store.used()):
            return Principal()
        scheme, _, token = (client.header(b"authorization") or b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else client.header(b"x-api-key") or b""
        digest = hashlib.sha256(given).digest()
        # With one key for all, the key tells nobody from anybody.
        several = len(self._keys) > 1 or (self._store is not None and self._store.used())
        found: Principal | None = None
        for known, name in self._keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = Principal(key=name, scopes=SCOPES, tenant=name if several else None)
        if found is None and self._store is not None and given:
            key = self._store.find(given)
            if key is not None:
                found = Principal(
                    key=key.id,
                    scopes=tuple(key.scopes),
                    models=tuple(key.models),
                    tenant=key.name or key.id,
                    org=key.org,
                    team=key.team,
                )
        if found is None:
            raise AuthenticationError(
                # litellm tells a key's fault from a request's by the first four words.
                "Incorrect API key provided: missing, wrong, expired or revoked. "
                "Send it as 'Authorization: Bearer KEY'."
            )
        return found


def tenant_of(client: Client, principal: Principal, user: str | None) -> str:
    """Who is charged for the service when the machine is shared (SCH-7).

    Where there are several API keys, the key's name or id, whatever else is said: a client cannot get a
    larger share by taking more names. Else the header ``x-galley-tenant``, else the body's
    ``safety_identifier`` or ``user``, else ``local``.

    Raises InvalidRequest for a header that is no name of up to 128 printable ASCII characters.
    """
    if principal.tenant is not None:
        return principal.tenant
    return named(client, "x-galley-tenant") or user or "local"


def named(client: Client, header: str) -> str | None:
    """A header that holds a name; None without it. Raises InvalidRequest for one that holds none."""
    given = client.header(header.encode())
    if given is None:
        return None
    name = given.decode("latin-1").strip()
    if not (0 < len(name) <= 128 and name.isascii() and name.isprintable()):
        raise InvalidRequest(
            f"The header {header} must hold a name of up to 128 printable ASCII characters.", param=header
        )
    return name


def scope_of(path: str) -> KeyScope | None:
    """What a path asks of a key; None where any good key will do."""
    if path == "/metrics":
        return "receipts"
    if not path.startswith("/v1/"):
        asks = ("/tokenize", "/detokenize", "/apply-template", "/api/chat", "/api/generate")
        return "inference" if path in asks else None
    return SCOPE_OF.get(path[4:].partition("/")[0], "inference")


def key_id(key: str) -> str:
    """A name for a key that does not give it away."""
    return "key_" + hashlib.sha256(b"galley key id " + key.encode()).hexdigest()[:12]
