"""The ASGI application: which path leads where."""

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from galley import __version__
from galley.audit.assemble import receipt_id
from galley.audit.receipts import ReceiptStore
from galley.endpoint.access import Access
from galley.endpoint.admin import Admin
from galley.endpoint.chat import ChatDoor
from galley.endpoint.client import error_headers, wire_error
from galley.endpoint.completions import CompletionsDoor
from galley.endpoint.dialect import dialect_of
from galley.endpoint.embeddings import EmbeddingsDoor
from galley.endpoint.feedback import FeedbackPage
from galley.endpoint.generate import Generate, Limits
from galley.endpoint.keypages import KeyPages
from galley.endpoint.messages.door import MessagesDoor
from galley.endpoint.metrics import Metrics
from galley.endpoint.openapi import document
from galley.endpoint.paging import principal_of, respond
from galley.endpoint.params import stub
from galley.endpoint.responses.create import Responses
from galley.endpoint.responses.door import ResponseDoor
from galley.endpoint.state import State
from galley.endpoint.stored import StoredChat
from galley.endpoint.straight import Straight
from galley.endpoint.tokens import ApplyTemplate, CountTokens, Detokenize, Tokenize
from galley.errors import GalleyError, InvalidRequest, NotFound
from galley.providers.base import ModelCard
from galley.router.router import Router

__all__ = ["build_app"]

MAX_LISTED = 1000
GENERATING = {
    "/v1/chat/completions": "chat.completions",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/api/chat": "ollama.chat",
    "/api/generate": "ollama.generate",
}
"""Paths whose every request leaves a receipt, and the name it has there."""
Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def build_app(
    router: Router,
    receipts: ReceiptStore,
    *,
    host: str = "127.0.0.1",
    keys: Iterable[str] = (),
    allowed_hosts: Iterable[str] = (),
    cors_origins: Iterable[str] = (),
    max_body: int = 8 << 20,
    body_s: float | None = 60.0,
    total_s: float | None = None,
    keepalive_s: float = 15.0,
    capture: bool = False,
    state: State | None = None,
    lifespan: Lifespan | None = None,
    admin: Admin | None = None,
    feedback: FeedbackPage | None = None,
    ollama: Callable[[Router, Limits, bool], list[Route]] | None = None,
) -> ASGIApp:
    """Everything a server needs but the socket. The router may still be loading.

    Args:
        host: the address bound to; on loopback the Host header is checked.
        keys: API keys with every scope; none, and none in ``state``, means no key is asked for.
        cors_origins: web pages that may call.
        max_body: bytes. body_s: longest wait for a body. total_s: longest time for an answer.
        keepalive_s: silence after which a stream gets a comment.
        feedback: what answers were worth; None has no such route.
        admin: models that can be seen, put to sleep and woken; None has no such routes.
        ollama: makes Ollama's paths (``endpoint.ollama``); None has none.
        capture: store prompts and outputs in receipts (unless a request says ``store: false``).
        state: what is kept between requests: answers, files, batches, keys. Without it those paths are 404.
    """
    limits = Limits(body=max_body, body_s=body_s, total_s=total_s, keepalive_s=keepalive_s)
    metrics = Metrics()
    router.listeners.append(metrics.observe)
    pages = Pages(router, receipts, metrics)
    chat_store = StoredChat(state.shelf, max_body=limits.body) if state else None
    chat = Generate(
        router,
        ChatDoor(),
        limits=limits,
        capture=capture,
        keep=chat_store.keep if chat_store else None,
    )
    completions = Generate(router, CompletionsDoor(), limits=limits, capture=capture)
    embeddings = Generate(router, EmbeddingsDoor(), limits=limits, capture=capture)
    messages = Generate(router, MessagesDoor(router), limits=limits, capture=capture)
    counting = MessagesDoor(router, need_max_tokens=False)
    post, get, delete = ["POST"], ["GET"], ["DELETE"]
    routes = [
        Route("/v1/chat/completions", chat, methods=post),
        Route("/v1/completions", completions, methods=post),
        Route("/v1/embeddings", embeddings, methods=post),
        Route("/v1/messages", messages, methods=post),
        Route("/v1/messages/count_tokens", CountTokens(router, counting, limits=limits), methods=post),
        Route("/v1/models", pages.models),
        Route("/v1/models/{id:path}", pages.model),
        Route("/v1/receipts", pages.receipts),
        Route("/v1/receipts/{id}", pages.receipt),
        Route("/tokenize", Tokenize(router, limits=limits), methods=post),
        Route("/detokenize", Detokenize(router, limits=limits), methods=post),
        Route("/apply-template", ApplyTemplate(router, limits=limits), methods=post),
        Route("/health", pages.health),
        Route("/ready", pages.ready),
        Route("/metrics", pages.metrics),
        Route("/openapi.json", pages.openapi),
    ]
    if state is not None and chat_store is not None:
        responses = Responses(router, state.shelf, store=state.keeping.store, limits=limits, capture=capture)
        stored = responses.stored
        key_pages = KeyPages(state.keys, max_body=limits.body)
        count = CountTokens(
            router,
            ResponseDoor(state.shelf, store=state.keeping.store),
            limits=limits,
            shape={"object": "response.input_tokens"},
        )
        routes += [
            Route("/v1/chat/completions", chat_store.list, methods=get),
            Route("/v1/chat/completions/{id}", chat_store.get, methods=get),
            Route("/v1/chat/completions/{id}", chat_store.update, methods=post),
            Route("/v1/chat/completions/{id}", chat_store.delete, methods=delete),
            Route("/v1/chat/completions/{id}/messages", chat_store.messages, methods=get),
            Route("/v1/responses", responses, methods=post),
            Route("/v1/responses/input_tokens", count, methods=post),
            Route("/v1/responses/compact", no_compaction, methods=post),
            Route("/v1/responses/{id}", stored.get, methods=get),
            Route("/v1/responses/{id}", stored.delete, methods=delete),
            Route("/v1/responses/{id}/cancel", responses.cancel, methods=post),
            Route("/v1/responses/{id}/input_items", stored.input_items, methods=get),
            Route("/v1/keys", key_pages.list, methods=get),
            Route("/v1/keys", key_pages.create, methods=post),
            Route("/v1/keys/{id}", key_pages.revoke, methods=delete),
        ]
        stored.bury()
        doors = {
            "/v1/chat/completions": chat,
            "/v1/completions": completions,
            "/v1/embeddings": embeddings,
            "/v1/responses": responses,
        }
        routes += state.routes(router, doors, limits)
    if ollama is not None:
        routes += ollama(router, limits, capture)
    if feedback is not None:
        routes.append(Route("/v1/feedback", feedback.create, methods=post))
    app = Starlette(
        routes=[*routes, *([] if admin is None else admin.routes())],
        exception_handlers={GalleyError: on_error, HTTPException: on_http_error, Exception: on_error},
        lifespan=lifespan,
    )
    # A redirect has no error object, and clients do not repeat a POST after one.
    app.router.redirect_slashes = False

    def refused(scope: Scope, error: GalleyError) -> str | None:
        """The receipt of a request turned away at the door; None where there is nothing to answer."""
        api = GENERATING.get(scope["path"])
        if api is None or scope["method"] != "POST":
            return None
        id = receipt_id()
        request = stub({}, request_id=scope["state"]["request_id"], api=api, key=None)
        router.refuse(request, error, receipt_id=id, started=time.monotonic())
        return id

    return Access(
        Straight(
            app, {"/v1/chat/completions": chat, "/v1/completions": completions, "/v1/messages": messages}
        ),
        host=host,
        keys=keys,
        store=state.keys if state else None,
        allowed_hosts=allowed_hosts,
        cors_origins=cors_origins,
        refused=refused,
    )


