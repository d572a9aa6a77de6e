"""Kill -9 and restart, again and again: receipts and the disk cache of a working engine.

``python -m tests.faults.kill_cycles [--cycles 1000] [--seed 0]``

Each cycle forks a process with its own engine over a tiny random model, a receipt store and a disk tier so
small that it evicts all the time; kills it at a random moment; and then checks that every receipt that was
settled is in the database, that every answer was the one a cold engine gives, that no block had to be thrown
away as damaged, and that the index, the limit and the pin are as they were.
"""

import argparse
import json
import os
import random
import select
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from hashlib import blake2b
from pathlib import Path

from galley.audit.assemble import assemble, receipt_id
from galley.audit.receipts import ReceiptStore
from galley.errors import CacheFull
from galley.kv import chain
from galley.kv.blockfile import HEADER_BYTES
from galley.kv.disk import DiskStore
from galley.kv.files import rounded
from galley.model.families import spec_from_gguf
from galley.model.gguf import GGUF
from galley.runtime.backend import native_missing, open_backend
from galley.runtime.engine import Engine
from galley.runtime.pace import Pace
from galley.runtime.tier import DiskOptions, identity
from galley.types import Request, SamplingParams
from tests.tiny import tiny_gguf

B = 16
HEADS = [[(7 * i + 31 * h) % 290 + 3 for i in range(6 * B)] for h in range(3)]
PROMPTS = [
    HEADS[k % 3][: (2 + k % 5) * B] + [(13 * i + k) % 290 + 3 for i in range(5 + 9 * k)] for k in range(15)
]
PARAMS = SamplingParams(temperature=0.8, seed=11, max_tokens=12)
LIMIT_BLOCKS = 40


def engine_of(path: Path, disk: DiskOptions | None) -> Engine:
    """An engine over the tiny model, for which every disk hit is worth taking."""
    gguf = GGUF.open(path)
    kind = "reference" if native_missing() else "native"
    backend = open_backend(kind, gguf, spec_from_gguf(gguf), threads=1, num_blocks=64).backend
    pace = Pace(token_s=1.0, byte_s=1e-12, trip_s=0.0)
    engine = Engine(backend, eos_ids=(), model_key="tiny", disk=disk, pace=pace, max_jobs=4)
    engine.start()
    return engine


def digest(ids: list[int]) -> str:
    return blake2b(repr(ids).encode(), digest_size=8).hexdigest()


def work(folder: Path, model: Path, seed: int, out: int, *, oracle: bool) -> None:
    """The process that is killed: answers prompts, four at a time, and tells of each settled receipt."""
    block = block_on_disk(model)
    disk = None if oracle else DiskOptions(path=folder / "kv", limit=LIMIT_BLOCKS * block)
    engine = engine_of(model, disk)
    receipts = ReceiptStore(folder / "receipts.db", batch_s=0.002)
    rng = random.Random(seed)
    order = list(range(len(PROMPTS))) if oracle else [rng.randrange(len(PROMPTS)) for _ in range(100_000)]
    if seed == 0 and not oracle:
        order[:0] = [0]
    free = threading.Semaphore(4)
    lock = threading.Lock()

    def ask(turn: int, which: int) -> None:
        got: list[int] = []

        def on_step(step) -> None:
            got.extend(step.token_ids)
            if step.last:
                threading.Thread(target=settle, args=(turn, which, got, step), daemon=True).start()

        engine.submit(f"j{turn}", PROMPTS[which], PARAMS, on_step=on_step)

    def settle(turn: int, which: int, got: list[int], step) -> None:
        request = Request(
            id=f"j{turn}",
            api="test",
            model="tiny",
            params=PARAMS,
            created=time.time(),
            prompts=[PROMPTS[which]],
        )
        receipt = assemble(
            receipt_id=receipt_id(),
            request=request,
            route=None,
            digests=None,
            meters={0: step.meter},
            status="ok",
        )
        receipts.record(receipt)
        if receipts.flush(10) and step.error is None:
            told = {
                "receipt": receipt.id,
                "prompt": which,
                "answer": digest(got),
                "cached": step.meter.cached_tokens,
                "damaged": engine.disk.stats().damaged if engine.disk else 0,
            }
            with lock:
                os.write(out, json.dumps(told).encode() + b"\n")
        free.release()

    for turn, which in enumerate(order):
        free.acquire()
        ask(turn, which)
    for _ in range(4):
        free.acquire()
    os._exit(0)


def block_on_disk(model: Path) -> int:
    """Bytes of one block on disk."""
    with GGUF.open(model) as gguf:
        spec = spec_from_gguf(gguf)
    return rounded(HEADER_BYTES + spec.layers * 2 * spec.kv_rows * B * (4 if native_missing() else 2))


