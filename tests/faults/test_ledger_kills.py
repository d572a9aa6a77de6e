"""Kill -9 of a serving process: a short run of what ``make soak`` does five hundred times."""

import json
import subprocess
import sys
from pathlib import Path


def test_every_request_that_emitted_a_token_is_settled_once() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.faults.ledger_kills", "--cycles", "6", "--seed", "7"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    totals = json.loads(done.stdout)
    assert totals["cycles"] == 6 and totals["cut"] > 0, totals
