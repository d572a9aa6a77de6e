"""Birth and death of a serving process: loading, draining, exit codes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from galley.audit.receipts import ReceiptStore

SERVE = """
import sys
from galley import config
from galley.endpoint.serve import serve
from galley.errors import GalleyError
home, model, *rest = sys.argv[1:]
flags = dict(pair.split("=", 1) for pair in rest)
try:
    settings = {"home": home, "model": model, "port": 0, "kv_memory": "8MiB", "threads": 1} | flags
    serve(config.load(settings, env={}))
except GalleyError as error:
    print(f"{error.code}: {error.message}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


class Process:
    """A serving process and what it says on stderr."""

    def __init__(self, home: Path, model: Path, *flags: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(home), str(model), *flags],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            self.lines.append(line.rstrip())
        self.child.stderr.close()

    def wait_for(self, words: str, within_s: float = 60) -> str:
        deadline = time.monotonic() + within_s
        while True:
            for line in self.lines:
                if words in line:
                    return line
            assert time.monotonic() < deadline and self.child.poll() is None, "\n".join(self.lines)
            time.sleep(0.01)

    def finish(self, within_s: float = 30) -> int:
        code = self.child.wait(within_s)
        self.reader.join(5)
        return code


@pytest.fixture
def start(tmp_path: Path, tiny_path: Path):
    started: list[Process] = []

    def run(*flags: str, model: Path = tiny_path) -> Process:
        started.append(Process(tmp_path, model, *flags))
        return started[-1]

    yield run
    for process in started:
        if process.child.poll() is None:
            process.child.kill()
        process.finish()


def test_can6_sigterm_lets_a_running_answer_finish_and_exits_0(start, tmp_path):
    process = start()
    url = process.wait_for("ready after").split(" at ")[1].split("/v1")[0]
    body = {"model": "tiny", "prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as stream:
        pieces = stream.iter_text()
        text = next(pieces)
        process.child.send_signal(signal.SIGTERM)
        text += "".join(pieces)
        id = stream.headers["x-galley-receipt"]
    assert text.endswith("data: [DONE]\n\n")
    assert process.finish() == 0, process.lines
    assert any("every receipt is written" in line for line in process.lines)
    receipt = ReceiptStore(tmp_path / "receipts.db").get(id)
    assert receipt is not None and receipt.status == "ok" and receipt.usage.completion_tokens == 300


def test_banner_says_what_runs(start):
    process = start()
    process.wait_for("ready after")
    said = "\n".join(process.lines)
    for words in (
        "listening on http://127.0.0.1:",
        "model tiny: llama",
        "backend ",
        " threads",
        "KV ",
        "context ",
    ):
        assert words in said
    process.child.send_signal(signal.SIGINT)
    assert process.finish() == 0


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("host=0.0.0.0",), 2, "Refusing to listen"),
        (("context=999999",), 2, "context"),
        (("backend=reference", "isa=avx2"), 2, "isa"),
    ],
)
def test_refusals_have_their_exit_codes(start, flags, code, words):
    process = start(*flags)
    assert process.finish() == code and any(words in line for line in process.lines), process.lines


def test_missing_and_broken_models(start, tmp_path):
    assert start(model=Path("no-such-model")).finish() == 3
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 100)
    process = start(model=broken)
    assert process.finish() == 3 and any("bad_model_file" in line for line in process.lines)


def test_taken_port_is_a_usage_error(start):
    first = start()
    port = first.wait_for("listening on").split("127.0.0.1:")[1].split(";")[0]
    second = start(f"port={port}")
    assert second.finish() == 2 and any("Cannot listen" in line for line in second.lines)


def test_socket_answers_while_the_model_loads(tmp_path, tiny_path):
    from tests.e2e.conftest import TinyServer

    gate = threading.Event()
    tiny = TinyServer(tmp_path, tiny_path)
    open_model = tiny.server._open_model

    def slowly():
        gate.wait(30)
        return open_model()

    tiny.server._open_model = slowly
    tiny.thread.start()
    while not tiny.server._listener.started:
        time.sleep(0.01)
    try:
        assert httpx.get(f"{tiny.url}/health").status_code == 200
        ready = httpx.get(f"{tiny.url}/ready")
        assert ready.status_code == 503 and ready.json()["error"]["code"] == "model_loading"
        assert ready.headers["retry-after"] == "1"
    finally:
        gate.set()
    deadline = time.monotonic() + 30
    while httpx.get(f"{tiny.url}/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    tiny.stop()


@pytest.mark.parametrize("how", ["reading", "not reading", "uploading"])
def test_second_signal_cancels_and_still_leaves_every_receipt(start, tmp_path, how):
    process = start()
    url = process.wait_for("ready after").split(" at ")[1].split("/v1")[0]
    port = int(url.rpartition(":")[2])
    body = {
        "model": "tiny",
        "prompt": "x",
        "max_tokens": 480,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 20,
    }
    data = json.dumps(body | {"n": 16}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        if how == "uploading":
            client.sendall(head + data[:-5])
            time.sleep(0.3)
        else:
            client.sendall(head + data)
            assert b"200 OK" in client.recv(500)
        process.child.send_signal(signal.SIGTERM)
        process.wait_for("stopping") if how != "uploading" else time.sleep(0.2)
        process.child.send_signal(signal.SIGINT)
        said = b""
        if how == "reading":
            while piece := client.recv(1 << 16):
                said += piece
            assert b'"code":"cancelled"' in said and b"[DONE]" not in said
        assert process.finish() == 0, process.lines
    assert any("every receipt is written" in line for line in process.lines)
    assert not any("NOT STORED" in line or "Traceback" in line for line in process.lines), process.lines
    (receipt,) = ReceiptStore(tmp_path / "receipts.db").list()
    assert receipt.status == ("disconnected" if how == "uploading" else "cancelled")
    assert not (tmp_path / "receipts.spool.jsonl").exists()


def test_drain_that_runs_out_leaves_every_receipt(tmp_path, tiny_path):
    from tests.e2e.conftest import TinyServer

    tiny = TinyServer(tmp_path, tiny_path)
    tiny.server._drain_s = 0.1
    tiny.start()
    body = {"model": "tiny", "prompt": "x", "max_tokens": 480, "ignore_eos": True, "stream": True, "n": 16}
    with httpx.stream("POST", f"{tiny.url}/v1/completions", json=body, timeout=30) as stream:
        pieces = stream.iter_text()
        text = next(pieces)
        tiny.stop()
        text += "".join(pieces)
    assert '"code":"cancelled"' in text and "[DONE]" not in text
    (receipt,) = ReceiptStore(tmp_path / "receipts.db").list()
    assert (receipt.id, receipt.status) == (stream.headers["x-galley-receipt"], "cancelled")
