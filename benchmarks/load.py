"""Galley under load: an arrival trace replayed at a multiple of what the machine can serve.

    python -m benchmarks.load overload --trace azure-llm-2023-code.csv.gz --times 1 2 5 10 --seconds 600
    python -m benchmarks.load tenants --seconds 60
    python -m benchmarks.load tax --seconds 60

``overload`` is open-loop: requests are sent when the trace says so, whatever has become of the earlier ones.
It first measures the sustainable rate with a closed loop, then replays the trace with its gaps scaled to each
multiple of that rate. Lengths are those of the trace times ``--scale``; prompts are random token ids, so
nothing is found in the prefix cache. Goodput counts answers within the objective: first token in ``--ttft``
seconds of sending and a mean of at most ``--itl`` seconds between tokens. A refusal (429, 503) is no error of
an admitted request; an answer that ends without its last token is.

``tenants`` compares the first token of a tenant alone and beside one that sends fifty times as much, and how
evenly backlogged equals are served. ``tax`` gives the KV cache a part of what the running requests need and
reports how much was computed twice.
"""

import argparse
import asyncio
import contextlib
import csv
import gzip
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

VOCAB = 1000
"""Prompt ids are drawn below this, which every vocabulary has."""


class Ask(NamedTuple):
    """One request to send: seconds after the start, prompt tokens, output tokens."""

    at: float
    prompt: int
    output: int


class Told(NamedTuple):
    """What became of it. Times are seconds since it was sent."""

    status: int
    prompt: int
    tokens: int
    ttft: float | None
    total: float
    whole: bool
    """The last event came: ``[DONE]``."""
    retry_after: float | None

    @property
    def itl(self) -> float:
        """Mean seconds between tokens."""
        return (self.total - (self.ttft or 0.0)) / max(1, self.tokens - 1) if self.tokens > 1 else 0.0

    def within(self, ttft: float, itl: float) -> bool:
        return self.status == 200 and self.whole and (self.ttft or 1e9) <= ttft and self.itl <= itl


def read_trace(path: Path, scale: float) -> list[Ask]:
    """The rows of an Azure LLM trace (TIMESTAMP, ContextTokens, GeneratedTokens), lengths scaled."""
    with gzip.open(path, "rt", newline="") as lines:
        rows = list(csv.DictReader(lines))
    start = moment(rows[0]["TIMESTAMP"])
    return [
        Ask(
            moment(row["TIMESTAMP"]) - start,
            max(1, round(int(row["ContextTokens"]) * scale)),
            max(1, round(int(row["GeneratedTokens"]) * scale)),
        )
        for row in rows
    ]


def moment(text: str) -> float:
    return datetime.fromisoformat(text[:26]).timestamp()


def at_rate(trace: list[Ask], rate: float, seconds: float) -> list[Ask]:
    """The first ``rate * seconds`` arrivals of the trace, their gaps scaled to fill the time; again from the
    start when it runs out."""
    count = max(2, round(rate * seconds))
    span = trace[-1].at + trace[-1].at / len(trace)
    taken = [
        trace[i % len(trace)]._replace(at=trace[i % len(trace)].at + i // len(trace) * span)
        for i in range(count)
    ]
    stretch = seconds / (taken[-1].at or 1.0)
    return [ask._replace(at=ask.at * stretch) for ask in taken]


class Priority:
    """Where the benchmark runs at real-time priority (``chrt -f N``), the client and the server's event loop
    interrupt the engine's threads. Ordinary scheduling lets them by itself; first in, first out does not, and
    requests would wait for whole steps before anybody reads them."""

    def __init__(self) -> None:
        real = os.sched_getscheduler(0) == os.SCHED_FIFO
        self.base = os.sched_getparam(0).sched_priority if real else None
        self.raise_above(0)

    def start(self) -> list[str]:
        """What a server's command begins with."""
        return [] if self.base is None else ["chrt", "-f", str(self.base)]

    def raise_above(self, pid: int) -> None:
        """Put a process's main thread above the engine's threads."""
        if self.base is not None:
            os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(self.base + 1))


PRIORITY = Priority()