def spawn(folder: Path, model: Path, seed: int, *, oracle: bool = False) -> tuple[int, int]:
    """Fork a worker; its pid and the end to read from. This process has no threads to lose by forking."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            work(folder, model, seed, write, oracle=oracle)
        finally:
            os._exit(1)
    os.close(write)
    return pid, read


def listen(read: int, seconds: float | None) -> bytes:
    """What a worker says: until it ends, or for so many seconds after its first word."""
    heard, until = b"", time.monotonic() + 60.0
    while (left := until - time.monotonic()) > 0:
        if not select.select([read], [], [], left)[0]:
            break
        piece = os.read(read, 65536)
        if not piece:
            break
        if not heard and seconds is not None:
            until = time.monotonic() + seconds
        heard += piece
    return heard


def lines(heard: bytes) -> list[dict]:
    """Whole lines; one cut off by the kill was not settled as far as anybody knows."""
    return [json.loads(line) for line in heard.split(b"\n")[:-1]]


def pin(store: DiskStore, model_key: str) -> None:
    """Pin the head of the first prompt. Raises CacheFull while it is not on disk."""
    space = chain.namespace(model_key, tenant="local")
    *_, leaf = chain.digests(space, PROMPTS[0][: 2 * B], B)
    store.pin("head", leaf, tokens=2 * B, model="tiny", tenant="local", salted=False)


def run(cycles: int, seed: int, folder: Path) -> dict[str, int]:
    """All cycles; what was counted. Raises AssertionError at the first thing that is wrong."""
    model = tiny_gguf(folder / "tiny.gguf", types="Q8_0", hidden=64, ffn=96, seed=5)
    pid, read = spawn(folder / "oracle", model, 0, oracle=True)
    expected = {told["prompt"]: told["answer"] for told in lines(listen(read, None))}
    os.close(read)
    os.waitpid(pid, 0)
    assert len(expected) == len(PROMPTS), "the oracle died"
    with GGUF.open(model) as gguf:
        kind = "reference" if native_missing() else "native"
        backend = open_backend(kind, gguf, spec_from_gguf(gguf), threads=1, num_blocks=1).backend
        known, model_key = identity(backend, "tiny"), f"tiny/{backend.fingerprint}"
        backend.close()
    limit = LIMIT_BLOCKS * block_on_disk(model)
    rng = random.Random(seed)
    settled: set[str] = set()
    totals = {"cycles": 0, "answers": 0, "cached_tokens": 0, "blocks": 0, "scratch": 0}
    pinned = False
    for cycle in range(cycles):
        pid, read = spawn(folder, model, seed + cycle)
        heard = listen(read, rng.choice((0.0, 0.01, 0.05, 0.1, 0.2)) * rng.random())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        heard += listen(read, 0.0)
        os.close(read)
        assert heard, f"cycle {cycle}: the worker said nothing"
        for told in lines(heard):
            assert told["answer"] == expected[told["prompt"]], f"cycle {cycle}: a wrong answer: {told}"
            assert told["damaged"] == 0, f"cycle {cycle}: a damaged block after kill -9: {told}"
            settled.add(told["receipt"])
            totals["answers"] += 1
            totals["cached_tokens"] += told["cached"]
        with sqlite3.connect(folder / "receipts.db") as db:
            stored = {row[0] for row in db.execute("SELECT id FROM receipts")}
        db.close()
        assert settled <= stored, f"cycle {cycle}: lost receipts: {settled - stored}"
        totals["scratch"] += len(list((folder / "kv").glob("*/.tmp*")))
        store = DiskStore(folder / "kv", limit, identity=known)
        assert store.check() == [], f"cycle {cycle}: {store.check()}"
        if pinned:
            (record,) = store.records()
            assert store.has(bytes.fromhex(record.leaf)), f"cycle {cycle}: the pin's blocks are gone"
        else:
            try:
                pin(store, model_key)
                pinned = True
            except CacheFull:
                pinned = False  # not written yet when the worker was killed; the next cycle may have it
        totals["blocks"] = store.stats().blocks
        totals["cycles"] += 1
    assert pinned or cycles < 10, "the head was never on disk"
    return totals | {"receipts": len(settled)}


def main() -> None:
    """Run and print what was counted."""
    parser = argparse.ArgumentParser(description="Kill -9 and restart cycles of receipts and disk cache.")
    parser.add_argument("--cycles", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "oracle").mkdir()
        began = time.monotonic()
        totals = run(given.cycles, given.seed, Path(folder))
    totals["seconds"] = round(time.monotonic() - began)
    json.dump(totals, sys.stdout)
    print()


if __name__ == "__main__":
    main()
