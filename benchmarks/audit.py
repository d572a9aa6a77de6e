"""What the audit log costs: `python -m benchmarks.audit append | verify | serve`.

append: microseconds an entry, from a receipt handed over to a durable entry (group commit), and to the log
alone. verify: seconds for the standalone verifier over --entries. serve: the throughput of one server with
the log and one without, taking turns, requests of --tokens each; the figure is the median of the rounds'
ratios with its range.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from galley.audit import verifier
from galley.audit.assemble import assemble
from galley.audit.log import AuditLog
from galley.audit.note import Signer
from galley.audit.scribe import Scribe
from galley.audit.subjects import Subjects
from galley.types import Choice, Delta, Digests, Receipt, Request, Route, SamplingParams

__all__ = ["main"]


class Nowhere:
    """A receipt store that keeps nothing."""

    def hold(self, receipt: Receipt) -> None: ...

    def record(self, receipt: Receipt) -> None: ...


def sample(tokens: int = 40) -> tuple[Receipt, Request, dict[int, list[Delta]]]:
    """A request of a few hundred bytes and its answer."""
    messages = [{"role": "user", "content": "What is gravity? " * 10}]
    asked = Request(
        id="req_1", api="chat.completions", model="m", params=SamplingParams(seed=1), created=time.time(),
        messages=messages, user="alice",
    )  # fmt: skip
    digests = Digests(weights="a" * 64, tokenizer="b" * 64, template="c" * 64, engine="d" * 64)
    route = Route(model="m", provider="local", rule="fixed", reason="named by the request")
    receipt = assemble(
        receipt_id="rcp_01M7YPPH3T4FXAPH44JD72YZ7A", request=asked, route=route, digests=digests, meters={},
        status="ok", choices=[Choice(index=0, completion_tokens=tokens, finish="stop")],
    )  # fmt: skip
    return receipt, asked, {0: [Delta(index=0, text="word ", token_ids=[i]) for i in range(tokens)]}


def append(folder: Path, entries: int) -> dict[str, float]:
    """Microseconds an entry."""
    signer = Signer.kept(folder / "key")
    log = AuditLog(folder / "scribe", signer)
    scribe = Scribe(log, Subjects(folder / "scribe/keys"), Nowhere())
    receipt, asked, pieces = sample()
    began = time.perf_counter()
    handed = 0.0
    for _ in range(entries):
        before = time.perf_counter()
        scribe.put(receipt, asked, pieces)
        handed += time.perf_counter() - before
    scribe.flush(600)
    whole = time.perf_counter() - began
    scribe.close()
    plain = AuditLog(folder / "plain", signer)
    entry = json.dumps({"type": "request", "pad": "x" * 1100}).encode()
    began = time.perf_counter()
    for start in range(0, entries, 256):
        plain.append([entry] * min(256, entries - start))
        if plain.unsigned >= 4096:
            plain.checkpoint()
    plain.close()
    alone = time.perf_counter() - began
    return {
        "us_an_entry_receipt_to_signed": whole / entries * 1e6,
        "us_an_entry_on_the_callers_thread": handed / entries * 1e6,
        "us_an_entry_log_alone": alone / entries * 1e6,
    }


def verify(folder: Path, entries: int) -> dict[str, float]:
    """Seconds to verify a log of so many entries of some 1,100 bytes, with the verifier that stands alone."""
    signer = Signer.kept(folder / "key")
    log = AuditLog(folder / "log", signer, sync=lambda fd: None)
    pad = b"x" * 1050
    while log.size < entries:
        first, last = log.size, min(entries, log.size + 4096)
        log.append([b'{"id":"%d","pad":"%s","type":"request"}' % (i, pad) for i in range(first, last)])
        log.checkpoint()
    log.close()
    began = time.perf_counter()
    report = verifier.verify_log(folder / "log", signer.vkey)
    assert report.size == entries
    return {"entries": entries, "verify_s": time.perf_counter() - began}


class Server:
    """`galley serve` in a process of its own, with a home of its own."""

    def __init__(self, home: Path, model: Path, port: int, env: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.model = ""
        start = "from galley.cli.start import main; main()"
        words = [sys.executable, "-c", start, "--home", str(home), "serve", "--model", str(model)]
        given = {**os.environ, "GALLEY_KV_DISK_BYTES": "0", **env}
        self.process = subprocess.Popen([*words, "--port", str(port)], env=given, stderr=subprocess.DEVNULL)

    def wait(self) -> None:
        """Until it is ready."""
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/ready", timeout=2).close()
                break
            except OSError:
                time.sleep(0.1)
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5) as answer:
            self.model = json.loads(answer.read())["data"][0]["id"]

    def ask(self, number: int, tokens: int) -> int:
        """One request; its completion tokens."""
        prompt = f"{number}: once upon a time"
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return int(json.loads(answer.read())["usage"]["completion_tokens"])

    def load(self, given: argparse.Namespace) -> float:
        """Tokens a second."""
        began = time.perf_counter()
        with ThreadPoolExecutor(given.concurrency) as pool:
            made = sum(pool.map(lambda number: self.ask(number, given.tokens), range(given.requests)))
        return made / (time.perf_counter() - began)


def serve(folder: Path, given: argparse.Namespace) -> dict[str, object]:
    """Throughput with and without, in turns."""
    modes = {mode: {"GALLEY_AUDIT": mode} for mode in ("off", *given.modes.split(","))}
    servers = {
        mode: Server(folder / mode, given.model, 7400 + i, env) for i, (mode, env) in enumerate(modes.items())
    }
    found: dict[str, list[float]] = {mode: [] for mode in modes}
    try:
        for server in servers.values():
            server.wait()
            server.load(given)
        for number in range(given.rounds):
            for mode in list(servers) if number % 2 == 0 else list(servers)[::-1]:
                found[mode].append(servers[mode].load(given))
    finally:
        for server in servers.values():
            server.process.terminate()
        for server in servers.values():
            server.process.wait()
    result: dict[str, object] = {
        "tokens_per_s": {mode: statistics.median(each) for mode, each in found.items()}
    }
    for mode in given.modes.split(","):
        cost = [1 - with_it / without for with_it, without in zip(found[mode], found["off"], strict=True)]
        result[f"cost_{mode}"] = {"median": statistics.median(cost), "low": min(cost), "high": max(cost)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["append", "verify", "serve"])
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--model", type=Path, help="GGUF file (serve)")
    parser.add_argument("--modes", default="on,strict", help="to be compared with off (serve)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=8)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="galley-audit-"))
    try:
        if given.what == "append":
            result: object = append(folder, given.entries)
        elif given.what == "verify":
            result = verify(folder, given.entries)
        else:
            result = serve(folder, given)
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"what": given.what, **result}, indent=2))  # type: ignore[dict-item]


if __name__ == "__main__":
    main()
