"""Many models in one server: sleep, wake, load, unload, budget; and what `galley ps` and `galley fit` say."""

import concurrent.futures
import json
import time
from pathlib import Path

import httpx
import pytest

from galley.cli.main import invoke
from tests.tiny import tiny_gguf

ADMIN = {"x-galley-admin-key": "sesame"}


@pytest.fixture
def serve(tmp_path: Path, tiny_serve):
    """Three models of one shape in the store; the first is open, the others are asked for."""
    for name in ("second", "third"):
        path = tiny_gguf(tmp_path / f"{name}.gguf", "llama", seed=len(name))
        assert invoke(["--home", str(tmp_path), "pull", str(path)]) == 0

    def start(**flags):
        return tiny_serve(**({"models": "second,third", "admin_key": "sesame"} | flags))

    return start


def ask(server, model, **more):
    body = {
        "model": model,
        "prompt": "hello there, " * 6,
        "max_tokens": 4,
        "ignore_eos": True,
        "seed": 1,
    }
    return httpx.post(f"{server.url}/v1/completions", json=body | more, timeout=60)


def admin(server, verb, model, headers=ADMIN, **more):
    return httpx.post(
        f"{server.url}/v1/admin/models/{verb}", json={"model": model} | more, headers=headers, timeout=60
    )


def states(server):
    return {one["id"]: one for one in httpx.get(f"{server.url}/v1/x/status").json()["data"]}


def wait_for(server, model, state, within_s=20.0):
    deadline = time.monotonic() + within_s
    while states(server)[model]["state"] != state:
        assert time.monotonic() < deadline, states(server)
        time.sleep(0.02)


def test_slp1_slp3_a_request_for_a_sleeping_model_wakes_it(serve):
    server = serve()
    assert states(server)["second"]["state"] == "asleep" and states(server)["second"]["bytes"] == 0
    assert {model["id"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]} >= {
        "second",
        "third",
    }
    answer = ask(server, "second")
    assert answer.status_code == 200 and answer.json()["model"] == "second"
    now = states(server)
    assert (
        now["second"]["state"] == "awake" and now["second"]["bytes"] > 0 and now["third"]["state"] == "asleep"
    )
    receipt = httpx.get(f"{server.url}/v1/receipts/{answer.headers['x-galley-receipt']}").json()
    assert receipt["digests"]["weights"] and receipt["route"]["model"] == "second"


def test_slp3_many_requests_for_a_sleeping_model_open_it_once(serve):
    server = serve()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(server, "second"), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1


