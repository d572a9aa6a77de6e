"""Chaos: many requests through one router over three bad upstreams.

    python -m scripts.chaos --requests 10000 --kill-every 30

Everything is real HTTP on the loopback interface (``tests/upstream.py``). They refuse, stall, limit,
lie and cut a few percent of their replies; each in turn is killed and started again. Prints what clients saw.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from typing import Any

import msgspec
from tests.upstream import WORDS, MockUpstream

from galley.errors import GalleyError, Upstream
from galley.router.catalog import Catalog, Document
from galley.router.outside import open_providers
from galley.router.router import Router
from galley.types import Receipt, Request, SamplingParams

TEXT = "".join(WORDS)
SCRIPTS = {
    "steady": {"ok": 0.97, "refuse": 0.01, "limit": 0.01, "drop": 0.01},
    "liar": {"ok": 0.92, "garbage": 0.02, "error200": 0.02, "empty": 0.02, "cut": 0.01, "eof": 0.01},
    "slow": {"ok": 0.93, "slow": 0.05, "stall": 0.005, "overload": 0.015},
}


class Kept:
    """Receipts in memory."""

    def __init__(self) -> None:
        self.receipts: list[Receipt] = []

    def record(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)


def build(ups: list[MockUpstream], kept: Kept, seed: int, *, hedge: float) -> Router:
    """A router over the upstreams, all offering one model at slightly different prices."""
    table = {
        "policy": {"location": "any", "hedge_share": hedge, "hedge_after_s": 0.15, "deadline_s": 20.0},
        "model": [{"id": "big", "context": 8192}],
        "provider": [
            {
                "name": up.name,
                "kind": "openai",
                "url": up.url,
                "first_s": 1.0,
                "idle_s": 1.0,
                "offer": [{"model": "big", "price": [{"input": str(1 + i), "output": str(2 + i)}]}],
            }
            for i, up in enumerate(ups)
        ],
    }
    catalog = Catalog(None, msgspec.convert(table, Document))
    rng = random.Random(seed)
    return Router(open_providers(catalog, lambda _: None), kept, catalog=catalog, rng=rng, breaker_s=1.0)


async def chaos(
    *, requests: int, concurrency: int, kill_every_s: float, seed: int, hedge: float = 0.05
) -> dict[str, Any]:
    """Run it; what clients saw, as numbers."""
    ups = [MockUpstream(name, weights=w, seed=seed + i) for i, (name, w) in enumerate(SCRIPTS.items())]
    for up in ups:
        up.keep_bodies = False
        await up.start()
    kept = Kept()
    router = build(ups, kept, seed, hedge=hedge)
    told: dict[str, Any] = dict.fromkeys(
        ("ok", "errors_before_commit", "cut_with_error", "wrong_answers", "silently_cut"), 0
    )
    kinds: dict[str, int] = {}
    firsts: list[float] = []
    numbers = iter(range(requests))
    rng = random.Random(seed)

    async def client() -> None:
        for number in numbers:
            request = Request(
                id=f"req_{number}",
                api="chaos",
                model="big",
                params=SamplingParams(),
                created=time.time(),
                messages=[{"role": "user", "content": "Six by seven?"}],
                stream=rng.random() < 0.5,
            )
            text, began, finish = "", time.monotonic(), None
            try:
                async with router.open(request) as answer:
                    async for delta in answer.deltas():
                        if not text:
                            firsts.append(time.monotonic() - began)
                        text += delta.text
                        finish = delta.finish or finish
            except GalleyError as error:
                kind = error.kind if isinstance(error, Upstream) else str(error.code)
                if text and kind == "cut":
                    told["cut_with_error"] += 1
                    if not TEXT.startswith(text):
                        told["wrong_answers"] += 1
                else:
                    told["errors_before_commit"] += 1
                    kinds[kind] = kinds.get(kind, 0) + 1
                continue
            told["ok"] += 1
            told["silently_cut"] += finish is None or len(text) < len(TEXT)
            told["wrong_answers"] += text != TEXT and len(text) >= len(TEXT)

    async def killer() -> None:
        while True:
            for up in ups:
                await asyncio.sleep(kill_every_s / 2)
                await up.kill()
                await asyncio.sleep(kill_every_s / 2)
                await up.start()
                await router.probe()

    began = time.monotonic()
    killing = asyncio.ensure_future(killer())
    await asyncio.gather(*(client() for _ in range(concurrency)))
    killing.cancel()
    took = time.monotonic() - began
    for up in ups:
        await up.kill()
    for provider in router.catalog.providers():
        provider.close()  # type: ignore[attr-defined]
    attempts = [attempt for receipt in kept.receipts for attempt in receipt.attempts]
    firsts.sort()
    told |= {
        "requests": requests,
        "seconds": round(took, 1),
        "without_receipt": requests - len({receipt.request_id for receipt in kept.receipts}),
        "calls": len(attempts),
        "extra_calls": len(attempts) - requests,
        "hedges": sum(attempt.hedge for attempt in attempts),
        "errors_by_kind": kinds,
        "ttft_p50_ms": round(1e3 * statistics.median(firsts), 1),
        "ttft_p99_ms": round(1e3 * firsts[int(0.99 * (len(firsts) - 1))], 1),
    }
    return told


async def tails(*, requests: int, concurrency: int, seed: int) -> dict[str, Any]:
    """Time to the first output with and without hedging, over two upstreams that are slow for 5 % of their
    calls (0.5 s instead of 5 ms). Alternates between the two, a tenth of the requests at a time."""
    firsts: dict[float, list[float]] = {0.0: [], 0.05: []}
    calls = dict.fromkeys(firsts, 0)
    ups = [
        MockUpstream(name, weights={"ok": 0.95, "slow": 0.05}, seed=seed + i, delay_s=0.005, slow_s=0.5)
        for i, name in enumerate(("one", "two"))
    ]
    for up in ups:
        up.keep_bodies = False
        await up.start()
    routers = {share: build(ups, Kept(), seed, hedge=share) for share in firsts}
    for part in range(20):
        share = (0.0, 0.05)[part % 2]

        async def client(share: float = share) -> None:
            for number in range(requests // 10 // concurrency):
                request = Request(
                    id=f"req_{number}",
                    api="tails",
                    model="big",
                    params=SamplingParams(),
                    created=time.time(),
                    messages=[{"role": "user", "content": "Six by seven?"}],
                    stream=True,
                )
                began = time.monotonic()
                async with routers[share].open(request) as answer:
                    firsts[share].append(time.monotonic() - began)
                    async for _ in answer.deltas():
                        pass
                assert answer.receipt is not None
                calls[share] += len(answer.receipt.attempts)

        await asyncio.gather(*(client() for _ in range(concurrency)))
    for router in routers.values():
        for provider in router.catalog.providers():
            provider.close()  # type: ignore[attr-defined]
    for up in ups:
        await up.kill()
    told: dict[str, Any] = {}
    for share, times in firsts.items():
        times.sort()
        told["hedged" if share else "plain"] = {
            "requests": len(times),
            "calls": calls[share],
            "ttft_p50_ms": round(1e3 * statistics.median(times), 1),
            "ttft_p99_ms": round(1e3 * times[int(0.99 * (len(times) - 1))], 1),
        }
    return told


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--kill-every", type=float, default=30.0)
    parser.add_argument("--hedge", type=float, default=0.05, help="share of requests that may be hedged")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tails", action="store_true", help="compare tails with and without hedging instead")
    given = parser.parse_args()
    if given.tails:
        told = asyncio.run(tails(requests=given.requests, concurrency=given.concurrency, seed=given.seed))
        print(json.dumps(told, indent=1))
        return
    told = asyncio.run(
        chaos(
            requests=given.requests,
            concurrency=given.concurrency,
            kill_every_s=given.kill_every,
            seed=given.seed,
            hedge=given.hedge,
        )
    )
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
