"""The small pages, the door's guard, and the metrics."""

import asyncio
import threading

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from galley.endpoint.access import check_bind, is_loopback
from galley.endpoint.metrics import Histogram
from galley.errors import ConfigError
from tests.unit.endpoint.fake import FakeProvider


async def test_models(desk):
    listed = (await desk.http.get("/v1/models")).json()
    assert [m["id"] for m in listed["data"]] == ["fake-1b"] and listed["data"][0]["max_model_len"] == 100
    assert (await desk.http.get("/v1/models/fake")).json()["id"] == "fake-1b"
    assert (await desk.http.get("/v1/models/org/none")).status_code == 404


async def test_alias_is_routed_and_recorded(desk):
    response = await desk.chat(model="fake")
    assert response.json()["model"] == "fake-1b"
    receipt = await desk.receipt(response)
    assert receipt["route"]["model"] == "fake-1b" and receipt["route"]["rule"] == "fixed"
    assert "alias" in receipt["route"]["reason"]


async def test_receipts_are_listed_newest_first(desk):
    made = [(await desk.chat(user=f"u{i}")).headers["x-galley-receipt"] for i in range(3)]
    listed = (await desk.http.get("/v1/receipts?limit=2")).json()
    assert [r["id"] for r in listed["data"]] == made[:0:-1] and listed["has_more"]
    assert not (await desk.http.get("/v1/receipts?limit=3")).json()["has_more"]
    only = (await desk.http.get("/v1/receipts", params={"user": "u0", "model": "fake-1b", "since": 0})).json()
    assert [r["id"] for r in only["data"]] == made[:1]
    assert (await desk.http.get("/v1/receipts/rcp_nope")).status_code == 404


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=5000", "limit"),
        ("limit=x", "limit"),
        ("since=nan", "since"),
        ("a=1", "a"),
    ],
)
async def test_receipt_queries_are_checked(desk, query, param):
    response = await desk.http.get(f"/v1/receipts?{query}")
    assert response.status_code == 400 and response.json()["error"]["param"] == param