def test_slp2_nothing_cached_survives_sleep(serve):
    server = serve()
    first = ask(server, server.model).json()
    cached = ask(server, server.model).json()
    assert cached["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert admin(server, "sleep", server.model).json()["state"] == "asleep"
    after = ask(server, server.model).json()
    assert after["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert after["choices"][0]["text"] == first["choices"][0]["text"]
    assert after["system_fingerprint"] == first["system_fingerprint"]


@pytest.mark.parametrize("level", [1, 2])
def test_slp1_sleep_waits_for_what_is_in_hand(serve, level):
    server = serve()
    run = server.engine.backend.run
    server.engine.backend.run = lambda rows: (time.sleep(0.01), run(rows))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, server, server.model, max_tokens=60)
        while not server.engine.stats().running:
            time.sleep(0.005)
        sleeping = pool.submit(admin, server, "sleep", server.model, level=level)
        wait_for(server, server.model, "draining")
        late = ask(server, server.model)  # comes while it drains: waits, and wakes it again
        assert running.result().json()["usage"]["completion_tokens"] == 60
        assert sleeping.result().status_code == 200 and late.status_code == 200
    assert states(server)[server.model]["state"] == "awake"
    assert admin(server, "sleep", server.model, level=level).json()["level"] == level


def test_slp4_idle_models_fall_asleep_and_pinned_ones_do_not(serve):
    server = serve(idle_s=0.3)
    assert admin(server, "pin", "second").status_code == 200
    assert ask(server, "second").status_code == ask(server, "third").status_code == 200
    wait_for(server, "third", "asleep")
    assert states(server)["second"]["state"] == "awake" and states(server)["second"]["sleeps_in_s"] is None


def test_slp4_the_least_recently_used_model_makes_room(serve):
    size = states(serve())["tiny"]["bytes"]
    server = serve(model_memory=int(2.5 * size))
    for model in ("second", "tiny", "third"):
        assert ask(server, model).status_code == 200
    now = states(server)
    assert (now["second"]["state"], now["tiny"]["state"], now["third"]["state"]) == (
        "asleep",
        "awake",
        "awake",
    )
    assert sum(one["bytes"] for one in now.values()) <= 2.5 * size


def test_slp4_no_room_is_said(serve):
    size = states(serve())["tiny"]["bytes"]
    server = serve(model_memory=int(1.5 * size))
    assert admin(server, "pin", "tiny").status_code == 200
    answer = ask(server, "second")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_memory"
    assert answer.headers["retry-after"] and ask(server, "tiny").status_code == 200


def test_slp5_waking_is_quicker_than_a_first_opening(serve):
    server = serve()
    assert ask(server, "second").status_code == 200
    cold = states(server)["second"]["wake_s"]
    warm = []
    for _ in range(3):
        assert admin(server, "sleep", "second").status_code == 200
        assert admin(server, "wake", "second").status_code == 200
        warm.append(states(server)["second"]["wake_s"])
    assert min(warm) < cold


def test_slp6_admin_is_off_by_default_and_asks_for_its_key(serve):
    off = serve(admin_key=None)
    assert admin(off, "sleep", "tiny").status_code == 404
    assert httpx.get(f"{off.url}/v1/admin/models", headers=ADMIN).status_code == 404
    server = serve()
    for headers in ({}, {"x-galley-admin-key": "wrong"}, {"authorization": "Bearer sesame"}):
        assert admin(server, "sleep", "tiny", headers=headers).status_code == 401
    assert httpx.get(f"{server.url}/v1/admin/models", headers=ADMIN).status_code == 200
    assert states(server)["tiny"]["state"] == "awake"


def test_models_are_loaded_and_unloaded_while_serving(serve):
    server = serve(models="")
    assert ask(server, "second").status_code == 404
    assert admin(server, "load", "second").json()["state"] == "awake"
    assert ask(server, "second").status_code == 200
    assert admin(server, "load", "second").status_code == 400
    assert admin(server, "unload", "second").status_code == 200
    assert ask(server, "second").status_code == 404 and "second" not in states(server)
    assert admin(server, "unload", "second").status_code == 404
    assert admin(server, "load", "no-such").status_code == 404
    assert admin(server, "sleep", "tiny", depth=2).json()["error"]["code"] == "unknown_parameter"


def test_ps_tells_the_truth(serve, capsys):
    server = serve()
    assert invoke(["ps", "--url", server.url, "--json"]) == 0
    assert {one["id"]: one["state"] for one in json.loads(capsys.readouterr().out)} == {
        "tiny": "awake", "second": "asleep", "third": "asleep"
    }  # fmt: skip
    admin(server, "sleep", "tiny")
    assert invoke(["ps", "--url", server.url]) == 0
    shown = capsys.readouterr().out
    assert shown.count("asleep") == 3 and "awake" not in shown
    assert invoke(["ps", "--url", "http://127.0.0.1:9"]) == 1
    assert "No Galley server" in capsys.readouterr().err


def test_fit_says_what_loading_then_does(serve, tmp_path, capsys):
    assert invoke(["--home", str(tmp_path), "fit", "second", "--kv-memory", "1MiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    server = serve(kv_memory=1 << 20)
    load = server.engine.stats()
    assert found["kv_tokens"] == load.blocks_total * load.block_size
    assert found["context"] == server.engine.context
    assert found["weight_bytes"] + found["kv_bytes"] == states(server)["tiny"]["bytes"]
    assert invoke(["--home", str(tmp_path), "fit", "second", "--kv-memory", "64KiB"]) == 0
    shown = capsys.readouterr().out
    assert "context 256 of the model's 512 tokens" in shown and "AT ONCE" in shown
    assert invoke(["--home", str(tmp_path), "fit", "second", "--kv-memory", "256GiB"]) == 1
    assert "more than there is" in capsys.readouterr().out
