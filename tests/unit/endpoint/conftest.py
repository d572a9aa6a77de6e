"""An endpoint over a scripted provider, asked without a socket."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from galley.audit.receipts import ReceiptStore
from galley.economics.price import FREE
from galley.endpoint.app import build_app
from galley.endpoint.state import State
from galley.router.catalog import Catalog
from galley.router.router import Router
from tests.unit.endpoint.fake import FakeProvider


class Desk:
    """A server's inside: app, router, provider, receipts, and a client."""

    def __init__(self, path: Path, provider: FakeProvider, **options: object) -> None:
        self.provider = provider
        self.store = ReceiptStore(path / "receipts.db", batch_s=0.001)
        self.ledger = options.pop("ledger", None)
        own = options.pop("own", FREE)
        catalog = Catalog({"fake": "fake-1b"}, own=own)
        self.router = Router([provider], self.store, catalog=catalog, ledger=self.ledger)
        self.state = State(path / "home", options.pop("keeping", None))
        self.app = build_app(self.router, self.store, state=self.state, **options)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False), base_url="http://127.0.0.1"
        )

    async def chat(self, **fields: object) -> httpx.Response:
        body = {"model": "fake-1b", "messages": [{"role": "user", "content": "hi"}]} | fields
        return await self.http.post("/v1/chat/completions", json=body)

    async def complete(self, **fields: object) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": "fake-1b", "prompt": "hi"} | fields)

    async def receipt(self, response: httpx.Response) -> dict:
        found = await self.http.get(f"/v1/receipts/{response.headers['x-galley-receipt']}")
        assert found.status_code == 200
        return found.json()


@pytest.fixture
def open_desk(tmp_path: Path):
    desks: list[Desk] = []

    def make(provider: FakeProvider | None = None, **options: object) -> Desk:
        desks.append(Desk(tmp_path, provider or FakeProvider(), **options))
        return desks[-1]

    yield make
    for desk in desks:
        desk.store.close()
        desk.state.close()
        if desk.ledger is not None:
            desk.ledger.close()


@pytest.fixture
def desk(open_desk: Callable[..., Desk]) -> Desk:
    return open_desk()
