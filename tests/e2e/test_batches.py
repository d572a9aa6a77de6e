"""A batch in a serving process that is killed with -9, again and again."""

import json
import signal
import time
from collections import Counter

import httpx
import pytest

from tests.e2e.test_server_life import start  # noqa: F401  (a fixture)


def lines(count: int) -> bytes:
    out = []
    for i in range(count):
        body = {"model": "tiny", "prompt": f"number {i}", "max_tokens": 40, "ignore_eos": True, "seed": i}
        entry = {"custom_id": f"line-{i}", "method": "POST", "url": "/v1/completions", "body": body}
        out.append(json.dumps(entry))
    return ("\n".join(out) + "\n").encode()


def url_of(process) -> str:
    return process.wait_for("ready after").split(" at ")[1].split("/v1")[0] + "/v1"


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_killed_three_times_every_line_is_put_out_once(start, count):  # noqa: F811
    process = start("batch_lines=2")
    with httpx.Client(base_url=url_of(process), timeout=30) as http:
        form = {"purpose": "batch"}
        file = http.post("/files", files={"file": ("in.jsonl", lines(count))}, data=form).json()
        window = {"endpoint": "/v1/completions", "completion_window": "24h", "input_file_id": file["id"]}
        id = http.post("/batches", json=window).json()["id"]
    killed = []
    deadline = time.monotonic() + 240
    for share in (0.1, 0.4, 0.7, None):
        with httpx.Client(base_url=url_of(process), timeout=30) as http:
            while True:
                batch = http.get(f"/batches/{id}").json()
                done = batch["request_counts"]["completed"]
                if batch["status"] == "completed" or (share is not None and done >= share * count):
                    break
                assert time.monotonic() < deadline, batch
                time.sleep(0.005)
            if share is None:
                break
            assert batch["status"] in ("in_progress", "finalizing"), (
                "the batch was done before it could be killed"
            )
            process.child.send_signal(signal.SIGKILL)
            process.finish()
            killed.append(done)
        process = start("batch_lines=2")
    assert len(killed) == 3 and batch["status"] == "completed"
    assert batch["request_counts"] == {"total": count, "completed": count, "failed": 0}
    with httpx.Client(base_url=url_of(process), timeout=30) as http:
        out = http.get(f"/files/{batch['output_file_id']}/content").text.splitlines()
    ids = Counter(json.loads(line)["custom_id"] for line in out)
    assert ids == Counter(f"line-{i}" for i in range(count))
    print(f"killed after {killed} of {count} lines")
