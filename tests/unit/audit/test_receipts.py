"""The receipt store: exactly once, never blocking, and loud when the disk fails."""

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from galley.audit.assemble import assemble
from galley.audit.assemble import receipt_id as new_id
from galley.audit.receipts import ReceiptStore
from galley.audit.spool import Spool, encode
from galley.errors import GalleyError
from galley.types import Receipt, Request, SamplingParams


def receipt(created: float = 1.0, model: str = "m", **changes: object) -> Receipt:
    made = Request(
        id="r",
        api="completions",
        model=model,
        params=SamplingParams(),
        created=created,
        prompts=["secret"],
        **changes,
    )
    return assemble(
        receipt_id=new_id(created),
        request=made,
        route=None,
        digests=None,
        meters={},
        status="ok",
        output=["told"],
    )


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, lines: list[str]):
    made = ReceiptStore(tmp_path / "receipts.db", retry_s=0.05, busy_s=0.05, tell=lines.append)
    yield made
    made.close()


def count(path: Path) -> int:
    db = sqlite3.connect(path)
    try:
        return db.execute("SELECT count(*) FROM receipts").fetchone()[0]
    finally:
        db.close()


def test_recorded_receipt_is_there_at_once_and_on_disk_after_flush(store, tmp_path):
    one = receipt()
    store.record(one)
    assert store.get(one.id) == one
    assert store.flush(5)
    assert ReceiptStore(tmp_path / "receipts.db").get(one.id) == one
    assert store.get("rcp_none") is None


def test_same_receipt_twice_is_stored_once(store, tmp_path):
    one = receipt()
    store.record(one)
    store.flush(5)
    store.record(one)
    store.flush(5)
    assert count(tmp_path / "receipts.db") == 1 and store.duplicates == 1


def test_list_is_newest_first_and_filters(store):
    made = [receipt(float(i), model="ab"[i % 2], user=f"u{i % 3}") for i in range(12)]
    for one in made[:6]:
        store.record(one)
    store.flush(5)
    for one in made[6:]:
        store.record(one)
    assert [r.created for r in store.list(3)] == [11.0, 10.0, 9.0]
    assert [r.created for r in store.list(9, model="a", since=4, before=9)] == [8.0, 6.0, 4.0]
    assert {r.created for r in store.list(9, user="u1")} == {1.0, 4.0, 7.0, 10.0}


def test_follow_sees_what_another_store_commits(store, tmp_path):
    store.record(receipt(1.0))
    store.flush(5)
    stop = threading.Event()
    feed = ReceiptStore(tmp_path / "receipts.db").follow(poll_s=0.01, stopped=stop.is_set)
    late = [receipt(2.0), receipt(3.0)]

    def later() -> None:
        time.sleep(0.05)
        for one in late:
            store.record(one)

    thread = threading.Thread(target=later)
    thread.start()
    assert [next(feed), next(feed)] == late
    stop.set()
    assert next(feed, None) is None
    thread.join()