async def test_tokens_and_templates(desk):
    ids = (await desk.http.post("/tokenize", json={"model": "fake", "prompt": "hé"})).json()
    assert ids["tokens"] == [1, *"hé".encode()] and ids["count"] == 4 and ids["max_model_len"] == 100
    bare = await desk.http.post("/tokenize", json={"prompt": "h", "add_special_tokens": False, "huh": 1})
    assert bare.json()["tokens"] == [104] and bare.headers["x-galley-ignored-params"] == "huh"
    chat = {"messages": [{"role": "user", "content": "x"}]}
    assert (await desk.http.post("/tokenize", json=chat)).json()["count"] == 7
    assert (await desk.http.post("/apply-template", json=chat)).json() == {"prompt": "<user>x"}
    back = await desk.http.post("/detokenize", json={"tokens": [104, 105]})
    assert back.json() == {"prompt": "hi"}
    for path, body, param in [
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": [999]}, "tokens[0]"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/apply-template", {}, "messages"),
        ("/tokenize", {"model": "zzz", "prompt": "x"}, "model"),
    ]:
        response = await desk.http.post(path, json=body)
        assert response.status_code in (400, 404) and response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "x" * 40_000}),
        ("/detokenize", {"tokens": [104] * 40_000}),
        ("/apply-template", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
async def test_large_texts_do_not_stall_the_server(desk, path, body):
    desk.provider.gate = threading.Event()
    asked = asyncio.create_task(desk.http.post(path, json=body))
    try:
        await asyncio.sleep(0.05)
        assert (await desk.http.get("/health")).status_code == 200
        assert not asked.done()
    finally:
        desk.provider.gate.set()
    assert (await asked).status_code == 200


async def test_key_is_asked_for(open_desk):
    desk = open_desk(keys=["sk-right", "sk-other"])
    for headers in ({}, {"authorization": "Bearer sk-wrong"}, {"authorization": "sk-right"}):
        response = await desk.http.get("/v1/models", headers=headers)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert "x-request-id" in response.headers
    assert (await desk.http.get("/health")).status_code == 200
    assert (await desk.http.get("/metrics")).status_code == 401
    desk.http.headers["authorization"] = "Bearer sk-other"
    receipt = await desk.receipt(await desk.chat())
    assert receipt["key"].startswith("key_") and "sk-" not in receipt["key"]


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:80", "127.0.0.1.evil.example", ""])
async def test_foreign_host_header_is_refused_on_loopback(desk, host):
    response = await desk.http.get("/v1/models", headers={"host": host})
    assert response.status_code == 403 and response.json()["error"]["code"] == "host_not_allowed"
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("host", ["localhost:7117", "127.0.0.1", "[::1]:7117", "LOCALHOST", "box.lan:1"])
async def test_own_host_header_is_served(open_desk, host):
    desk = open_desk(allowed_hosts=["box.lan"])
    assert (await desk.http.get("/v1/models", headers={"host": host})).status_code == 200


async def test_host_is_not_checked_beyond_loopback(open_desk):
    desk = open_desk(host="0.0.0.0", keys=["k"])
    ok = {"host": "any.name", "authorization": "Bearer k"}
    assert (await desk.http.get("/v1/models", headers=ok)).status_code == 200


def test_bind_beyond_loopback_needs_a_key():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        with pytest.raises(ConfigError) as caught:
            check_bind(host, None)
        assert caught.value.exit_code == 2
        check_bind(host, "key")
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert is_loopback(host)
        check_bind(host, None)


async def scrape(http: httpx.AsyncClient) -> dict[tuple, float]:
    text = (await http.get("/metrics")).text
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "a family is declared once"
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


VLLM_NAMES = set(
    """num_requests_running num_requests_waiting kv_cache_usage_perc gpu_cache_usage_perc
prefix_cache_queries_total prefix_cache_hits_total prompt_tokens_total generation_tokens_total
request_success_total num_preemptions_total cache_config_info time_to_first_token_seconds_bucket
inter_token_latency_seconds_bucket time_per_output_token_seconds_sum e2e_request_latency_seconds_count
request_queue_time_seconds_bucket request_prompt_tokens_bucket request_generation_tokens_sum""".split()  # noqa: SIM905
)


async def test_metrics_have_vllms_names_and_count_receipts(desk):
    for _ in range(2):
        await desk.chat()
    await desk.chat(n=0)
    found = await scrape(desk.http)
    names = {name for name, _ in found}
    assert {f"vllm:{name}" for name in VLLM_NAMES} <= names
    model = ("model_name", "fake-1b")
    assert found["vllm:generation_tokens_total", (model,)] == 6
    assert found["vllm:request_success_total", (("finished_reason", "stop"), model)] == 2
    assert found["vllm:e2e_request_latency_seconds_count", (model,)] == 2
    assert found["vllm:request_generation_tokens_bucket", (("le", "5.0"), model)] == 2
    assert found["galley:requests_total", (("model_name", ""), ("status", "error"))] == 1
    assert found["galley:receipt_failures_total", ()] == 0


async def test_receipt_failures_show_in_metrics_and_health(desk, monkeypatch, capsys):
    import sqlite3

    def refuse():
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(desk.store, "_connect", refuse)
    response = await desk.chat(stream=True)
    assert response.status_code == 200 and response.text.endswith("data: [DONE]\n\n")
    desk.store.flush(5)
    assert (await scrape(desk.http))["galley:receipt_failures_total", ()] == 1
    health = (await desk.http.get("/health")).json()
    assert health["status"] == "degraded" and "full" in health["receipts"]["fault"]
    assert response.headers["x-galley-receipt"] in capsys.readouterr().err


def test_histogram_is_cumulative():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    lines = list(histogram.lines("h", 'a"b'))
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["2", "3", "4", "12.0", "4"]
    assert 'model_name="a\\"b"' in lines[0]


async def test_invented_model_names_do_not_become_labels(open_desk):
    desk = open_desk(FakeProvider())
    for i in range(5):
        await desk.chat(model=f"nope-{i}")
    assert "nope" not in (await desk.http.get("/metrics")).text
