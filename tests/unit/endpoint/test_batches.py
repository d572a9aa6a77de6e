"""Files and batches: forms, validation, exactly once, cancelling, running out of time."""

import asyncio
import json
import time

import msgspec
import pytest

from galley.endpoint.batches.multipart import Begin, Data, Multipart, boundary_of
from galley.endpoint.state import Keeping
from galley.errors import EngineFault, InvalidRequest
from tests.unit.endpoint.fake import FakeProvider

WINDOW = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}


def line(i, **body):
    request = {"model": "fake-1b", "messages": [{"role": "user", "content": f"q{i}"}]} | body
    return {"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": request}


async def upload(desk, lines, **form):
    text = lines if isinstance(lines, bytes) else "".join(json.dumps(each) + "\n" for each in lines).encode()
    return await desk.http.post(
        "/v1/files", files={"file": ("in.jsonl", text)}, data={"purpose": "batch"} | form
    )


async def begin(desk, lines, **fields):
    id = (await upload(desk, lines)).json()["id"]
    return await desk.http.post("/v1/batches", json=WINDOW | {"input_file_id": id} | fields)


async def ended(desk, id, within_s=10):
    deadline = time.monotonic() + within_s
    while True:
        batch = (await desk.http.get(f"/v1/batches/{id}")).json()
        if batch["status"] in ("completed", "failed", "expired", "cancelled"):
            return batch
        assert time.monotonic() < deadline, batch
        await asyncio.sleep(0.01)


async def content(desk, id):
    text = (await desk.http.get(f"/v1/files/{id}/content")).text
    return [json.loads(each) for each in text.splitlines()]


@pytest.fixture
async def running(open_desk):
    desks = []

    def start(provider=None, **options):
        desk = open_desk(provider, **options)
        desk.state.start()
        desks.append(desk)
        return desk

    yield start
    for desk in desks:
        await desk.state.stop()


async def test_a_batch_from_upload_to_output(running):
    desk = running()
    made = await begin(desk, [line(i) for i in range(20)], metadata={"job": "x"})
    batch = made.json()
    assert made.status_code == 200 and batch["object"] == "batch" and batch["metadata"] == {"job": "x"}
    assert batch["expires_at"] - batch["created_at"] == 86_400
    done = await ended(desk, batch["id"])
    assert done["status"] == "completed" and done["request_counts"] == {
        "total": 20,
        "completed": 20,
        "failed": 0,
    }
    assert done["error_file_id"] is None
    out = await content(desk, done["output_file_id"])
    assert [o["custom_id"] for o in out] == [f"c{i}" for i in range(20)]
    answer = out[0]["response"]
    assert answer["status_code"] == 200 and out[0]["error"] is None
    assert answer["body"]["choices"][0]["message"]["content"] == "Hello wörld"
    assert answer["body"]["service_tier"] == "flex"
    request = desk.provider.seen[0]
    assert request.priority > 0 and request.metadata["batch_id"] == batch["id"]
    listed = (await desk.http.get("/v1/batches")).json()
    assert [b["id"] for b in listed["data"]] == [batch["id"]]
    files = (await desk.http.get("/v1/files", params={"purpose": "batch_output"})).json()["data"]
    assert [f["id"] for f in files] == [done["output_file_id"]]


async def test_bad_lines_fail_alone(running):
    desk = running()
    lines = [line(0), line(1, temperature=9), line(2, model="nope"), line(3, stream=True), line(4)]
    done = await ended(desk, (await begin(desk, lines)).json()["id"])
    assert done["status"] == "completed" and done["request_counts"] == {
        "total": 5,
        "completed": 2,
        "failed": 3,
    }
    errors = {o["custom_id"]: o["response"] for o in await content(desk, done["error_file_id"])}
    assert {id: r["status_code"] for id, r in errors.items()} == {"c1": 400, "c2": 404, "c3": 400}
    assert errors["c1"]["body"]["error"]["param"] == "temperature"


@pytest.mark.parametrize(
    ("lines", "code", "place"),
    [
        ([line(0), line(0)], "duplicate_custom_id", 2),
        ([line(0) | {"url": "/v1/completions"}], "mismatched_endpoint", 1),
        (b'{"custom_id": "a"}\n', "invalid_json_line", 1),
        (b"not json\n", "invalid_json_line", 1),
        (b"\n\n", "empty_file", None),
        ([line(0) | {"body": [1]}], "invalid_json_line", 1),
        ([line(0) | {"custom_id": ""}], "invalid_custom_id", 1),
    ],
)
async def test_a_file_that_cannot_be_read_fails_the_batch(running, lines, code, place):
    desk = running()
    done = await ended(desk, (await begin(desk, lines)).json()["id"])
    assert done["status"] == "failed" and done["output_file_id"] is None and desk.provider.seen == []
    assert (done["errors"]["data"][0]["code"], done["errors"]["data"][0]["line"]) == (code, place)