async def on_error(request: HTTPRequest, error: Exception) -> Response:
    """Any exception of a page as the four-key object."""
    shown = wire_error(error)
    response = failure(request, shown)
    response.raw_headers.extend(error_headers(shown))
    return response


def failure(request: HTTPRequest, error: GalleyError) -> Response:
    """An error in the dialect of the path."""
    dialect = dialect_of(request.url.path)
    body = dialect.body(error, request.scope.get("state", {}).get("request_id"))
    return respond(body, dialect.status(error))


async def on_http_error(request: HTTPRequest, error: Exception) -> Response:
    """Starlette's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    place = f"{request.method} {request.url.path[:200]}"
    shown: GalleyError
    if error.status_code == 404:
        bare = request.url.path.rstrip("/")
        hint = f"try {bare[:200]}" if bare and bare != request.url.path else None
        shown = NotFound(f"There is no {place} here.", hint=hint)
    else:
        shown = InvalidRequest(f"{place}: {error.detail}.", code="method_not_allowed")
    shown.status = error.status_code
    body = failure(request, shown)
    body.headers.update(error.headers or {})
    body.raw_headers.extend(error_headers(shown))
    return body


async def no_compaction(request: HTTPRequest) -> Response:
    """``POST /v1/responses/compact``: told apart from the path of a response called ``compact``."""
    raise NotFound("There is no POST /v1/responses/compact here: the client chooses what to send again.")


class Pages:
    """The small GET pages."""

    def __init__(self, router: Router, receipts: ReceiptStore, metrics: Metrics) -> None:
        self._router = router
        self._receipts = receipts
        self._metrics = metrics

    async def models(self, request: HTTPRequest) -> Response:
        """``GET /v1/models``: those the key may ask."""
        principal = principal_of(request)
        cards = [card for card in self._router.catalog.cards() if principal.may_ask(card.id)]
        return respond(
            {
                "object": "list",
                "data": [shown(card) for card in cards],
                "first_id": cards[0].id if cards else None,
                "last_id": cards[-1].id if cards else None,
                "has_more": False,
            }
        )

    async def model(self, request: HTTPRequest) -> Response:
        """``GET /v1/models/{id}``; an alias leads to its model."""
        name = request.path_params["id"]
        if not name:
            raise HTTPException(404)
        card, _ = self._router.catalog.find(name)
        principal_of(request).need_model(card.id, name)
        return respond(shown(card))

    async def openapi(self, request: HTTPRequest) -> Response:
        """This server's own OpenAPI document."""
        return respond(document())

    async def health(self, request: HTTPRequest) -> Response:
        """200 while the process serves at all; the details say how well."""
        store = self._receipts
        router = self._router
        whole = store.fault is None and (router.auditor is None or router.auditor.fault is None)
        return respond(
            {
                "status": "ok" if whole and router.state != "failed" else "degraded",
                "state": router.state,
                "failure": router.failure,
                "version": __version__,
                "models": [card.id for card in router.catalog.cards()],
                "active_requests": router.active,
                "receipts": {
                    "failures": store.failures,
                    "duplicates": store.duplicates,
                    "fault": store.fault,
                },
                "audit": None
                if router.auditor is None
                else {"failures": router.auditor.failures, "fault": router.auditor.fault},
            }
        )

    async def ready(self, request: HTTPRequest) -> Response:
        """200 when requests are admitted, else 503 with the reason."""
        self._router.admit()
        return respond({"status": "ready"})

    async def metrics(self, request: HTTPRequest) -> Response:
        """Prometheus text."""
        loads = {
            card.id: provider.load()
            for provider in self._router.catalog.providers()
            for card in provider.cards
        }
        gauges = {
            "galley:receipt_failures_total": float(self._receipts.failures),
            "galley:receipt_duplicates_total": float(self._receipts.duplicates),
            "galley:audit_failures_total": float(
                0 if self._router.auditor is None else self._router.auditor.failures
            ),
            "galley:active_requests": float(self._router.active),
            "galley:ready": float(self._router.state == "ready"),
        }
        text = self._metrics.render(loads, gauges)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def receipt(self, request: HTTPRequest) -> Response:
        """``GET /v1/receipts/{id}``."""
        id = request.path_params["id"]
        found = await asyncio.to_thread(self._receipts.get, id)
        if found is None:
            raise NotFound(f"There is no receipt {id[:100]!r}.", param="id")
        return respond(found)

    async def receipts(self, request: HTTPRequest) -> Response:
        """``GET /v1/receipts?limit=&model=&user=&since=&before=``, newest first; times in Unix seconds."""
        query = request.query_params
        unknown = set(query) - {"limit", "model", "user", "since", "before"}
        if unknown:
            raise InvalidRequest(
                f"Unknown query parameter {min(unknown)[:100]!r}.",
                param=min(unknown)[:100],
                code="unknown_parameter",
            )
        limit = int(number(query.get("limit", "20"), "limit", whole=True))
        if not 1 <= limit <= MAX_LISTED:
            below = limit < 1
            raise InvalidRequest(
                f"'limit' must be between 1 and {MAX_LISTED}.",
                param="limit",
                code="integer_below_min_value" if below else "integer_above_max_value",
            )
        found = await asyncio.to_thread(
            self._receipts.list,
            limit + 1,  # one more tells whether there are more
            model=query.get("model"),
            user=query.get("user"),
            since=number(query["since"], "since") if "since" in query else None,
            before=number(query["before"], "before") if "before" in query else None,
        )
        return respond({"object": "list", "data": found[:limit], "has_more": len(found) > limit})


def number(text: str, name: str, *, whole: bool = False) -> float:
    """A query parameter as a finite number."""
    try:
        value = float(int(text)) if whole else float(text)
        if abs(value) <= 1e15:
            return value
    except (ValueError, OverflowError):
        pass
    raise InvalidRequest(f"{name!r} must be a number.", param=name, code="invalid_type")


def shown(card: ModelCard) -> dict[str, Any]:
    """A model in OpenAI's form, with what vLLM's and Anthropic's clients look for."""
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "galley",
        "root": card.id,
        "parent": card.parent,
        "max_model_len": card.context,
        "quantization": card.quantization,
        "location": card.location,
        "capabilities": [
            "completion",
            *(["chat"] if card.chat else []),
            *(["embedding"] if card.embedding else []),
        ],
        "price": None,
        "type": "model",
        "display_name": card.id,
        "created_at": datetime.fromtimestamp(card.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
