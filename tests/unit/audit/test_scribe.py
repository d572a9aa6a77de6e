"""The scribe: what entries say and what they do not, strict and not, and a log that cannot be written."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from galley.audit import verifier
from galley.audit.assemble import assemble
from galley.audit.entry import spoken
from galley.audit.log import AuditLog, AuditUnavailable
from galley.audit.note import Signer
from galley.audit.receipts import ReceiptStore
from galley.audit.scribe import Scribe
from galley.audit.subjects import Subject, Subjects, canonical
from galley.audit.tiles import Tiles, Tree
from galley.errors import ConfigError, NotFound, Overloaded
from galley.types import Choice, Delta, Digests, Receipt, Request, Route, SamplingParams, ToolCallDelta

SECRET = "canary-0f3a-the-weather-in-utopia"


def request(number: int = 0, **fields: object) -> Request:
    given = {
        "id": f"req_{number}",
        "api": "chat.completions",
        "model": "m",
        "params": SamplingParams(seed=7),
        "created": 1_700_000_000.0 + number,
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": SECRET}],
        "tenant": "acme",
        "user": "alice@example.com",
        "session": f"conversation {SECRET}",
        "metadata": {"prompt_version": "support-12", "note": SECRET},
    }
    return Request(**(given | fields))


def receipt(asked: Request, id: str = "rcp_1") -> Receipt:
    return assemble(
        receipt_id=id,
        request=asked,
        route=Route(model="m", provider="local", rule="fixed", scores={"a": 0.25}, quote_pico=2**60),
        digests=Digests(weights="w", tokenizer="t", template="c", engine="e"),
        meters={},
        status="ok",
        choices=[Choice(index=0, completion_tokens=3, finish="stop")],
        price_lines=[{"kind": "output", "quantity": 3, "unit_pico": 5, "pico": 15, "price_version": "p1"}],
    )


PIECES = {
    0: [
        Delta(index=0, text="Sun", token_ids=[5, 6], reasoning="hm"),
        Delta(
            index=0,
            text=SECRET,
            token_ids=[7],
            tool_calls=[
                ToolCallDelta(index=0, id="c", name="look", arguments='{"a":'),
                ToolCallDelta(index=0, arguments="1}"),
                ToolCallDelta(index=1, id="d", name="gone", arguments="{"),
                ToolCallDelta(index=1, retracted=True),
            ],
        ),
    ]
}


class Disk:
    """A ``sync`` that can be made to fail."""

    def __init__(self) -> None:
        self.full = False
        self.calls = 0

    def __call__(self, fd: int) -> None:
        self.calls += 1
        if self.full:
            raise OSError(28, "No space left on device")


class Office:
    """A scribe with its log, its store and its disk."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.folder = folder
        self.disk = Disk()
        self.said: list[str] = []
        self.signer = Signer.kept(folder / "key")
        log = AuditLog(folder / "audit", self.signer, sync=self.disk)
        self.store = ReceiptStore(folder / "receipts.db", batch_s=0.001)
        self.subjects = Subjects(folder / "audit/keys")
        self.scribe = Scribe(
            log, self.subjects, self.store, **({"retry_s": 0.01, "tell": self.said.append} | options)
        )

    def entries(self) -> list[dict]:
        """What is signed; everything must verify."""
        size = verifier.verify_log(self.folder / "audit", self.signer.vkey, deep=True).size
        tree = Tree(Tiles(self.folder / "audit"), size)
        return [json.loads(entry) for bundle in tree.bundles() for entry in bundle]

    def close(self) -> None:
        self.scribe.close()
        self.store.close()


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Callable[..., Office]]:
    made: list[Office] = []

    def make(**options: object) -> Office:
        made.append(Office(tmp_path, **options))
        return made[-1]

    yield make
    for each in made:
        each.disk.full = False
        each.close()


def test_an_entry_says_who_what_and_what_it_cost(office: Callable[..., Office]) -> None:
    desk = office()
    asked = request()
    desk.scribe.put(receipt(asked), asked, PIECES)
    desk.scribe.flush(30)
    (entry,) = desk.entries()
    subject = desk.subjects.of("acme", "alice@example.com")
    assert entry["type"] == "request" and entry["id"] == "rcp_1" and entry["status"] == "ok"
    assert entry["actor"] == {"key": None, "subject": subject.id}
    assert entry["digests"] == {"weights": "w", "tokenizer": "t", "template": "c", "engine": "e"}
    assert entry["prompt_version"]["name"] == "support-12"
    assert entry["route"]["scores"] == {"a": "0.25"} and entry["route"]["quote_pico"] == str(2**60)
    assert entry["usage"]["completion"] == 3 and entry["energy_mj"] is None
    assert entry["money"]["pico"] == "15" and entry["money"]["lines"][0]["price_version"] == "p1"
    assert entry["approvals"] == [] and entry["seed"] == "7" and entry["time"] == 1_700_000_000_000_000
    found = desk.store.get("rcp_1")
    assert found is not None and found.audit_leaf is not None
    leaf = Tree(Tiles(desk.folder / "audit"), 1).leaf(0)
    assert found.audit_leaf == f"0:{leaf.hex()}"


