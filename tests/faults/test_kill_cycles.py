"""Kill -9 and restart: a short run of what ``make soak`` does a thousand times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_no_corrupt_read_and_no_lost_receipt_over_kill_and_restart():
    command = [sys.executable, "-m", "tests.faults.kill_cycles", "--cycles", "25"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    totals = json.loads(done.stdout)
    assert totals["cycles"] == 25
    assert totals["answers"] >= 25
    assert totals["cached_tokens"] > 0, "no restart ever found anything on disk"
