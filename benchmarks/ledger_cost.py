"""What the ledger costs on the serving path: two servers of one model, one with it and one without, by turns.

``python -m benchmarks.ledger_cost [--model NAME] [--pairs 8] [--concurrency 16] [--requests 48]``

Each round sends the same requests with the same concurrency to one of the servers, while the other one idles;
rounds alternate on, off, off, on. Printed: output tokens a second of each, the median of the paired ratios
with its quartiles, and the processor seconds of the server per request, which noise touches least.
"""

import argparse
import asyncio
import json
import os
import time
from contextlib import ExitStack

from galley.bench.client import Ask, Client, Target
from galley.bench.launch import Launched
from galley.bench.stats import spread
from galley.config import load

WORDS = ("berth", "tide", "pilot", "customs", "crane", "quay", "anchor", "ballast")


async def round_of(url: str, model: str, number: int, args: argparse.Namespace) -> tuple[float, int]:
    """Output tokens a second of one round, and requests answered. Raises RuntimeError when one failed."""
    target = Target(url=url, model=model, extra={"ignore_eos": True})
    tokens = 0
    waiting = iter(range(args.requests))
    async with Client(target) as client:
        began = time.perf_counter()

        async def one() -> None:
            nonlocal tokens
            for turn in waiting:
                word = WORDS[turn % len(WORDS)]
                found = await client.ask(
                    Ask(prompt=f"{number}.{turn}: about the {word} of the harbour,", max_tokens=args.tokens)
                )
                if found.error is not None:
                    raise RuntimeError(found.error)
                tokens += found.tokens

        await asyncio.gather(*(one() for _ in range(args.concurrency)))
        spent = time.perf_counter() - began
    return tokens / spent, args.requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    config = load()
    model = args.model or config.model
    with ExitStack() as stack:
        servers: dict[str, Launched] = {}
        for name, value in (("on", "1"), ("off", "0")):
            os.environ["GALLEY_LEDGER"] = value
            flags = ["--model", model, "--disk-bytes", "0"]
            servers[name] = stack.enter_context(Launched(config.home, flags))
        del os.environ["GALLEY_LEDGER"]
        for server in servers.values():
            asyncio.run(round_of(server.url, model, -1, args))  # warm
        rates: dict[str, list[float]] = {"on": [], "off": []}
        cpu = {"on": 0.0, "off": 0.0}
        asked = {"on": 0, "off": 0}
        for pair in range(args.pairs):
            for name in ("on", "off") if pair % 2 == 0 else ("off", "on"):
                before = servers[name].cpu_seconds()
                rate, requests = asyncio.run(round_of(servers[name].url, model, pair, args))
                cpu[name] += servers[name].cpu_seconds() - before
                asked[name] += requests
                rates[name].append(rate)
    ratios = spread(on / off for on, off in zip(rates["on"], rates["off"], strict=True))
    print(
        json.dumps(
            {
                "model": model,
                "concurrency": args.concurrency,
                "tokens_each": args.tokens,
                "pairs": args.pairs,
                "tokens_per_s": {name: round(spread(each).median, 1) for name, each in rates.items()},
                "ratio_on_off": {
                    "median": round(ratios.median, 4),
                    "low": round(ratios.low, 4),
                    "high": round(ratios.high, 4),
                },
                "cpu_ms_per_request": {name: round(1000 * cpu[name] / asked[name], 2) for name in cpu},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