async def test_passing_faults_are_retried(running):
    desk = running(FakeProvider(fault=EngineFault("for now")))
    id = (await begin(desk, [line(0)])).json()["id"]
    while not desk.provider.seen:
        await asyncio.sleep(0.01)
    desk.provider.fault = None
    assert (await ended(desk, id))["request_counts"]["completed"] == 1


async def test_killed_between_any_two_steps_each_line_is_put_out_once(running, tmp_path):
    """Runners stopped at any moment, without saying goodbye to the journal, are succeeded by others."""
    lines = [line(i) for i in range(40)]
    desk = running(FakeProvider(step_s=0.002))
    id = (await begin(desk, lines)).json()["id"]
    for _ in range(3):
        await asyncio.sleep(0.03)
        runner = desk.state.runner
        runner._results.clear()  # what a kill would lose
        for task in (runner._task, *runner._lines.values()):
            task.cancel()
        runner._lock.close()
        await asyncio.sleep(0)
        desk = running(FakeProvider(step_s=0.002))
    done = await ended(desk, id)
    assert done["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    out = await content(desk, done["output_file_id"])
    assert [o["custom_id"] for o in out] == [f"c{i}" for i in range(40)]


async def test_two_servers_of_one_home_do_not_share_the_work(running):
    first = running(FakeProvider(step_s=0.005))
    await asyncio.sleep(0.05)
    second = running()
    done = await ended(second, (await begin(first, [line(i) for i in range(10)])).json()["id"])
    assert done["request_counts"]["completed"] == 10
    assert len(first.provider.seen) == 10 and second.provider.seen == []


async def test_cancelling(running):
    desk = running(FakeProvider(words=("x",) * 50, step_s=0.02), keeping=Keeping(concurrency=2))
    id = (await begin(desk, [line(i) for i in range(5)])).json()["id"]
    while desk.provider.running == 0:
        await asyncio.sleep(0.01)
    assert (await desk.http.post(f"/v1/batches/{id}/cancel")).json()["status"] == "cancelling"
    done = await ended(desk, id)
    assert done["status"] == "cancelled" and done["cancelled_at"] and desk.provider.running == 0
    errors = await content(desk, done["error_file_id"])
    assert [e["error"]["code"] for e in errors] == ["batch_cancelled"] * 5
    again = await desk.http.post(f"/v1/batches/{id}/cancel")
    assert again.status_code == 200 and again.json()["status"] == "cancelled"


async def test_running_out_of_time(running):
    desk = running(FakeProvider(words=("x",) * 50, step_s=0.02), keeping=Keeping(concurrency=1))
    id = (await begin(desk, [line(0, max_tokens=2), line(1)], completion_window="1h")).json()["id"]
    while len(desk.provider.seen) < 2:
        await asyncio.sleep(0.01)
    desk.state.journal.change(id, expires_at=time.time() - 1)
    desk.state.runner.wake()
    done = await ended(desk, id)
    assert done["status"] == "expired" and done["expired_at"]
    assert done["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    assert (await content(desk, done["error_file_id"]))[0]["error"]["code"] == "batch_expired"


async def test_a_revoked_key_ends_its_batch(running):
    desk = running(FakeProvider(words=("x",) * 5, step_s=0.02), keeping=Keeping(concurrency=1))
    key, secret = desk.state.keys.create("b", scopes=["batch"])
    desk.http.headers["authorization"] = f"Bearer {secret}"
    id = (await begin(desk, [line(i) for i in range(4)])).json()["id"]
    while not desk.provider.seen:
        await asyncio.sleep(0.01)
    desk.state.keys.revoke(key.id)
    _, admin = desk.state.keys.create("root", scopes=["admin"])
    desk.http.headers["authorization"] = f"Bearer {admin}"
    assert (await desk.http.get(f"/v1/batches/{id}")).status_code == 404, "another key does not see it"
    while desk.state.journal.get(id, None).status != "completed":
        await asyncio.sleep(0.01)
    total, completed, failed = desk.state.journal.counts(id)
    assert total == 4 and failed >= 2 and completed >= 1


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"completion_window": "2h"}, 400, "completion_window"),
        ({"endpoint": "/v1/images"}, 400, "endpoint"),
        ({"input_file_id": "file-none"}, 404, "file_id"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            400,
            "output_expires_after.seconds",
        ),
    ],
)
async def test_batches_are_checked(desk, fields, status, param):
    response = await begin(desk, [line(0)], **fields)
    assert response.status_code == status and response.json()["error"]["param"] == param


