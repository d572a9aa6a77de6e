"""Keys: scopes, models, revocation, what is on disk; CORS and request ids."""

import sqlite3

import httpx
import msgspec
import pytest

from galley.audit.receipts import ReceiptStore
from galley.endpoint.access import check_bind
from galley.endpoint.app import build_app
from galley.endpoint.keys import KeyStore
from galley.endpoint.state import State
from galley.errors import ConfigError, GalleyError, InvalidRequest, NotFound
from galley.router.catalog import Catalog, Document
from galley.router.router import Router
from tests.unit.endpoint.fake import FakeProvider


def bearer(secret):
    return {"authorization": f"Bearer {secret}"}


@pytest.fixture
def keys(desk):
    return desk.state.keys


async def ask(desk, secret, **fields):
    body = {"model": "fake-1b", "messages": [{"role": "user", "content": "hi"}]} | fields
    return await desk.http.post("/v1/chat/completions", json=body, headers=bearer(secret))


async def test_the_first_key_closes_the_door(desk, keys):
    assert (await desk.chat()).status_code == 200
    _, secret = keys.create("a")
    assert (await desk.chat()).status_code == 401
    assert (await ask(desk, secret)).status_code == 200
    assert (await desk.http.get("/health")).status_code == 200


async def test_a_secret_is_not_on_disk(desk, keys, tmp_path):
    key, secret = keys.create("a")
    keys.close()
    for path in (tmp_path / "home").iterdir():
        assert secret.encode() not in path.read_bytes() and secret[10:].encode() not in path.read_bytes()
    assert key.hint.endswith(secret[-4:]) and len(secret) > 50


async def test_scopes(desk, keys):
    _, asker = keys.create("asker")
    _, reader = keys.create("reader", scopes=["receipts"])
    _, batcher = keys.create("batcher", scopes=["batch"])
    _, admin = keys.create("admin", scopes=["admin"])
    table = {
        "/v1/receipts": {asker: 403, reader: 200, batcher: 403, admin: 200},
        "/metrics": {asker: 403, reader: 200, batcher: 403, admin: 200},
        "/v1/files": {asker: 403, reader: 403, batcher: 200, admin: 200},
        "/v1/batches": {asker: 403, reader: 403, batcher: 200, admin: 200},
        "/v1/keys": {asker: 403, reader: 403, batcher: 403, admin: 200},
        "/v1/models": {asker: 200, reader: 200, batcher: 200, admin: 200},
    }
    for path, expected in table.items():
        for secret, status in expected.items():
            response = await desk.http.get(path, headers=bearer(secret))
            assert response.status_code == status, (path, secret[:14])
            if status == 403:
                assert response.json()["error"]["code"] == "scope_missing"
    assert (await ask(desk, reader)).status_code == 403
    assert (await ask(desk, batcher)).status_code == 200
    assert (
        await desk.http.post("/tokenize", json={"prompt": "x"}, headers=bearer(reader))
    ).status_code == 403


async def test_model_lists(desk, keys):
    _, none = keys.create("none", models=["other"])
    _, by_alias = keys.create("alias", models=["fake"])
    _, by_name = keys.create("name", models=["fake-1b"])
    refused = await ask(desk, none)
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "model_not_allowed"
    assert refused.json()["error"]["param"] == "model" and "other" in refused.json()["error"]["message"]
    assert (await ask(desk, by_alias, model="fake")).status_code == 200
    assert (await ask(desk, by_alias, model="fake-1b")).status_code == 403
    assert (await ask(desk, by_name, model="fake")).status_code == 200
    listed = await desk.http.get("/v1/models", headers=bearer(none))
    assert listed.json()["data"] == []
    assert (await desk.http.get("/v1/models/fake-1b", headers=bearer(none))).status_code == 403
    tokens = await desk.http.post("/tokenize", json={"prompt": "x"}, headers=bearer(none))
    assert tokens.status_code == 403


async def test_a_list_of_models_holds_behind_routes_and_fallbacks(tmp_path):
    """What serves is on the key's list, whatever name was asked for."""
    document = {
        "model": [{"id": "a", "fallback": ["b"]}, {"id": "b"}, {"id": "c"}],
        "route": [{"name": "auto", "policy": "fixed", "models": ["b", "a"]}],
    }
    providers = {name: FakeProvider(name=name, context=4000) for name in "abc"}
    for name, provider in providers.items():
        provider.name = f"local-{name}"
    catalog = Catalog({"short": "a"}, msgspec.convert(document, Document))
    store, state = ReceiptStore(tmp_path / "r.db", batch_s=0.001), State(tmp_path / "home")
    router = Router(list(providers.values()), store, catalog=catalog)
    transport = httpx.ASGITransport(build_app(router, store, state=state))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:

        async def served(models, asked):
            _, secret = state.keys.create("k", models=models)
            body = {"model": asked, "messages": [{"role": "user", "content": "hi"}]}
            answer = await http.post("/v1/chat/completions", json=body, headers=bearer(secret))
            if answer.status_code == 200:
                return answer.json()["model"]
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_not_allowed")
            return None

        assert await served([], "auto") == "b"
        assert await served(["auto"], "auto") == "b" and await served(["auto"], "b") is None
        assert await served(["a"], "auto") == "a" and await served(["short"], "auto") == "a"
        assert await served(["c"], "auto") is None and await served(["c"], "c") == "c"
        providers["b"].full = True  # the first of the route: the next would be tried
        assert await served([], "auto") == "a"
        _, secret = state.keys.create("k", models=["b"])
        body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
        refused = await http.post("/v1/chat/completions", json=body, headers=bearer(secret))
        assert refused.status_code == 503, "a route must not lead past the key's list"
        providers["b"].full, providers["a"].full = False, True
        assert await served([], "a") == "b", "the declared fallback"
        _, secret = state.keys.create("k", models=["a"])
        refused = await http.post("/v1/chat/completions", json=body | {"model": "a"}, headers=bearer(secret))
        assert refused.status_code == 503, "a fallback must not lead past the key's list"
    state.close()
    store.close()


