"""On what terms a request runs: tenant, tier, deadlines, and how a refusal under load looks."""

import json

import pytest

from galley.errors import DeadlineExceeded, Overloaded, TooManyRequests
from tests.unit.endpoint.fake import FakeProvider

BODY = {"model": "fake-1b", "prompt": "hi"}


def seen(desk):
    return desk.provider.seen[-1]


async def test_sch7_tenant_is_local_by_default(desk):
    await desk.complete()
    assert seen(desk).tenant == "local"


async def test_sch7_tenant_by_user_then_header(desk):
    await desk.complete(user="ann")
    assert seen(desk).tenant == "ann"
    await desk.complete(user="ann", safety_identifier="s1")
    assert seen(desk).tenant == "s1"
    answer = await desk.http.post(
        "/v1/completions", json=BODY | {"user": "ann"}, headers={"x-galley-tenant": "team a"}
    )
    assert seen(desk).tenant == "team a" and seen(desk).user == "ann"
    assert (await desk.receipt(answer))["tenant"] == "team a"


async def test_sch7_with_several_keys_the_key_is_the_tenant(open_desk):
    desk = open_desk(keys=["k1", "k2"])
    tenants = []
    for key, header in (("k1", "x"), ("k1", "y"), ("k2", "x")):
        headers = {"authorization": f"Bearer {key}", "x-galley-tenant": header}
        await desk.http.post("/v1/completions", json=BODY | {"user": header}, headers=headers)
        tenants.append(seen(desk).tenant)
    assert tenants[0] == tenants[1] != tenants[2] and tenants[0].startswith("key_")


async def test_sch7_one_key_for_all_tells_nobody_apart(open_desk):
    desk = open_desk(keys=["k1"])
    headers = {"authorization": "Bearer k1"}
    await desk.http.post("/v1/completions", json=BODY | {"user": "ann"}, headers=headers)
    assert seen(desk).tenant == "ann"


@pytest.mark.parametrize("name", [b"", b" ", b"x" * 129, b"caf\xe9", b"a\tb"])
async def test_a_tenant_that_is_no_name_is_refused(desk, name):
    answer = await desk.http.post("/v1/completions", json=BODY, headers={b"x-galley-tenant": name})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "x-galley-tenant"


@pytest.mark.parametrize(
    ("tier", "used", "priority", "ignored"),
    [
        ("auto", "default", 0, None),
        ("default", "default", 0, None),
        ("flex", "flex", 6, None),
        ("priority", "priority", 0, None),
        ("fast", "priority", 0, None),
        ("scale", "default", 0, "service_tier"),
    ],
)
async def test_service_tier_is_served_and_echoed(desk, tier, used, priority, ignored):
    answer = await desk.complete(service_tier=tier)
    assert answer.json()["service_tier"] == used
    assert (seen(desk).service_tier, seen(desk).priority) == (used, priority)
    assert answer.headers.get("x-galley-ignored-params") == ignored


async def test_a_priority_given_wins_over_flex(desk):
    await desk.complete(service_tier="flex", priority=2)
    assert seen(desk).priority == 2


async def test_can5_deadlines_reach_the_request(desk):
    await desk.complete(max_queue_s=1.5, max_total_s=30)
    assert (seen(desk).max_queue_s, seen(desk).max_total_s) == (1.5, 30.0)


@pytest.mark.parametrize(
    ("error", "status", "retry", "after"),
    [
        (DeadlineExceeded("late", kind="queue", retry_after_s=2.4), 503, "true", "2"),
        (DeadlineExceeded("late", kind="total"), 504, "false", None),
        (Overloaded("full", retry_after_s=7.2), 503, "true", "7"),
        (TooManyRequests("you", retry_after_s=0.2), 429, "true", "1"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_can5_errors_have_a_status_and_say_whether_and_when_to_retry(
    open_desk, error, status, retry, after, stream
):
    desk = open_desk(FakeProvider(fault=error, fault_at=0))
    answer = await desk.complete(max_total_s=60, stream=stream)
    assert answer.status_code == status
    assert answer.headers["x-should-retry"] == retry
    assert answer.headers.get("retry-after") == after
    shown = answer.json()["error"]
    assert shown["code"] == error.code and shown["type"] == error.type
    receipt = await desk.receipt(answer)
    assert receipt["status"] == "error" and receipt["error"]["status"] == status


async def test_can5_a_deadline_after_the_first_token_is_an_event(open_desk):
    desk = open_desk(FakeProvider(fault=DeadlineExceeded("late", kind="total"), fault_at=1))
    answer = await desk.complete(max_total_s=60, stream=True)
    assert answer.status_code == 200 and "[DONE]" not in answer.text
    last = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "deadline_exceeded"


async def test_a_stream_with_a_deadline_loses_no_token(desk):
    plain = await desk.complete(stream=True)
    bound = await desk.complete(stream=True, max_total_s=60)

    def texts(answer):
        lines = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: {")]
        return [json.loads(line)["choices"][0]["text"] for line in lines]

    assert texts(plain) == texts(bound) and "".join(texts(bound)) == "Hello wörld"
