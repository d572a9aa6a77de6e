"""Kill -9 of a serving process, again and again: every request that emitted a token is settled exactly once.

``python -m tests.faults.ledger_kills [--cycles 500] [--seed 0]``

Each cycle forks a real HTTP server over one ledger, streams from it with several clients, and kills it at a
random moment. The next server settles what the last one left. At the end every request of which a client saw
a token has one charge, of as many tokens as the client got, or one chunk (here: one token) more.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import uvicorn

from galley.audit.receipts import ReceiptStore
from galley.economics.amount import ZERO
from galley.economics.check import check
from galley.economics.ledger import Ledger
from galley.economics.limits import Limits, Rule
from galley.economics.price import own_price
from galley.economics.query import charges
from galley.economics.store import Store
from galley.endpoint.app import build_app
from galley.endpoint.protocol import Protocol
from galley.router.catalog import Catalog
from galley.router.router import Router
from tests.ledger import counters
from tests.unit.endpoint.fake import FakeProvider

CLIENTS = 4
WORDS = tuple("abcdefghijklmnopqrst")
PRICE = own_price("input=0.10,output=0.40")


def serve(folder: Path, listening: socket.socket) -> None:
    """The process that is killed."""
    ledger = Ledger.at(folder, None)
    ledger.start()
    provider = FakeProvider(WORDS, step_s=0.002)
    receipts = ReceiptStore(folder / "receipts.db", batch_s=0.01)
    router = Router([provider], receipts, catalog=Catalog(own=PRICE), ledger=ledger)
    config = uvicorn.Config(
        build_app(router, receipts), http=Protocol, ws="none", lifespan="off", log_level="critical"
    )
    asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))


class Client(threading.Thread):
    """Asks one request after another until the server is gone.

    Attributes:
        seen: receipt id to (tokens received, whether the answer was complete).
    """

    def __init__(self, port: int, name: str) -> None:
        super().__init__(daemon=True)
        self.port = port
        self.user = name
        self.seen: dict[str, tuple[int, bool]] = {}

    def run(self) -> None:
        try:
            while True:
                self.ask()
        except OSError:
            return

    def ask(self) -> None:
        body = json.dumps({"model": "fake-1b", "prompt": "hi", "stream": True, "user": self.user}).encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as to:
            to.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
            )
            heard = b""
            try:
                while piece := to.recv(65536):
                    heard += piece
            except ConnectionError:
                pass
        head, _, rest = heard.partition(b"\r\n\r\n")
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"x-galley-receipt:"):
                id = line.partition(b":")[2].strip().decode()
                tokens = sum(
                    part.count(b'"text":"') and b'"text":""' not in part for part in rest.split(b"\n\n")
                )
                self.seen[id] = (tokens, b"data: [DONE]" in rest)
        if b"data: [DONE]" not in rest:
            raise ConnectionError("the server is gone")


def run(cycles: int, seed: int, folder: Path) -> dict[str, int]:
    """All cycles; what was counted. Raises AssertionError at the first thing that is wrong."""
    rng = random.Random(seed)
    store = Store(f"sqlite:///{folder / 'ledger.db'}", busy_s=30.0)
    limit = Rule(hard=Limits(money_total=10**15, concurrency=CLIENTS))
    seen: dict[str, tuple[int, bool]] = {}
    for cycle in range(cycles):
        if cycle in (0, cycles // 2):
            # First with a limit, where every request waits for its reservation; then without any.
            store.set_rule("server:all", lambda _, new=None if cycle else limit: new)
            store.close()  # nothing open is to be forked
        listening = socket.create_server(("127.0.0.1", 0))
        pid = os.fork()
        if pid == 0:
            try:
                serve(folder, listening)
            finally:
                os._exit(1)
        port = listening.getsockname()[1]
        listening.close()
        clients = [Client(port, f"user{number}") for number in range(CLIENTS)]
        for client in clients:
            client.start()
        began = time.monotonic()
        while not any(client.seen for client in clients) and time.monotonic() < began + 0.5:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for client in clients:
            client.join(30)
            assert not client.is_alive(), f"cycle {cycle}: a client hangs"
            seen.update(client.seen)
    last = Ledger(store, folder / "ledger.live", tell=lambda line: None)
    last.start()
    asyncio.run(last.settled())
    last.close()
    return verify(store, seen, cycles)


def verify(store: Store, seen: dict[str, tuple[int, bool]], cycles: int) -> dict[str, int]:
    """Every request that emitted a token has exactly one settled entry, of the tokens delivered."""
    found: dict[str, list[dict]] = {}
    for row in charges(store):
        found.setdefault(row["reservation"], []).append(row)
    cut = over = 0
    for id, (tokens, whole) in seen.items():
        if not tokens:
            continue
        rows = found.get(id, [])
        assert len(rows) == 1, f"{id}: {tokens} tokens came, {len(rows)} charges are there"
        billed = rows[0]["completion_tokens"]
        assert tokens <= billed <= tokens + (0 if whole else 1), f"{id}: {tokens} came, {billed} are billed"
        assert rows[0]["cost_pico"] == PRICE.price(usage_of(rows[0]))
        cut += not whole
        over += billed - tokens
    audit = check(store)
    assert audit.good, audit.problems
    assert audit.reservations_open == 0
    assert all(held == ZERO for _, held in counters(store).values())
    store.close()
    return {
        "cycles": cycles,
        "requests": len(seen),
        "with_tokens": sum(tokens > 0 for tokens, _ in seen.values()),
        "cut": cut,
        "unsent_tokens_billed": over,
        "charges": audit.charges,
    }


def usage_of(row: dict):
    """The usage that a charge says."""
    from galley.usage import Usage

    return Usage(
        prompt_tokens=row["prompt_tokens"],
        cached_tokens=row["cached_tokens"],
        completion_tokens=row["completion_tokens"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(args.cycles, args.seed, Path(folder))))


if __name__ == "__main__":
    sys.exit(main())