async def test_revoked_and_expired_keys(desk, keys, tmp_path):
    key, secret = keys.create("a")
    _, brief = keys.create("b", days=1e-9)
    assert (await ask(desk, secret)).status_code == 200 and (await ask(desk, brief)).status_code == 401
    other = KeyStore(tmp_path / "home" / "keys.db")  # as the command line does, in another process
    other.revoke(key.id)
    other.close()
    assert (await ask(desk, secret)).status_code == 401
    with pytest.raises(NotFound):
        keys.revoke("key_nope")


async def test_keys_over_http(desk, keys):
    closed = await desk.http.post("/v1/keys", json={})
    assert closed.status_code == 403 and "galley keys create" in closed.headers["x-galley-hint"]
    _, admin = keys.create("root", scopes=["admin"])
    made = await desk.http.post(
        "/v1/keys",
        json={"name": "n", "scopes": ["batch"], "models": ["fake"], "expires_in_days": 3},
        headers=bearer(admin),
    )
    body = made.json()
    assert made.status_code == 201 and body["scopes"] == ["batch"] and body["models"] == ["fake"]
    assert (await ask(desk, body["key"], model="fake")).status_code == 200
    listed = (await desk.http.get("/v1/keys", headers=bearer(admin))).json()["data"]
    assert [k["name"] for k in listed] == ["root", "n"] and not any("key" in k for k in listed)
    gone = await desk.http.delete(f"/v1/keys/{body['id']}", headers=bearer(admin))
    assert gone.json()["revoked"] and (await ask(desk, body["key"], model="fake")).status_code == 401
    for bad, param in (({"scopes": ["root"]}, "scopes[0]"), ({"expires_in_days": 0}, "days")):
        refused = await desk.http.post("/v1/keys", json=bad, headers=bearer(admin))
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param


async def test_answers_belong_to_their_key(desk, keys):
    _, mine = keys.create("mine")
    _, yours = keys.create("yours")
    body = {"model": "fake-1b", "input": "secret"}
    made = (await desk.http.post("/v1/responses", json=body, headers=bearer(mine))).json()
    path = f"/v1/responses/{made['id']}"
    assert (await desk.http.get(path, headers=bearer(mine))).status_code == 200
    for method in ("get", "delete"):
        assert (await desk.http.request(method, path, headers=bearer(yours))).status_code == 404
    more = body | {"previous_response_id": made["id"]}
    assert (await desk.http.post("/v1/responses", json=more, headers=bearer(yours))).status_code == 400


def test_a_bind_beyond_loopback_needs_some_key(tmp_path):
    store = KeyStore(tmp_path / "keys.db")
    with pytest.raises(ConfigError):
        check_bind("0.0.0.0", None, store)
    store.create("a")
    check_bind("0.0.0.0", None, store)
    store.close()


def test_a_newer_file_is_refused(tmp_path):
    store = KeyStore(tmp_path / "keys.db")
    store.create("a")
    store.close()
    db = sqlite3.connect(tmp_path / "keys.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(GalleyError, match="99"):
        store.used()
    store.close()


def test_bad_wishes(tmp_path):
    store = KeyStore(tmp_path / "keys.db")
    for wish in ({"scopes": []}, {"scopes": ["x"]}, {"days": -1}, {"name": "a\nb"}):
        with pytest.raises(InvalidRequest):
            store.create(**wish)
    assert store.all() == []


async def test_request_ids_are_honoured(desk):
    good = await desk.http.get("/health", headers={"x-request-id": "trace-1.a:b"})
    assert good.headers["x-request-id"] == "trace-1.a:b"
    bad = await desk.http.get("/health", headers={"x-request-id": "a b"})
    assert bad.headers["x-request-id"].startswith("req_")
    answer = await desk.http.post(
        "/v1/completions", json={"model": "fake-1b", "prompt": "x"}, headers={"x-request-id": "mine"}
    )
    assert (await desk.receipt(answer))["request_id"] == "mine"


async def test_cors_is_off_unless_listed(open_desk):
    shut = await open_desk().http.get("/v1/models", headers={"origin": "http://web.example"})
    assert not any(name.startswith("access-control") for name in shut.headers)
    desk = open_desk(cors_origins=["http://web.example"], keys=["sk-a"])
    ask = {"origin": "http://web.example", "access-control-request-method": "POST"}
    flight = await desk.http.options("/v1/chat/completions", headers=ask)
    assert flight.status_code == 204 and flight.headers["access-control-allow-origin"] == "http://web.example"
    other = await desk.http.options("/v1/chat/completions", headers=ask | {"origin": "http://evil.example"})
    assert other.status_code == 401 and "access-control-allow-origin" not in other.headers
    got = await desk.http.get("/v1/models", headers={"origin": "http://web.example", **bearer("sk-a")})
    assert (
        got.headers["access-control-allow-origin"] == "http://web.example" and got.headers["vary"] == "origin"
    )


async def test_time_limits(open_desk):
    slow = open_desk(FakeProvider(), total_s=7.0)
    await slow.chat()
    assert slow.provider.seen[-1].max_total_s == 7.0
