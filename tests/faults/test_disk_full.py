"""A disk that is full while receipts are written: the answer streams, the fault is loud and counted."""

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

SERVER = """
import asyncio, resource, signal, sys
from pathlib import Path
import uvicorn
from galley.audit.receipts import ReceiptStore
from galley.endpoint.app import build_app
from galley.router.router import Router
from tests.unit.endpoint.fake import FakeProvider
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = ReceiptStore(Path(sys.argv[1]), retry_s=0.2)
router = Router([FakeProvider()], store)
server = uvicorn.Server(uvicorn.Config(build_app(router, store), port=0, log_level="error"))
async def main():
    task = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    # From here on the kernel refuses to let any file of this process grow past this many bytes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await task
asyncio.run(main())
"""


@pytest.mark.parametrize("room", [0, 50_000])
def test_answers_go_on_and_no_receipt_is_lost(tmp_path: Path, room: int):
    path = tmp_path / "receipts.db"
    child = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(path), str(room)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    ids = []
    try:
        url = f"http://127.0.0.1:{int(child.stdout.readline())}"
        body = {"model": "fake-1b", "prompt": "hi", "stream": True}
        with httpx.Client(base_url=url) as client:
            for _ in range(60):
                answer = client.post("/v1/completions", json=body)
                assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
                ids.append(answer.headers["x-galley-receipt"])
                shown = client.get(f"/v1/receipts/{ids[-1]}")
                assert shown.status_code == 200, "a receipt that could not be stored can still be read"
            deadline = time.monotonic() + 10
            failures = 0.0
            while not failures and time.monotonic() < deadline:
                lines = client.get("/metrics").text.splitlines()
                failures = float(
                    next(x for x in lines if x.startswith("galley:receipt_failures_total")).split()[1]
                )
            assert failures > 0
            health = client.get("/health").json()
            assert health["status"] == "degraded" and health["receipts"]["fault"]
    finally:
        child.terminate()
        _, told = child.communicate(timeout=20)
    loud = {
        json.loads(line[line.index('{"id"') :])["id"]
        for line in told.splitlines()
        if "RECEIPT NOT STORED" in line
    }
    assert loud and loud <= set(ids)
    from galley.audit.receipts import ReceiptStore

    store = ReceiptStore(path)
    store.replay()
    store.flush(5)
    stored = {receipt.id for receipt in store.list(1000)}
    store.close()
    assert stored | loud == set(ids)
