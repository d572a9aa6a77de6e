"""Start the mock upstream and the gateways, put the same load on each in turn, print the table.

  python -m benchmarks.gateways --litellm VENV/bin/litellm --portkey DIR/node_modules --wrap "chrt -f 20"

Without --litellm or --portkey they are left out. Every round visits every target; what is reported is the
median over rounds of gateway minus direct within the same round. Galley runs with an API key, receipts in
SQLite, a price limit that is checked for each request, and budgets in the ledger; and once more without the
ledger. The others run as in their own quick starts.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.process import ProcessTree

KEY = "sk-overhead-benchmark"
CATALOG = """
[policy]
location = "any"
max_usd = "1"
[[model]]
id = "mock"
context = 8192
[[provider]]
name = "upstream"
kind = "openai"
url = "http://127.0.0.1:{port}/v1"
[[provider.offer]]
model = "mock"
price = [{{ input = "0.15", output = "0.60" }}]
"""
LITELLM = """
model_list:
  - model_name: mock
    litellm_params:
      model: openai/mock
      api_base: http://127.0.0.1:{port}/v1
      api_key: none
"""
LOOPBACK = """
const net = require("net");
const real = net.Server.prototype.listen;
net.Server.prototype.listen = function (first, ...rest) {
  const then = rest.filter((each) => typeof each === "function");
  if (typeof first === "number") return real.call(this, { port: first, host: "127.0.0.1" }, ...then);
  if (first && typeof first === "object") return real.call(this, { ...first, host: "127.0.0.1" }, ...rest);
  return real.call(this, first, ...rest);
};
"""
"""Portkey's server has no option for the address it binds to."""


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(command: Sequence[str], log: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server for as long as the block runs."""
    with log.open("wb") as out:
        started = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **env}, start_new_session=True
        )
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)


def wait_for(url: str, log: Path, *, within_s: float = 180.0) -> None:
    """Until something answers there below 500. Raises SystemExit with the log's end."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return
        except OSError:
            pass
        time.sleep(0.25)
    raise SystemExit(f"nothing answers at {url}:\n{log.read_text()[-2000:]}")


class Stand:
    """The servers under test, started one by one; each is stopped when ``stack`` closes."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self.targets: list[dict[str, Any]] = []
        self.mock_port = free_port()
        self._add(
            "direct",
            [sys.executable, "-m", "benchmarks.gateways.mock", "--port", str(self.mock_port)],
            self.mock_port,
            "/v1/models",
        )

    def _add(
        self, name: str, command: Sequence[str], port: int, ready: str, headers: Any = None, **env: str
    ) -> None:
        log = self._folder / f"{name}.log"
        started = self._stack.enter_context(process(command, log, **env))
        wait_for(f"http://127.0.0.1:{port}{ready}", log)
        self.targets.append(
            {
                "name": name,
                "url": f"http://127.0.0.1:{port}/v1/chat/completions",
                "model": "mock",
                "headers": headers or {},
                "pid": started.pid,
            }
        )

    def galley(self, name: str, *, ledger: bool) -> None:
        """Galley as a router alone: no model of its own. With the ledger a budget of the whole server and
        one of every key are held, neither ever reached."""
        home = self._folder / name
        home.mkdir()
        (home / "catalog.toml").write_text(CATALOG.format(port=self.mock_port))
        program = [sys.executable, "-m", "galley.cli.main"]
        for scope in ("server:all", "key:*") if ledger else ():
            limits = ["budget", "set", scope, "--money-month", "1000000", "--requests-minute", "1000000"]
            environment = {**os.environ, "GALLEY_HOME": str(home)}
            subprocess.run([*program, *limits], check=True, env=environment, stdout=subprocess.DEVNULL)
        port = free_port()
        self._add(
            name,
            [*program, "serve", "--model", "none", "--port", str(port)],
            port,
            "/ready",
            {"authorization": f"Bearer {KEY}"},
            GALLEY_HOME=str(home),
            GALLEY_CATALOG=str(home / "catalog.toml"),
            GALLEY_API_KEY=KEY,
            GALLEY_LEDGER="true" if ledger else "false",
        )

    def litellm(self, binary: Path) -> None:
        """LiteLLM's proxy, one worker, without database."""
        config = self._folder / "litellm.yaml"
        config.write_text(LITELLM.format(port=self.mock_port))
        port = free_port()
        command = [str(binary), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        self._add(
            "litellm",
            [*command, "--num_workers", "1", "--telemetry", "False"],
            port,
            "/health/liveliness",
            {"authorization": f"Bearer {KEY}"},
            LITELLM_MASTER_KEY=KEY,
            LITELLM_LOCAL_MODEL_COST_MAP="True",
        )

    def portkey(self, modules: Path) -> None:
        """Portkey's open gateway on Node."""
        loopback = self._folder / "loopback.cjs"
        loopback.write_text(LOOPBACK)
        port = free_port()
        server = modules / "@portkey-ai/gateway/build/start-server.js"
        self._add(
            "portkey",
            ["node", "--require", str(loopback), str(server), f"--port={port}", "--headless"],
            port,
            "/",
            {
                "authorization": "Bearer none",
                "x-portkey-provider": "openai",
                "x-portkey-custom-host": f"http://127.0.0.1:{self.mock_port}/v1",
            },
            NODE_ENV="production",
        )


def added(rounds: list[dict[str, Any]], name: str, *path: str) -> list[float]:
    """Gateway minus direct in each round where both were measured."""
    found = []
    for each in rounds:
        values = []
        for who in (name, "direct"):
            value: Any = each[path[0]][who]
            for key in path[1:]:
                value = value.get(key) if isinstance(value, dict) else None
            values.append(value)
        if None not in values:
            found.append(values[0] - values[1])
    return found


def plain(rounds: list[dict[str, Any]], name: str, *path: str) -> list[float]:
    """The gateway's own figure in each round."""
    found = []
    for each in rounds:
        value: Any = each[path[0]][name]
        for key in path[1:]:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found.append(value)
    return found


def cell(values: list[float]) -> str:
    """Median and range."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.median(values):.2f} [{min(values):.2f}..{max(values):.2f}]"


def table(rounds: list[dict[str, Any]], names: list[str], rate: float) -> str:
    """Markdown."""
    head = [
        "gateway",
        "added p50, ms",
        "added p99",
        "CPU ms a request",
        "added TTFT p50",
        "added TTFT p99",
        "CPU ms a stream",
        f"{rate:g}/s: p99, absolute",
        "errors",
        "CPU ms a request",
        "RSS MB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name in names:
        part = plain if name == "direct" else added
        sent = sum(plain(rounds, name, "open", "n")) + sum(plain(rounds, name, "open", "errors"))
        errors = sum(plain(rounds, name, "open", "errors"))
        row = [
            name + (" (absolute)" if name == "direct" else ""),
            cell(part(rounds, name, "seq", "p50")),
            cell(part(rounds, name, "seq", "p99")),
            cell(plain(rounds, name, "seq", "cpu_ms")),
            cell(part(rounds, name, "stream", "first", "p50")),
            cell(part(rounds, name, "stream", "first", "p99")),
            cell(plain(rounds, name, "stream", "cpu_ms")),
            cell(plain(rounds, name, "open", "p99")),
            f"{100 * errors / sent:.2f} %" if sent else "-",
            cell(plain(rounds, name, "open", "cpu_ms")),
            cell(plain(rounds, name, "rss_mb")),
        ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    """Start, measure, print."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--litellm", type=Path, help="the litellm program of an environment with litellm[proxy]")
    ask.add_argument("--portkey", type=Path, help="a node_modules with @portkey-ai/gateway")
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--seq", type=int, default=300)
    ask.add_argument("--streams", type=int, default=20)
    ask.add_argument("--rate", type=float, default=200)
    ask.add_argument("--seconds", type=float, default=5)
    ask.add_argument("--wrap", default="", help="put before each round's command, such as 'chrt -f 20'")
    ask.add_argument("--out", type=Path, help="raw figures, JSON")
    wanted = ask.parse_args()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        stand = Stand(folder, stack)
        stand.galley("galley", ledger=True)
        stand.galley("galley without ledger", ledger=False)
        if wanted.portkey:
            stand.portkey(wanted.portkey)
        if wanted.litellm:
            stand.litellm(wanted.litellm)
        names = [target["name"] for target in stand.targets]
        rounds = []
        for number in range(wanted.rounds):
            plan = folder / "plan.json"
            plan.write_text(
                json.dumps(
                    {
                        "targets": stand.targets,
                        "first": number % len(names),
                        **{name: getattr(wanted, name) for name in ("seq", "streams", "rate", "seconds")},
                    }
                )
            )
            command = [*shlex.split(wanted.wrap), sys.executable, "-m", "benchmarks.gateways.load", str(plan)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            rounds.append(json.loads(said))
            print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
        peaks = {each["name"]: ProcessTree(each["pid"], each["name"]).peak_rss_mb() for each in stand.targets}
    print(table(rounds, names, wanted.rate))
    if wanted.out:
        shown = {"machine": machine.facts(), "rounds": rounds, "peak_rss_mb": peaks, "rate": wanted.rate}
        wanted.out.write_text(json.dumps(shown, indent=1) + "\n")


if __name__ == "__main__":
    main()
