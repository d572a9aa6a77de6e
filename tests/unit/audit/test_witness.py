"""A witness cosigns what continues, and nothing else."""

import shutil
from pathlib import Path

import pytest

from galley.audit import verifier
from galley.audit.log import AuditLog
from galley.audit.note import BadNote, Signer
from galley.audit.tiles import AuditDamaged
from galley.audit.witness import Witness
from galley.cli.main import invoke


def extend(folder: Path, signer: Signer, count: int, what: bytes = b"{}") -> None:
    log = AuditLog(folder, signer, sync=lambda fd: None)
    log.append([what] * count)
    log.close()


def test_it_cosigns_what_continues_and_remembers(tmp_path: Path) -> None:
    signer = Signer.kept(tmp_path / "k")
    witness = Witness(tmp_path / "w", signer.vkey, now=lambda: 1_700_000_000.5)
    for count in (3, 0, 300, 1):
        extend(tmp_path / "a", signer, count)
        made = witness.cosign(tmp_path / "a")
        seen = (tmp_path / "w/seen").read_bytes()
        report = verifier.verify_log(
            tmp_path / "a", signer.vkey, seen=[seen], witnesses=[witness.signer.vkey]
        )
        assert report.witnesses == {"galley-witness": 1_700_000_000} and made.size == report.size
    with pytest.raises(verifier.Wrong, match="has cosigned none"):
        verifier.verify_log(tmp_path / "a", signer.vkey, witnesses=[witness.signer.vkey])


def test_it_refuses_a_log_put_back_and_a_fork(tmp_path: Path) -> None:
    signer = Signer.kept(tmp_path / "k")
    witness = Witness(tmp_path / "w", signer.vkey)
    extend(tmp_path / "a", signer, 100)
    shutil.copytree(tmp_path / "a", tmp_path / "old")
    extend(tmp_path / "a", signer, 50)
    kept = witness.cosign(tmp_path / "a")
    with pytest.raises(AuditDamaged, match="had 150 entries and has 100"):
        witness.cosign(tmp_path / "old")
    extend(tmp_path / "old", signer, 80, b"another")
    with pytest.raises(AuditDamaged, match="does not begin"):
        witness.cosign(tmp_path / "old")
    assert witness.seen == kept
    with pytest.raises(BadNote):
        Witness(tmp_path / "v", Signer.kept(tmp_path / "other").vkey).cosign(tmp_path / "a")


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GALLEY_HOME", str(tmp_path))
    extend(tmp_path / "audit", Signer.kept(tmp_path / "audit.key"), 5)
    assert invoke(["audit", "witness", str(tmp_path / "w")]) == 0
    key = capsys.readouterr().out.split()[-1]
    assert invoke(["audit", "verify", "--seen", str(tmp_path / "w/seen"), "--witness", key]) == 0
    assert "cosigned by galley-witness" in capsys.readouterr().out
