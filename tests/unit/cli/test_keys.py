"""`galley keys` end to end: made, listed, revoked, and what is shown of them."""

import json
from pathlib import Path

import pytest

from galley.cli.main import invoke


def call(capsys: pytest.CaptureFixture[str], home: Path, *words: str) -> str:
    assert invoke(["--home", str(home), "keys", *words]) == 0
    return capsys.readouterr().out


def test_a_keys_life(capsys, tmp_path):
    made = json.loads(
        call(capsys, tmp_path, "create", "--name", "ci", "--scope", "batch", "--model", "m", "--json")
    )
    assert made["key"].startswith("sk-galley-") and made["scopes"] == ["batch"] and made["models"] == ["m"]
    plain = call(capsys, tmp_path, "create").strip()
    assert plain.startswith("sk-galley-")
    listed = json.loads(call(capsys, tmp_path, "list", "--json"))
    assert listed[0]["id"] == made["id"] and len(listed) == 2
    assert "key" not in listed[0] and made["key"] not in json.dumps(listed)
    assert made["id"] in call(capsys, tmp_path, "revoke", made["id"])
    assert "revoked" in call(capsys, tmp_path, "list")


def test_faults(capsys, tmp_path):
    assert invoke(["--home", str(tmp_path), "keys", "revoke", "key_none"]) == 2
    assert invoke(["--home", str(tmp_path), "keys", "create", "--scope", "root"]) == 2
    assert call(capsys, tmp_path, "list", "--json").strip() == "[]"
