"""Adapters loaded and unloaded while serving, on vLLM's paths and with its words."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from galley.endpoint.wire import Fields
from galley.errors import InvalidRequest
from galley.providers.adapters import Adapters
from galley.providers.fleet import Fleet
from galley.providers.resident import Resident
from galley.router.router import Router

__all__ = ["AdapterPages"]

Read = Callable[..., Awaitable[Fields]]


class AdapterPages:
    """``POST /v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``; ``GET /v1/admin/adapters``.

    Args:
        fields: reads a request's body once its admin key is checked.
        check: checks the key alone.
    """

    def __init__(
        self, fleet: Fleet, router: Router, *, fields: Read, check: Callable[[HTTPRequest], None]
    ) -> None:
        self._fleet = fleet
        self._router = router
        self._fields = fields
        self._check = check

    def routes(self) -> list[Route]:
        """What to serve."""
        return [
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
            Route("/v1/admin/adapters", self.shown),
        ]

    async def load(self, request: HTTPRequest) -> Response:
        """``{"lora_name", "lora_path", "base_model_name"}``; the last may be left out where one model is."""
        fields = await self._fields(request, "lora_name", "lora_path", "base_model_name")
        name = fields.checked(fields.need("lora_name"), "lora_name", 512)
        path = fields.checked(fields.need("lora_path"), "lora_path", 4096)
        base = self._base(fields.text("base_model_name", 512))
        catalog = self._router.catalog
        if not name or name in catalog.models or name in catalog.routes or name in catalog.aliases:
            raise InvalidRequest(f"The name {name[:100]!r} is taken.", param="lora_name", code="name_taken")
        provider = await base.awake()
        adapters = provider.adapters
        real = await asyncio.to_thread(adapters.check_path, Path(path))
        adapter = await asyncio.to_thread(adapters.read, name, real, provider.model.spec)
        adapters.add(adapter)
        catalog.add(base)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: HTTPRequest) -> Response:
        """``{"lora_name"}``: answers when the last request that uses it has ended."""
        fields = await self._fields(request, "lora_name", "lora_int_id")
        name = fields.checked(fields.need("lora_name"), "lora_name", 512)
        found = [pair for pair in self._served() if name in (one.name for one in pair[1].known())]
        if not found:
            raise self._router.catalog.unknown(name)
        resident, adapters = found[0]
        adapter = await adapters.unload(name)
        if resident.opened is not None:
            resident.opened.engine.forget_adapter(adapter.digest)
        self._router.catalog.remove(resident)
        self._router.catalog.add(resident)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def shown(self, request: HTTPRequest) -> Response:
        """Every adapter, with its base and the requests in hand that use it."""
        self._check(request)
        data: list[dict[str, Any]] = [
            {
                "id": adapter.name,
                "parent": resident.card.id,
                "rank": adapter.rank,
                "bytes": adapter.nbytes,
                "digest": adapter.digest,
                "path": str(adapter.path),
                "requests": adapters.users(adapter.name),
            }
            for resident, adapters in self._served()
            for adapter in adapters.known()
        ]
        body = msgspec.json.encode({"object": "list", "data": data})
        return Response(body, media_type="application/json")

    def _served(self) -> list[tuple[Resident, Adapters]]:
        return [(one, one.adapters) for one in self._fleet.residents() if one.adapters is not None]

    def _base(self, name: str | None) -> Resident:
        if name is not None:
            return self._fleet.find(name)
        residents = self._fleet.residents()
        if len(residents) != 1:
            raise InvalidRequest(
                "Several models are served: say which with 'base_model_name'.",
                param="base_model_name",
                code="missing_required_parameter",
            )
        return residents[0]
