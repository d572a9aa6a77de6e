"""Approvals over HTTP: a held call, the queue, the entry that tells of both; clean stores."""

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from galley.audit.approvals import Approvals
from galley.audit.log import AuditLog
from galley.audit.note import Signer
from galley.audit.pii import Redactor
from galley.audit.scribe import Scribe
from galley.audit.subjects import Subjects
from galley.audit.tiles import Tiles, Tree
from galley.audit.warden import Warden
from galley.endpoint.admin import Admin
from galley.providers.fleet import Fleet
from galley.router.router import Router
from galley.types import Delta, ToolCallDelta
from tests.unit.endpoint.conftest import Desk
from tests.unit.endpoint.fake import FakeProvider

CALL = (
    Delta(index=0, text="Sure."),
    Delta(index=0, tool_calls=[ToolCallDelta(index=0, id="call_1", name="pay", arguments='{"to": ')]),
    Delta(index=0, tool_calls=[ToolCallDelta(index=0, arguments='"bob"}')], finish="tool_calls"),
)
ADMIN = {"x-galley-admin-key": "adm"}


class Held:
    """A desk with a warden, an admin and an audit log."""

    def __init__(self, open_desk: Callable[..., Desk], folder: Path) -> None:
        self.folder = folder
        self.queue = Approvals(folder / "approvals.db")
        fleet = Fleet(budget=None, idle_s=None, sizes=lambda name: 0)

        def never(name: str) -> object:
            raise AssertionError(name)

        self.provider = FakeProvider(script=CALL)
        no_adapters: Router = None  # type: ignore[assignment]
        admin = Admin(fleet, key="adm", load=never, unload=never, router=no_adapters, approvals=self.queue)
        self.desk = open_desk(self.provider, admin=admin)
        self.desk.router.warden = Warden(self.queue, tools=[("pay", "write")], ttl_s=30)
        self.scribe = Scribe(
            AuditLog(folder / "audit", Signer.kept(folder / "key")),
            Subjects(folder / "audit/keys"),
            self.desk.store,
        )
        self.desk.router.auditor = self.scribe

    async def waiting(self) -> dict:
        for _ in range(500):
            listed = (await self.desk.http.get("/v1/admin/approvals", headers=ADMIN)).json()["data"]
            if listed:
                return listed[0]
            await asyncio.sleep(0.02)
        raise AssertionError("nothing waits")

    async def decide(self, id: str, word: str, **body: object) -> httpx.Response:
        path = f"/v1/admin/approvals/{id}/{word}"
        return await self.desk.http.post(path, json={"approver": "carol"} | body, headers=ADMIN)

    def entry(self) -> dict:
        self.scribe.flush(30)
        tree = Tree(Tiles(self.folder / "audit"), self.scribe.log.size)
        return json.loads(tree.entry(tree.size - 1))


@pytest.fixture
def held(open_desk: Callable[..., Desk], tmp_path: Path) -> Iterator[Held]:
    made = Held(open_desk, tmp_path)
    yield made
    made.scribe.close()
    made.queue.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_approved_call_reaches_the_client_and_its_approver_the_log(held: Held, stream: bool) -> None:
    task = asyncio.ensure_future(held.desk.chat(stream=stream))
    found = await held.waiting()
    assert found["name"] == "pay" and json.loads(found["arguments"]) == {"to": "bob"}
    assert held.provider.running == 0, "nothing is held in the engine"
    assert (await held.decide(found["id"], "approve", call="0" * 64)).status_code == 400
    assert (await held.decide(found["id"], "approve", call=found["call"])).json()["state"] == "approved"
    answer = await task
    assert answer.status_code == 200 and "pay" in answer.text and "bob" in answer.text
    (approval,) = held.entry()["approvals"]
    assert approval["decisions"][0]["approver"] == "carol" and approval["state"] == "used"
    shown = (await held.desk.http.get(f"/v1/admin/approvals/{found['id']}", headers=ADMIN)).json()
    assert shown["state"] == "used" and shown["arguments"] is None


async def test_a_denied_call_is_a_403_and_an_entry(held: Held) -> None:
    task = asyncio.ensure_future(held.desk.chat())
    found = await held.waiting()
    await held.decide(found["id"], "deny", reason="no")
    answer = await task
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "approval_denied"
    assert "bob" not in answer.text
    assert held.entry()["approvals"][0]["state"] == "denied" and held.entry()["status"] == "error"
    assert (await held.decide(found["id"], "approve")).json()["error"]["code"] == "approval_not_pending"


async def test_the_queue_is_the_admins(held: Held) -> None:
    for path in ("", "/apr_x"):
        assert (await held.desk.http.get(f"/v1/admin/approvals{path}")).status_code == 401
    assert (await held.desk.http.post("/v1/admin/approvals/apr_x/approve", json={})).status_code == 401
    assert (await held.decide("apr_x", "approve")).status_code == 404
    listed = await held.desk.http.get("/v1/admin/approvals?state=all", headers=ADMIN)
    assert listed.json() == {"object": "list", "data": []}


async def test_stores_get_text_without_personal_data(open_desk: Callable[..., Desk], tmp_path: Path) -> None:
    """Receipts with capture, and stored answers: what was asked and what was said."""
    secret = "jane.doe@example.com"
    desk = open_desk(FakeProvider(("Write to ", secret, "!")), capture=True)
    redactor = Redactor()
    desk.store._clean = redactor.receipt
    desk.state.shelf._clean = redactor.value
    turn = [{"role": "user", "content": f"I am {secret}, card 4111 1111 1111 1111"}]
    answer = await desk.chat(messages=turn, store=True, metadata={"who": secret})
    assert secret in answer.json()["choices"][0]["message"]["content"], "the answer itself is not touched"
    receipt = await desk.receipt(answer)
    assert receipt["prompt"][0]["content"] == "I am [email], card [card]"
    assert receipt["output"] == ["Write to [email]!"] and receipt["output_ids"] is None
    assert "redacted: 1 card, 3 email" in receipt["warnings"]
    kept = await desk.http.get(f"/v1/chat/completions/{answer.json()['id']}")
    assert kept.json()["choices"][0]["message"]["content"] == "Write to [email]!"
    desk.store.close()
    desk.state.close()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path
    with sqlite3.connect(tmp_path / "receipts.db") as db:
        assert db.execute("SELECT count(*) FROM receipts").fetchone() == (1,)