def test_locked_database_never_blocks_record_and_loses_nothing(store, tmp_path, lines):
    store.record(receipt(1.0))
    store.flush(5)
    lock = sqlite3.connect(tmp_path / "receipts.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    began = time.monotonic()
    blocked = [receipt(2.0), receipt(3.0)]
    for one in blocked:
        store.record(one)
    assert time.monotonic() - began < 0.05
    assert store.flush(5)
    assert store.failures == 2 and "locked" in (store.fault or "")
    assert store.get(blocked[0].id) == blocked[0], "unsaved receipts can still be read"
    spool = tmp_path / "receipts.spool.jsonl"
    assert len(spool.read_text().splitlines()) == 2
    assert len([line for line in lines if blocked[1].id in line and "RECEIPT NOT STORED" in line]) == 1
    lock.execute("ROLLBACK")
    lock.close()
    deadline = time.monotonic() + 5
    while store.fault and time.monotonic() < deadline:
        time.sleep(0.02)
    assert store.fault is None and count(tmp_path / "receipts.db") == 3
    assert not spool.exists() and store.duplicates == 0


def test_spool_is_replayed_on_the_next_start(tmp_path, lines):
    path = tmp_path / "receipts.db"
    first = ReceiptStore(path, tell=lines.append)
    first._connect = lambda: (_ for _ in ()).throw(sqlite3.OperationalError("database or disk is full"))
    lost = [receipt(1.0), receipt(2.0)]
    for one in lost:
        first.record(one)
    first.close()
    assert first.failures == 2 and not path.exists()
    with (tmp_path / "receipts.spool.jsonl").open("a") as spool:
        spool.write('{"id": "torn off in the mid')
    second = ReceiptStore(path, tell=lines.append)
    second.replay()
    assert second.flush(5)
    assert {r.id for r in second.list()} == {r.id for r in lost}
    second.close()
    assert not (tmp_path / "receipts.spool.jsonl").exists()
    assert "torn off" in (tmp_path / "receipts.spool.rejects").read_text()


def test_captured_text_stays_out_of_the_log_but_not_out_of_the_spool(tmp_path, lines):
    store = ReceiptStore(tmp_path / "receipts.db", tell=lines.append)
    store._connect = lambda: (_ for _ in ()).throw(sqlite3.OperationalError("disk I/O error"))
    store.record(receipt(capture=True))
    store.close()
    assert "secret" not in "".join(lines) and lines
    assert "secret" in (tmp_path / "receipts.spool.jsonl").read_text()


def test_when_the_spool_fails_too_the_log_line_has_everything(tmp_path, lines):
    store = ReceiptStore(tmp_path / "gone" / "receipts.db", tell=lines.append)
    store._connect = lambda: (_ for _ in ()).throw(sqlite3.OperationalError("disk I/O error"))
    one = receipt(capture=True)
    store.record(one)
    store.close()
    shown = json.loads(lines[0][lines[0].index('{"id"') :])
    assert shown["id"] == one.id and shown["prompt"] == ["secret"]
    assert "only copy" in lines[0]


def test_damaged_database_is_set_aside_not_deleted(tmp_path, lines):
    path = tmp_path / "receipts.db"
    path.write_bytes(b"this is no database" * 1000)
    store = ReceiptStore(path, tell=lines.append)
    with pytest.raises(GalleyError) as caught:
        store.list()
    assert caught.value.code == "receipts_unreadable"
    one = receipt()
    store.record(one)
    store.close()
    assert store.get(one.id) == one and store.failures == 0
    aside = list(tmp_path.glob("receipts.db.damaged-*"))
    assert len(aside) == 1 and aside[0].read_bytes().startswith(b"this is no")
    assert any("damaged" in line for line in lines)


def test_database_of_a_newer_galley_is_left_alone(tmp_path, lines):
    path = tmp_path / "receipts.db"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version=99")
    db.close()
    store = ReceiptStore(path, tell=lines.append)
    store.record(receipt())
    store.close()
    assert store.failures == 1 and (tmp_path / "receipts.spool.jsonl").exists()
    with pytest.raises(GalleyError, match="version 99"):
        store.list()


def test_record_after_close_is_spooled(store, tmp_path, lines):
    store.record(receipt(1.0))
    store.close()
    store.record(receipt(2.0))
    assert store.failures == 1 and len((tmp_path / "receipts.spool.jsonl").read_text().splitlines()) == 1


def test_text_that_is_not_unicode_does_not_poison_the_batch(store, tmp_path):
    store.record(receipt(1.0, user="\ud800"))
    store.record(receipt(2.0))
    assert store.flush(5)
    assert count(tmp_path / "receipts.db") == 2 and store.failures == 0
    assert store.list()[1].user == "?"


KILLED = """
import sys, os, time
from pathlib import Path
from tests.unit.audit.test_receipts import receipt
from galley.audit.receipts import ReceiptStore
from galley.audit.spool import Spool, encode
store = ReceiptStore(Path(sys.argv[1]))
n = 0
while True:
    for _ in range(20):
        store.record(receipt(float(n))); n += 1
    store.flush()
    print(n, flush=True)
"""


def test_kill_9_loses_no_committed_receipt(tmp_path):
    path = tmp_path / "receipts.db"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    promised = 0
    for _ in range(5):
        promised = int(child.stdout.readline())
    child.send_signal(signal.SIGKILL)
    for line in child.stdout:
        promised = int(line)
    child.stdout.close()
    child.wait()
    store = ReceiptStore(path)
    assert len(store.list(100_000)) >= promised
    store.record(receipt())
    assert store.flush(5)
    store.close()
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


FULL = """
import resource, signal, sys
from pathlib import Path
from tests.unit.audit.test_receipts import receipt
from galley.audit.receipts import ReceiptStore
from galley.audit.spool import Spool, encode
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = ReceiptStore(Path(sys.argv[1]))
store.record(receipt(0.0)); store.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
for i in range(200):
    store.record(receipt(float(i + 1)))
store.flush()
print(store.failures, store.fault, flush=True)
store.close()
"""


def test_full_disk_loses_no_receipt(tmp_path):
    """A real refusal by the kernel: no file of the process may grow past 60 kB."""
    path = tmp_path / "receipts.db"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    failures = int(done.stdout.split()[0])
    assert failures > 0 and "None" not in done.stdout
    told = {
        json.loads(line[line.index('{"id"') :])["created"]
        for line in done.stderr.splitlines()
        if "NOT STORED" in line
    }
    assert len(told) == failures
    after = ReceiptStore(path, tell=lambda line: None)
    after.replay()
    after.flush(5)
    stored = {r.created for r in after.list(1000)}
    after.close()
    assert stored | told == {float(i) for i in range(201)}, "every receipt is on disk or on stderr"


def test_spooled_receipts_are_found_without_a_write(tmp_path: Path) -> None:
    late = receipt(3)
    Spool.append(tmp_path / "r.spool.jsonl", encode(late) + b"\nnot a receipt\n")
    reader = ReceiptStore(tmp_path / "r.db")
    assert reader.get(late.id) == late
    assert reader.list() == [late] and reader.list(model="another") == []
    assert (tmp_path / "r.spool.jsonl").exists() and not (tmp_path / "r.db").exists(), (
        "reading writes nothing"
    )
