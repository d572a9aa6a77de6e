"""A secret in a prompt or a header reaches no sink: no file of the home, no metrics, no stdout or stderr."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from tests.e2e.conftest import TinyServer

CANARY = "canary 7Qx the treasure lies under the third oak 9Zk"
KEY = "sk-canary-header-5f1e0c7ab2d84e6f9a"


def spellings(server: TinyServer) -> dict[str, bytes]:
    """Forms in which the secret could lie somewhere."""
    ids = server.opened.provider.encode(CANARY, special=False)
    raw = CANARY.encode()
    return {
        "text": raw,
        "part": b"under the third oak",
        "utf-16": CANARY.encode("utf-16-le"),
        "hex": raw.hex().encode(),
        "base64": base64.b64encode(raw)[:-4],
        "url": quote(CANARY).encode(),
        "ids as uint32": struct.pack(f"<{len(ids)}I", *ids)[4:-4],
        "ids as int64": struct.pack(f"<{len(ids)}q", *ids)[8:-8],
        "ids as JSON": json.dumps(ids[2:-2], separators=(",", ":"))[1:-1].encode(),
        "ids as spaced JSON": json.dumps(ids[2:-2])[1:-1].encode(),
        "the key": KEY.encode(),
        "the key, url": quote(KEY).encode(),
    }


@pytest.mark.parametrize("mode", ["strict", "on"])
def test_a_secret_reaches_no_sink(
    tiny_serve: Callable[..., TinyServer], tmp_path: Path, capfd: pytest.CaptureFixture[str], mode: str
) -> None:
    server = tiny_serve(
        **{"audit.mode": mode, "server.api_key": KEY, "disk_bytes": "64MiB", "context": 512, "idle_s": 0.0}
    )
    http = httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
    long = f"{CANARY} " * 2
    turn = [{"role": "user", "content": long}]
    name = server.model
    answers = [
        http.post("/v1/completions", json={"model": name, "prompt": long, "max_tokens": 8, "stream": stream})
        for stream in (False, True)
    ]
    brief = {"model": name, "store": False, "max_output_tokens": 8}
    answers += [
        http.post("/v1/completions", json={"model": name, "prompt": long, "max_tokens": 4, "temperature": 9}),
        http.post("/v1/completions", json={"model": name, "prompt": long * 200, "max_tokens": 4}),
        http.post("/v1/completions", json={"model": name, "prompt": [{"text": CANARY}], "max_tokens": 4}),
        http.post("/v1/chat/completions", json={"model": name, "messages": turn, "store": False}),
        http.post("/v1/chat/completions", json={"model": name, "messages": [{"role": CANARY}]}),
        http.post("/v1/responses", json={**brief, "input": long}),
        http.post("/v1/responses", json={"model": name, "input": [{"type": CANARY}], "store": False}),
        http.post("/v1/messages", json={"model": name, "max_tokens": 8, "messages": turn}),
        http.post("/v1/chat/completions", content=json.dumps({"messages": turn})[:-9]),
        http.post("/v1/completions", json={"prompt": CANARY}, headers={"authorization": "Bearer x"}),
    ]
    assert [answer.status_code for answer in answers[:2]] == [200, 200]
    assert answers[-1].status_code == 401
    seen = {
        "metrics": http.get("/metrics").content,
        "receipts": http.get("/v1/receipts?limit=50").content,
        "health": http.get("/health").content,
        "status": http.get("/v1/x/status").content,
    }
    http.close()
    forms = spellings(server)
    server.idle()
    assert server.server.scribe is not None
    server.server.scribe.flush(60)
    server.server.receipts.flush(60)
    output = capfd.readouterr()
    seen |= {"stdout": output.out.encode(), "stderr": output.err.encode()}
    for path in tmp_path.rglob("*"):
        if path.is_file():
            seen[str(path.relative_to(tmp_path))] = path.read_bytes()
    assert "receipts.db" in seen and any(name.startswith("audit/tile/entries") for name in seen)
    assert any(name.startswith("kv/") for name in seen), "the disk tier was at work"
    found = {f"{sink}: {form}" for sink, data in seen.items() for form, text in forms.items() if text in data}
    assert not found