def test_commitments_open_with_the_subjects_key_alone(office: Callable[..., Office]) -> None:
    """Recomputed here from the documented construction, with the key from the subject's file."""
    desk = office()
    asked = request()
    desk.scribe.put(receipt(asked), asked, PIECES)
    desk.scribe.flush(30)
    (entry,) = desk.entries()
    (file,) = (desk.folder / "audit/keys").glob("??/*")
    import base64

    key = base64.b64decode(json.loads(file.read_bytes())["key"])
    mac = hmac.digest(key, b"galley commitment v1", "sha256")
    prompt = {"messages": asked.messages, "prompts": None, "tools": None, "template_kwargs": {}}
    spelled = json.dumps(prompt, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    assert entry["commit"]["prompt"] == hmac.digest(mac, b"prompt\0" + spelled, "sha256").hex()
    link = hmac.digest(mac, b"tokens\x00rcp_1\x000", "sha256")
    for id in (5, 6, 7):
        link = hashlib.sha256(link + id.to_bytes(4, "little")).digest()
    (output,) = entry["commit"]["output"]
    assert output["tokens"] == link.hex() and output["count"] == 3
    text = json.dumps(
        ["Sun" + SECRET, "hm", [{"name": "look", "arguments": '{"a":1}'}]],
        sort_keys=True, ensure_ascii=False, separators=(",", ":"),
    ).encode()  # fmt: skip
    assert output["text"] == hmac.digest(mac, b"output\0" + text, "sha256").hex()


def test_nothing_personal_is_in_the_log(office: Callable[..., Office]) -> None:
    desk = office()
    asked = request()
    desk.scribe.put(receipt(asked), asked, PIECES)
    failing = request(1)
    error = Overloaded(f"no room for {SECRET}")
    desk.scribe.put(
        assemble(
            receipt_id="rcp_2",
            request=failing,
            route=None,
            digests=None,
            meters={},
            status="error",
            error=error,
        ),
        failing,
        {},
    )
    desk.scribe.flush(30)
    assert desk.entries()[1]["error"] == {"code": "overloaded", "status": 503}
    for path in (desk.folder / "audit").rglob("*"):
        if path.is_file() and "keys" not in path.parts:
            data = path.read_bytes()
            assert SECRET.encode() not in data and b"alice" not in data and b"acme" not in data, path


def test_an_erased_subject_cannot_be_told_and_the_tree_stays(office: Callable[..., Office]) -> None:
    desk = office()
    for number in range(3):
        asked = request(number, user="bob" if number == 1 else "alice@example.com")
        desk.scribe.put(receipt(asked, f"rcp_{number}"), asked, PIECES)
    desk.scribe.flush(30)
    noted = (desk.folder / "audit/checkpoint").read_bytes()
    alice = desk.subjects.of("acme", "alice@example.com").id
    assert {each["user"] for each in desk.subjects.all()} == {"alice@example.com", "bob"}
    # Erased by another process: this one sees it at once.
    assert Subjects(desk.folder / "audit/keys").erase("acme", "alice@example.com") == alice
    assert desk.subjects.by_id(alice) is None
    asked = request(4)
    desk.scribe.put(receipt(asked, "rcp_4"), asked, PIECES)
    desk.scribe.flush(30)
    entries = desk.entries()
    assert entries[0]["actor"]["subject"] == alice
    assert [e["type"] for e in entries].count("erasure") == 1
    assert next(e for e in entries if e["type"] == "erasure")["subject"] == alice
    after = next(e for e in entries if e.get("id") == "rcp_4")
    assert after["actor"]["subject"] != alice, "who comes back is somebody else"
    assert after["commit"]["prompt"] != entries[0]["commit"]["prompt"]
    verifier.verify_log(desk.folder / "audit", desk.signer.vkey, seen=[noted])
    with pytest.raises(NotFound):
        desk.subjects.erase("acme", "nobody")
    for path in (desk.folder / "audit/keys").rglob("*"):
        assert not path.is_file() or alice.encode() not in path.read_bytes()


async def test_strict_waits_for_the_entry(office: Callable[..., Office]) -> None:
    desk = office(strict=True)
    asked = request()
    await desk.scribe.admit(asked, "rcp_1")
    done = desk.scribe.put(receipt(asked), asked, PIECES)
    assert done is not None
    await asyncio.wrap_future(done)
    desk.scribe.flush(30)
    assert [(e["type"], e["id"]) for e in desk.entries()] == [("begin", "rcp_1"), ("request", "rcp_1")]


async def test_strict_lets_nobody_in_while_the_log_cannot_be_written(office: Callable[..., Office]) -> None:
    desk = office(strict=True)
    asked = request()
    desk.disk.full = True
    with pytest.raises(AuditUnavailable) as caught:
        await desk.scribe.admit(asked, "rcp_1")
    assert caught.value.status == 503 and desk.scribe.fault is not None and desk.scribe.failures == 1
    done = desk.scribe.put(receipt(asked, "rcp_0"), asked, PIECES)
    assert done is not None
    with pytest.raises(AuditUnavailable):
        await asyncio.wrap_future(done)
    desk.disk.full = False
    await desk.scribe.admit(asked, "rcp_2")
    assert desk.scribe.fault is None
    desk.scribe.flush(30)
    # What had happened is written later; what was refused is not.
    assert [e["id"] for e in desk.entries()] == ["rcp_0", "rcp_2"]
    assert any("AUDIT LOG NOT WRITTEN" in line for line in desk.said)


def test_otherwise_a_full_disk_delays_entries_and_then_refuses(office: Callable[..., Office]) -> None:
    """Entries wait, in order, none is lost; when too many do, requests are refused rather than unlogged."""
    desk = office(most=5)
    desk.disk.full = True
    for number in range(6):
        asked = request(number)
        assert desk.scribe.put(receipt(asked, f"rcp_{number}"), asked, PIECES) is None
    with pytest.raises(AuditUnavailable):
        desk.scribe.flush(30)
    with pytest.raises(AuditUnavailable):
        asyncio.run(desk.scribe.admit(request(), "rcp_9"))
    desk.store.flush(30)
    assert desk.store.get("rcp_5").audit_leaf is None
    desk.disk.full = False
    deadline = 500
    while desk.scribe.fault is not None and deadline:
        deadline -= 1
        asyncio.run(asyncio.sleep(0.02))
    asyncio.run(desk.scribe.admit(request(), "rcp_9"))
    desk.scribe.flush(30)
    assert [e["id"] for e in desk.entries()] == [f"rcp_{i}" for i in range(6)]


def test_many_are_written_with_few_syncs_and_in_order(office: Callable[..., Office]) -> None:
    desk = office(checkpoint_s=60.0)
    asked = request()
    whole = receipt(asked)
    before = desk.disk.calls
    for number in range(2000):
        desk.scribe.put(msgspec.structs.replace(whole, id=f"rcp_{number}"), asked, PIECES)
    desk.scribe.flush(60)
    assert desk.disk.calls - before < 400
    assert [e["id"] for e in desk.entries()] == [f"rcp_{i}" for i in range(2000)]
    desk.store.flush(30)
    assert desk.store.get("rcp_1999").audit_leaf.startswith("1999:")


def test_a_request_of_hundreds_of_choices_still_fits(office: Callable[..., Office]) -> None:
    desk = office()
    asked = request(prompts=["x"] * 600, messages=None)
    desk.scribe.put(receipt(asked), asked, {i: [Delta(index=i, token_ids=[i])] for i in range(600)})
    desk.scribe.flush(30)
    (entry,) = desk.entries()
    assert entry["commit"]["output"]["choices"] == 600


def test_a_fault_in_making_an_entry_is_an_entry(
    office: Callable[..., Office], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = office()

    def broken(*_: object, **__: object) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr("galley.audit.scribe.request_entry", broken)
    asked = request()
    desk.scribe.put(receipt(asked), asked, {})
    desk.scribe.flush(30)
    (entry,) = desk.entries()
    assert entry["fault"] == "ZeroDivisionError" and entry["id"] == "rcp_1"
    assert any("AUDIT ENTRY NOT MADE" in line for line in desk.said)


def test_bodies_open_with_the_subjects_key_and_for_their_receipt_only() -> None:
    from cryptography.exceptions import InvalidTag

    subject, other = Subject("a", b"k" * 32), Subject("b", b"l" * 32)
    sealed = subject.seal("rcp_1", b"hello")
    assert subject.unseal("rcp_1", sealed) == b"hello" and b"hello" not in sealed
    assert subject.seal("rcp_1", b"hello") != sealed
    for wrong in (lambda: other.unseal("rcp_1", sealed), lambda: subject.unseal("rcp_2", sealed)):
        with pytest.raises(InvalidTag):
            wrong()


def test_canonical_json_is_one_spelling() -> None:
    assert canonical({"b": [1, None, "é"], "a": {"d": "\n", "c": True}}) == (
        '{"a":{"c":true,"d":"\\n"},"b":[1,null,"é"]}'.encode()
    )
    assert canonical({"a": "\ud800"}) == b'{"a":"?"}'


def test_retracted_calls_are_none() -> None:
    said = spoken(PIECES)[0]
    assert said.calls == [{"name": "look", "arguments": '{"a":1}'}] and said.ids == [5, 6, 7]


def test_without_cryptography_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    settings = {"folder": tmp_path / "a", "signing_key": tmp_path / "k", "origin": None, "checkpoint_s": 1.0}
    store = ReceiptStore(tmp_path / "r.db")
    with pytest.raises(ConfigError) as caught:
        Scribe.opened(store, mode="on", **settings)
    assert caught.value.code == "missing_dependency" and "galley[audit]" in (caught.value.hint or "")
    assert Scribe.opened(store, mode="off", **settings) is None
