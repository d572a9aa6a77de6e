"""Requests over HTTP with an audit log behind them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from galley.audit import verifier
from galley.audit.log import AuditLog
from galley.audit.note import Signer
from galley.audit.scribe import Scribe
from galley.audit.subjects import Subjects
from galley.audit.tiles import Tiles, Tree
from tests.unit.endpoint.conftest import Desk
from tests.unit.endpoint.fake import FAULT, FakeProvider


class Audited:
    """A desk whose router has an auditor."""

    def __init__(self, desk: Desk, folder: Path, *, strict: bool) -> None:
        self.desk = desk
        self.folder = folder
        self.full = False
        self.signer = Signer.kept(folder / "key")
        log = AuditLog(folder / "audit", self.signer, sync=self.sync)
        self.scribe = Scribe(
            log,
            Subjects(folder / "audit/keys"),
            desk.store,
            strict=strict,
            retry_s=0.01,
            tell=lambda line: None,
        )
        desk.router.auditor = self.scribe

    def sync(self, fd: int) -> None:
        if self.full:
            raise OSError(28, "No space left on device")

    def entries(self) -> list[dict]:
        self.scribe.flush(30)
        size = verifier.verify_log(self.folder / "audit", self.signer.vkey, deep=True).size
        tree = Tree(Tiles(self.folder / "audit"), size)
        return [json.loads(entry) for bundle in tree.bundles() for entry in bundle]


@pytest.fixture
def audited(open_desk: Callable[..., Desk], tmp_path: Path) -> Iterator[Callable[..., Audited]]:
    made: list[Audited] = []

    def make(provider: FakeProvider | None = None, *, strict: bool = False, **options: object) -> Audited:
        made.append(Audited(open_desk(provider, **options), tmp_path, strict=strict))
        return made[-1]

    yield make
    for each in made:
        each.full = False
        each.scribe.close()


async def test_every_path_of_a_request_leaves_its_entry(audited: Callable[..., Audited]) -> None:
    """Answers, streams, refusals and faults: as many entries as receipts, each with the other's name."""
    office = audited()
    desk = office.desk
    answers = [
        await desk.chat(),
        await desk.chat(stream=True),
        await desk.complete(n=2),
        await desk.chat(temperature=99),
        await desk.http.post("/v1/responses", json={"model": "fake-1b", "input": "hi", "stream": True}),
        await desk.http.post(
            "/v1/messages",
            json={"model": "fake-1b", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]},
        ),
    ]
    entries = office.entries()
    assert [e["id"] for e in entries] == [a.headers["x-galley-receipt"] for a in answers]
    assert [e["status"] for e in entries] == ["ok", "ok", "ok", "error", "ok", "ok"]
    assert [len(e["commit"]["output"]) for e in entries] == [1, 1, 2, 0, 1, 1]
    assert entries[0]["commit"]["output"][0]["count"] == 3
    for number, answer in enumerate(answers):
        assert (await desk.receipt(answer))["audit_leaf"].startswith(f"{number}:")


async def test_a_fault_in_the_stream_is_an_entry_too(audited: Callable[..., Audited]) -> None:
    office = audited(FakeProvider(fault=FAULT, fault_at=1))
    await office.desk.chat(stream=True)
    (entry,) = office.entries()
    assert entry["status"] == "error" and entry["commit"]["output"][0]["count"] == 1


async def test_a_receipt_is_there_as_soon_as_its_answer(audited: Callable[..., Audited]) -> None:
    desk = audited().desk
    for _ in range(5):
        answer = await desk.chat()
        assert (await desk.receipt(answer))["status"] == "ok"


@pytest.mark.parametrize("stream", [False, True])
async def test_strict_no_log_no_tokens(audited: Callable[..., Audited], stream: bool) -> None:
    provider = FakeProvider()
    office = audited(provider, strict=True)
    office.full = True
    answer = await office.desk.chat(stream=stream)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "audit_unavailable"
    assert answer.headers["retry-after"] and provider.steps == 0
    health = (await office.desk.http.get("/health")).json()
    assert health["status"] == "degraded" and "No space" in health["audit"]["fault"]
    assert "galley:audit_failures_total" in (await office.desk.http.get("/metrics")).text
    office.full = False
    assert (await office.desk.chat(stream=stream)).status_code == 200
    assert (await office.desk.http.get("/health")).json()["status"] == "ok"
    kinds = [(e["type"], e.get("status")) for e in office.entries()]
    assert kinds == [("request", "error"), ("begin", None), ("request", "ok")]


async def test_strict_an_answer_that_cannot_be_logged_is_not_given(audited: Callable[..., Audited]) -> None:
    """The log fails while the answer is made: a 503 for a whole answer, no good end for a stream."""

    class Filling(FakeProvider):
        office: Audited

        async def start(self, prepared, meter):  # type: ignore[no-untyped-def]
            self.office.full = True
            return await super().start(prepared, meter)

    provider = Filling()
    office = provider.office = audited(provider, strict=True)
    whole = await office.desk.chat()
    assert whole.status_code == 503 and "wörld" not in whole.text
    office.full = False
    streamed = await office.desk.chat(stream=True)
    assert "[DONE]" not in streamed.text and "audit_unavailable" in streamed.text
    office.full = False
    assert [e["type"] for e in office.entries()].count("request") == 2


async def test_who_asked_is_told_apart_and_not_named(audited: Callable[..., Audited]) -> None:
    office = audited()
    for user in ("ann", "bob", "ann"):
        await office.desk.chat(user=user)
    first, second, third = (e["actor"]["subject"] for e in office.entries())
    assert first == third != second
    assert "ann" not in json.dumps(office.entries())
