"""The line protocol against a small child process."""

import sys
from pathlib import Path

import pytest
from benchmarks.protocol import Driver, DriverError

CHILD = """
import json, sys, threading
for line in sys.stdin:
    verb, *rest = line.split()
    if verb == "quit":
        break
    if verb == "die":
        sys.exit(3)
    if verb == "hang":
        threading.Event().wait()
    if verb == "spin":
        threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()
    reply = {"error": "no such verb"} if verb == "bad" else {"verb": verb, "rest": rest}
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def child():
    with Driver("child", [sys.executable, "-c", CHILD]) as driver:
        yield driver


def test_answers_come_back(child: Driver) -> None:
    assert child.ask("decode", 3, "x") == {"verb": "decode", "rest": ["3", "x"]}


def test_errors_carry_the_childs_words(child: Driver) -> None:
    with pytest.raises(DriverError, match="no such verb"):
        child.ask("bad")
    assert child.ask("still")["verb"] == "still"


def test_a_death_is_told(child: Driver) -> None:
    with pytest.raises(DriverError, match="exit status 3"):
        child.ask("die")
    with pytest.raises(DriverError):
        child.ask("hello")


def test_an_idle_process_rests_and_a_spinning_one_does_not(child: Driver) -> None:
    assert child.ask("hello")
    assert child.rest() < 3
    child.ask("spin")
    with pytest.raises(DriverError, match="busy"):
        child.rest(patience_s=0.3)


def test_a_child_that_never_answers_is_killed(child: Driver) -> None:
    with pytest.raises(DriverError, match="died during 'hang'"):
        child.ask("hang", patience_s=0.2)


def test_last_words_are_told_where_they_are_kept(tmp_path: Path) -> None:
    code = "import sys; input(); sys.exit('out of cake')"
    with (
        Driver("child", [sys.executable, "-c", code], log=tmp_path / "log") as driver,
        pytest.raises(DriverError, match="exit status 1: out of cake"),
    ):
        driver.ask("hello")