async def test_files(desk):
    made = (
        await upload(
            desk, [line(0)], **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        )
    ).json()
    assert made["object"] == "file" and made["purpose"] == "batch" and made["filename"] == "in.jsonl"
    assert made["expires_at"] - made["created_at"] == 3600
    got = await desk.http.get(f"/v1/files/{made['id']}/content")
    assert got.content == json.dumps(line(0)).encode() + b"\n" and made["bytes"] == len(got.content)
    assert (await desk.http.get(f"/v1/files/{made['id']}")).json() == made
    assert (await desk.http.delete(f"/v1/files/{made['id']}")).json()["deleted"] is True
    assert (await desk.http.get(f"/v1/files/{made['id']}")).status_code == 404
    for form, param in (
        ({"purpose": "assistants"}, "purpose"),
        ({"expires_after[anchor]": "x"}, "expires_after.anchor"),
    ):
        refused = await upload(desk, [line(0)], **form)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param
    missing = await desk.http.post("/v1/files", data={"purpose": "batch"}, files={"other": b"x"})
    assert missing.json()["error"]["param"] == "file"
    assert (await desk.http.post("/v1/files", json={})).json()["error"]["code"] == "invalid_content_type"


async def test_an_upload_over_the_limit_leaves_nothing(open_desk, tmp_path):
    desk = open_desk(keeping=Keeping(max_file=1000))
    refused = await upload(desk, b"x" * 5000)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "request_too_large"
    assert list((tmp_path / "home" / "files").iterdir()) == []


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 10_000])
def test_forms_are_the_same_however_they_arrive(cut):
    data = b"\r\n--B-\r\n--\r\n\x00\xff" * 3
    form = b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\nv\r\n'
    form += b'--B\r\ncontent-disposition: form-data; name="file"; filename="x \xc3\xbc.txt"\r\n'
    form += b"Content-Type: a/b\r\n\r\n"
    form += data.replace(b"--B", b"--C") + b"\r\n--B--\r\n"
    parser, found = Multipart(b"B"), []
    for i in range(0, len(form), cut):
        found += parser.feed(form[i : i + cut])
    parser.finish()
    assert next(f for f in found if isinstance(f, Begin)) == Begin("a", None)
    assert [f.name for f in found if isinstance(f, Begin)] == ["a", "file"]
    place = next(i for i, f in enumerate(found) if isinstance(f, Begin) and f.name == "file")
    body = b"".join(f.data for f in found[place:] if isinstance(f, Data))
    assert body == data.replace(b"--B", b"--C")


@pytest.mark.parametrize(
    "form",
    [
        b"--B\r\nx",
        b"--Bx",
        b"--B\r\nContent-Disposition: form-data\r\n\r\nv\r\n--B--",
        b"--B\r\n" + b"h" * 20_000,
    ],
)
def test_broken_forms(form):
    parser = Multipart(b"B")
    with pytest.raises(InvalidRequest):
        list(parser.feed(form))
        parser.finish()


def test_boundaries():
    assert boundary_of('multipart/form-data; boundary="a b"') == b"a b"
    for bad in ("application/json", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 80):
        with pytest.raises(InvalidRequest):
            boundary_of(bad)


def test_results_are_written_once(tmp_path):
    from galley.endpoint.batches.journal import Batch, Journal, Line

    journal = Journal(tmp_path / "b.db")
    now = time.time()
    batch = Batch(
        id="batch_1", endpoint="/v1/completions", input_file_id="f", completion_window="1h",
        created_at=now, expires_at=now + 3600,
    )  # fmt: skip
    journal.add(batch, "")
    journal.accept("batch_1", [Line(0, "a", b"{}"), Line(1, "b", b"{}")])
    assert journal.settle("batch_1", [(0, b"first", False)]) == 1
    assert journal.settle("batch_1", [(0, b"second", True), (1, b"other", False)]) == 1
    assert list(journal.results("batch_1", failed=False)) == [b"first", b"other"]
    assert journal.counts("batch_1") == (2, 2, 0)
    assert msgspec.structs.asdict(journal.get("batch_1", None))["status"] == "in_progress"
    journal.close()
