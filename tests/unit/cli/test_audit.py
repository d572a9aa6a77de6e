"""`galley audit` over a log made here."""

import json
from pathlib import Path

import pytest

from galley.audit import verifier
from galley.audit.log import AuditLog
from galley.audit.note import Signer
from galley.audit.subjects import Subjects
from galley.cli.main import invoke


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GALLEY_HOME", str(tmp_path))
    extend(tmp_path, 300)
    return tmp_path


def extend(home: Path, count: int) -> None:
    log = AuditLog(home / "audit", Signer.kept(home / "audit.key"), sync=lambda fd: None)
    log.append([b'{"id":"rcp_%d","type":"request"}' % i for i in range(log.size, log.size + count)])
    log.close()


def test_verify_names_the_first_bad_entry(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["audit", "verify", "--deep", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["verified"] and shown["size"] == 300
    path = home / "audit/tile/entries/000"
    path.write_bytes(path.read_bytes().replace(b"rcp_137", b"rcp_731"))
    assert invoke(["audit", "verify"]) == 1
    assert "entry 137" in capsys.readouterr().err
    assert invoke(["audit", "verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["entry"] == 137
    for words in (["prove", "rcp_5"], ["export", "--json"], ["consistency", str(home / "audit/checkpoint")]):
        assert invoke(["audit", *words]) == 1, "nothing is proved from a log that does not verify"


def test_a_proof_stands_by_itself(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = home / "137.tlog-proof"
    assert invoke(["audit", "prove", "rcp_137", "--out", str(out)]) == 0
    assert invoke(["audit", "key"]) == 0
    key = capsys.readouterr().out.split()[-1]
    assert verifier.main(["proof", str(out), "--key", key]) == 0
    assert "rcp_137" in capsys.readouterr().out
    out.write_bytes(out.read_bytes().replace(b"index 137", b"index 136"))
    assert verifier.main(["proof", str(out), "--key", key]) == 1
    assert invoke(["audit", "prove", "rcp_none"]) == 2
    assert invoke(["audit", "prove", "rcp_7", "--json"]) == 0
    capsys.readouterr()


def test_consistency_with_what_was_noted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noted = home / "noted"
    noted.write_bytes((home / "audit/checkpoint").read_bytes())
    extend(home, 50)
    assert invoke(["audit", "consistency", str(noted)]) == 0
    assert "350 entries begins with that of 300" in capsys.readouterr().out
    assert invoke(["audit", "verify", "--seen", str(noted)]) == 0
    capsys.readouterr()
    assert invoke(["audit", "consistency", str(noted), "--json"]) == 0
    proof = home / "proof.json"
    proof.write_text(capsys.readouterr().out)
    key = Signer.kept(home / "audit.key").vkey
    assert verifier.main(["consistency", str(proof), "--key", key]) == 0
    capsys.readouterr()
    assert invoke(["audit", "consistency", str(home / "nothing")]) == 2
    other = home / "other"
    AuditLog(other / "audit", Signer.kept(other / "k")).close()
    assert invoke(["audit", "consistency", str(other / "audit/checkpoint")]) == 1


def test_export_is_all_of_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["audit", "export", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == list(range(300))
    assert lines[7]["entry"] == {"id": "rcp_7", "type": "request"}
    assert invoke(["audit", "export"]) == 0
    assert "rcp_299" in capsys.readouterr().out


def test_subjects_and_erasure(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    id = Subjects(home / "audit/keys").of("acme", "ann").id
    assert invoke(["audit", "subjects", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"id": id, "tenant": "acme", "user": "ann"}]
    assert invoke(["audit", "erase", "--tenant", "acme", "--user", "ann", "--yes"]) == 0
    assert invoke(["audit", "erase", "--tenant", "acme", "--user", "ann", "--yes"]) == 2
    assert invoke(["audit", "subjects"]) == 0
    assert id not in capsys.readouterr().out.replace(f"{id} erased", "")
    assert invoke(["audit", "verify"]) == 0


def test_no_log_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GALLEY_HOME", str(tmp_path))
    assert invoke(["audit", "verify"]) == 2


def test_approvals_are_decided_on_the_command_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from galley.audit.approvals import Approvals, Call

    queue = Approvals(home / "approvals.db")
    call = Call(
        kind="tool",
        name="pay",
        arguments="{}",
        tenant="local",
        user="ann",
        key=None,
        session=None,
        rule="pay",
    )
    first, second = (queue.propose(call, tier="destructive", ttl_s=60).id for _ in range(2))
    assert invoke(["approvals", "list"]) == 0
    assert first in capsys.readouterr().out
    assert invoke(["approvals", "approve", first, "--as", "ann"]) == 5
    assert invoke(["approvals", "approve", first, "--as", "bob", "--call", call.digest]) == 0
    assert invoke(["approvals", "approve", first, "--as", "carol", "--json"]) == 0
    assert invoke(["approvals", "deny", second, "--as", "bob", "--reason", "no"]) == 0
    assert invoke(["approvals", "approve", second, "--as", "carol"]) == 2
    assert (queue.get(first).state, queue.get(second).state) == ("approved", "denied")
    queue.close()
    capsys.readouterr()
    assert invoke(["approvals", "list", "--all", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
