"""A whole server with a catalog: answers from elsewhere over HTTP, refusals with reasons, hot reload."""

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request

import pytest

from tests.e2e.conftest import TinyServer
from tests.tiny import tiny_gguf
from tests.upstream import WORDS, MockUpstream


class Elsewhere:
    """A mock upstream on a loop of its own."""

    def __init__(self, **options):
        self.up = MockUpstream(**options)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self):
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self.up.start(), self.loop).result(10)
        return self.up

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self.up.kill(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


def catalog(up, location="any", model="big"):
    return f"""
[policy]
location = "{location}"
[[model]]
id = "{model}"
context = 8192
[[provider]]
name = "cloud"
kind = "openai"
url = "{up.url}"
[[provider.offer]]
model = "{model}"
price = [{{ input = "1", output = "2" }}]
"""


def post(server, **body):
    """(status, headers, raw body)."""
    body = {"messages": [{"role": "user", "content": "Six by seven?"}], **body}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@pytest.fixture
def place(tmp_path):
    model = tmp_path / "tiny.gguf"
    tiny_gguf(model)
    return tmp_path, model


def test_elsewhere_refusals_and_reload(place):
    home, model = place
    with Elsewhere() as up:
        file = home / "catalog.toml"
        file.write_text(catalog(up))
        server = TinyServer(home, model, **{"router.catalog": str(file)}).start()
        try:
            status, headers, raw = post(server, model="big")
            answer = json.loads(raw)
            assert status == 200 and answer["choices"][0]["message"]["content"] == "".join(WORDS)
            assert answer["model"] == "big" and headers["x-galley-served-by"] == "cloud:big@cloud"
            assert answer["usage"]["completion_tokens"] == len(WORDS)
            with urllib.request.urlopen(f"{server.url}/v1/receipts/{headers['x-galley-receipt']}") as reply:
                receipt = json.load(reply)
            assert receipt["route"]["location"] == "cloud" and receipt["attempts"][0]["outcome"] == "won"
            assert sum(line["pico"] for line in receipt["price_lines"]) == 11 * 10**6 + 6 * 2 * 10**6

            status, headers, raw = post(server, model="big", stream=True)
            assert status == 200 and raw.endswith(b"data: [DONE]\n\n") and b"forty" in raw

            up.script = ["cut"]
            status, headers, raw = post(server, model="big", stream=True)
            assert status == 200 and b'"error"' in raw and b"[DONE]" not in raw, "never a clean end"

            status, headers, raw = post(server, model="big", metadata={"galley.local_only": "true"})
            assert status == 403 and "local-only" in json.loads(raw)["error"]["message"]
            status, _, raw = post(server, model=server.model, max_tokens=2)
            assert status == 200, "the local model is still there"

            file.write_text("nonsense = [")
            time.sleep(1.5)
            assert post(server, model="big")[0] == 200, "a wrong catalog changes nothing"
            file.write_text(catalog(up, model="huge"))
            deadline = time.monotonic() + 20
            while post(server, model="huge")[0] != 200:
                assert time.monotonic() < deadline, "the changed catalog was not taken up"
                time.sleep(0.2)
            assert post(server, model="big")[0] == 404
        finally:
            server.stop()