class Server:
    """``galley serve`` as its own process, with an empty receipt store."""

    def __init__(self, model: str, **flags: str) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="galley-load-")
        self.receipts = Path(self.folder.name) / "receipts.db"
        config = Path(self.folder.name) / "config.toml"
        config.write_text(f'[receipts]\npath = "{self.receipts}"\n')
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
        command = [sys.executable, "-m", "galley.cli.main", "--config", str(config), "serve"]
        self.process = subprocess.Popen(
            [*PRIORITY.start(), *command, "--model", model, "--port", "0", *words],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.model = model
        self.port = 0
        self.notes: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.notes.append(line.strip())
            if found := re.search(r"ready after .* at http://[^/]*:(\d+)/v1", line):
                self.port = int(found[1])
                PRIORITY.raise_above(self.process.pid)
                return
        raise SystemExit("\n".join(self.notes))

    @property
    def rss(self) -> int:
        """Resident bytes now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]

    def stored(self) -> int:
        """Receipts in the store."""
        with contextlib.closing(sqlite3.connect(self.receipts)) as store:
            return int(store.execute("SELECT count(*) FROM receipts").fetchone()[0])

    def times(self, user: str, since: float) -> list[dict[str, float]]:
        """The times on the receipts of a user's answers that began after ``since`` (Unix seconds)."""
        with contextlib.closing(sqlite3.connect(self.receipts)) as store:
            found = store.execute(
                "SELECT body FROM receipts WHERE user = ? AND created >= ? AND status = 'ok'", (user, since)
            ).fetchall()
        return [json.loads(body)["times"] for (body,) in found]

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        import urllib.request

        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}[{{ ]", line))

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate(timeout=60)
        self.folder.cleanup()


class Client:
    """Sends requests and notes what becomes of them."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.dice = random.Random(seed)
        self.sent = 0

    async def ask(self, ask: Ask, tenant: str = "") -> Told:
        """One streamed completion of exactly ``ask.output`` tokens."""
        self.sent += 1
        body = json.dumps(
            {
                "model": self.server.model,
                "prompt": [self.dice.randrange(10, VOCAB) for _ in range(ask.prompt)],
                "max_tokens": ask.output,
                "ignore_eos": True,
                "stream": True,
                "temperature": 0,
                **({"user": tenant} if tenant else {}),
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode()
        began = time.monotonic()
        status, tokens, first, last, whole, retry = 0, 0, None, began, False, None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
            writer.write(head + body)
            async for line in reader:
                if line.startswith(b"HTTP/1.1"):
                    status = int(line[9:12])
                elif line.lower().startswith(b"retry-after-ms:"):
                    retry = int(line.split(b":")[1]) / 1000
                elif line.startswith(b"data: {") and b'"error"' not in line:
                    tokens += 1
                    last = time.monotonic()
                    first = first or last
                elif line.startswith(b"data: [DONE]"):
                    whole = True
            writer.close()
        except OSError:
            pass  # status stays 0: counted as an error
        end = last if whole else time.monotonic()
        return Told(status, ask.prompt, tokens, first and first - began, end - began, whole, retry)

    async def open_loop(self, asks: list[Ask], tenant: str = "") -> list[Told]:
        """Send each at its time, whatever has become of the others."""
        began = time.monotonic()
        tasks = []
        for ask in asks:
            await asyncio.sleep(max(0.0, began + ask.at - time.monotonic()))
            tasks.append(asyncio.create_task(self.ask(ask, tenant)))
        return list(await asyncio.gather(*tasks))

    async def closed_loop(
        self, asks: list[Ask], workers: int, seconds: float, tenant: str = ""
    ) -> list[Told]:
        """``workers`` at a time, each sending its next when the last has ended."""
        end = time.monotonic() + seconds
        queue = self.endless(asks)

        async def work() -> list[Told]:
            told = []
            while time.monotonic() < end:
                told.append(await self.ask(next(queue), tenant))
                if told[-1].retry_after is not None:
                    await asyncio.sleep(told[-1].retry_after)
            return told

        return [told for group in await asyncio.gather(*(work() for _ in range(workers))) for told in group]

    @staticmethod
    def endless(asks: list[Ask]) -> Iterator[Ask]:
        while True:
            yield from asks


def quantile(values: list[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def row(told: list[Told], seconds: float, given: argparse.Namespace) -> dict[str, Any]:
    """The figures of one phase."""
    admitted = [one for one in told if one.status not in (429, 503)]
    firsts = [one.ttft for one in admitted if one.ttft is not None]
    good = sum(one.within(given.ttft, given.itl) for one in told)
    return {
        "sent": len(told),
        "sent_per_s": len(told) / seconds,
        "admitted": len(admitted),
        "shed_429": sum(one.status == 429 for one in told),
        "shed_503": sum(one.status == 503 for one in told),
        "errors_of_admitted": sum(not (one.status == 200 and one.whole) for one in admitted),
        "goodput_per_s": good / seconds,
        "ttft_p50_s": quantile(firsts, 0.5),
        "ttft_p95_s": quantile(firsts, 0.95),
        "itl_p95_s": quantile([one.itl for one in admitted if one.tokens > 1], 0.95),
        "retry_after_p50_s": quantile([one.retry_after for one in told if one.retry_after is not None], 0.5),
    }


async def overload(given: argparse.Namespace) -> dict[str, Any]:
    """Goodput, errors, memory and receipts at multiples of the sustainable rate."""
    trace = read_trace(given.trace, given.scale)
    flags = flags_of(given)
    with Server(given.model, **flags) as server:
        client = Client(server, given.seed)
        rate = await sustainable(client, trace, given)
        result: dict[str, Any] = {"sustainable_per_s": rate, "phases": {}}
        say(f"sustainable: {rate:.2f} requests a second, {given.slots} at a time")
        for place, times in enumerate(given.times, 1):
            before = server.rss
            seconds = given.long if given.long and place == len(given.times) else given.seconds
            told = await client.open_loop(at_rate(trace, rate * times, seconds), "")
            phase = {"seconds": seconds, **row(told, seconds, given)}
            phase["rss_before"], phase["rss_after"] = before, server.rss
            result["phases"][f"{times:g}x"] = phase
            say(f"{times:g}x: {json.dumps(phase)}")
        result["requests"] = client.sent
        await asyncio.sleep(1.0)  # the writer's batch
        result["receipts"] = server.stored()
        result["recomputed_share"] = share_recomputed(server)
    best = max(phase["goodput_per_s"] for phase in result["phases"].values())
    for phase in result["phases"].values():
        phase["goodput_of_best"] = phase["goodput_per_s"] / best if best else None
    return result


async def sustainable(client: Client, asks: list[Ask], given: argparse.Namespace) -> float:
    """Answers a second with all slots busy; until the last one has ended, and counting that time."""
    began = time.monotonic()
    warm = await client.closed_loop(asks, given.slots, given.calibrate)
    return sum(one.whole for one in warm) / (time.monotonic() - began)


def parts(server: Server, since: float) -> dict[str, float | None]:
    """Where the small tenant's first tokens spent their time, by the server's receipts: 95th percentiles."""
    time.sleep(0.3)  # the writer's batch
    found = server.times("small", since)
    return {name: quantile([times[name] for times in found], 0.95) for name in ("queue_s", "prefill_s")}


async def tenants(given: argparse.Namespace) -> dict[str, Any]:
    """A small tenant alone and beside one fifty times as busy; then two backlogged equals."""
    flags = flags_of(given)
    ask = Ask(0.0, given.prompt, given.output)
    waits: dict[str, dict[str, float | None]] = {}
    with Server(given.model, **flags) as server:
        client = Client(server, given.seed)
        await client.closed_loop([ask], given.slots, 2.0)
        rate = await sustainable(client, [ask], given)
        # The small one asks for a part of the machine, the other for fifty times that.
        small = rate * given.share
        few = at_rate([ask, ask._replace(at=1.0)], small, given.seconds)
        many = at_rate([ask, ask._replace(at=1.0)], 50 * small, given.seconds)
        began = time.time()
        alone = await client.open_loop(few, "small")
        waits["alone"] = parts(server, began)
        began = time.time()
        beside, flood = await asyncio.gather(client.open_loop(few, "small"), client.open_loop(many, "flood"))
        waits["beside"] = parts(server, began)
        equals = await asyncio.gather(
            *(
                client.closed_loop([ask], 2 * given.slots, given.seconds / 2, name)
                for name in ("left", "right")
            )
        )
    served = [sum(one.tokens + one.prompt for one in told if one.status == 200) for told in equals]
    quiet = quantile([one.ttft for one in alone if one.ttft], 0.95)
    loud = quantile([one.ttft for one in beside if one.ttft], 0.95)
    return {
        "sustainable_per_s": rate,
        "small_per_s": small,
        "p95_of_small": waits,
        "alone": row(alone, given.seconds, given),
        "beside": row(beside, given.seconds, given),
        "flood": row(flood, given.seconds, given),
        "ttft_p95_ratio": loud / quiet if quiet and loud else None,
        "jain_of_equals": sum(served) ** 2 / (len(served) * sum(s * s for s in served))
        if any(served)
        else None,
    }


async def tax(given: argparse.Namespace) -> dict[str, Any]:
    """The share of positions computed again when the running requests need more KV than there is."""
    dice = random.Random(given.seed)
    asks = [
        Ask(
            0.0, dice.randrange(given.prompt // 2, given.prompt * 3 // 2), dice.randrange(8, 2 * given.output)
        )
        for _ in range(1000)
    ]
    need = given.slots * sum(ask.prompt + ask.output for ask in asks) / len(asks)
    flags = flags_of(given) | {"max_wait_s": "0"}
    with Server(given.model, **flags) as probe:
        per_token = kv_bytes_per_token(probe)
    memory = int(need / given.oversubscribe) * per_token
    with Server(given.model, **flags | {"kv_memory": str(memory)}) as server:
        client = Client(server, given.seed)
        told = await client.closed_loop(asks, given.slots, given.seconds)
        return {
            "oversubscribed": given.oversubscribe,
            "kv_tokens": memory // per_token,
            "preemptions": server.metric("vllm:num_preemptions_total"),
            "recomputed_share": share_recomputed(server),
            **row(told, given.seconds, given),
        }


def flags_of(given: argparse.Namespace) -> dict[str, str]:
    """The server's flags."""
    return {
        "max_jobs": str(given.slots),
        "max_wait_s": str(given.wait),
        "token_budget": str(given.budget),
        "kv_memory": given.kv_memory,
    }


def share_recomputed(server: Server) -> float:
    """Recomputed positions over all."""
    return server.metric("galley:recomputed_tokens_total") / max(
        1.0, server.metric("galley:computed_tokens_total")
    )


def kv_bytes_per_token(server: Server) -> int:
    """From what the server said at its start: ``KV 45.0 MiB for 2048 tokens``."""
    for line in server.notes:
        if found := re.search(r"KV ([\d.]+) (KiB|MiB|GiB|TiB) for (\d+) tokens", line):
            power = ("KiB", "MiB", "GiB", "TiB").index(found[2]) + 1
            return round(float(found[1]) * 1024**power / int(found[3]))
    raise SystemExit("the server did not tell its KV memory")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("overload", "tenants", "tax"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--trace", type=Path, help="CSV.gz with TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument(
        "--scale", type=float, default=0.1, help="lengths of the trace are multiplied by this"
    )
    parser.add_argument("--times", type=float, nargs="+", default=[1.0, 2.0, 5.0, 10.0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each phase")
    parser.add_argument("--long", type=float, help="seconds of the last phase, if others")
    parser.add_argument("--calibrate", type=float, default=10.0, help="seconds of the closed loop")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--wait", type=float, default=1.0, help="the server's --max-wait-s")
    parser.add_argument("--budget", type=int, default=128, help="the server's --token-budget")
    parser.add_argument("--kv-memory", default="128MiB", help="the server's --kv-memory")
    parser.add_argument("--ttft", type=float, default=2.5, help="objective for the first token, seconds")
    parser.add_argument("--itl", type=float, default=0.25, help="objective between tokens, seconds")
    parser.add_argument("--prompt", type=int, default=600)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.1, help="of the machine, for the small tenant")
    parser.add_argument("--oversubscribe", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the result there as JSON as well")
    given = parser.parse_args()
    if given.what == "overload" and given.trace is None:
        parser.error("overload needs --trace")
    result = asyncio.run({"overload": overload, "tenants": tenants, "tax": tax}[given.what](given))
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    text = json.dumps({"given": shown, **result}, indent=1)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
