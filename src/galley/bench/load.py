"""Putting a server under load: open loop (requests come when they come) and closed loop (N clients)."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from galley.bench.arrivals import Arrival
from galley.bench.client import Ask, Client, Outcome
from galley.bench.stats import Latency
from galley.errors import ConfigError

__all__ = ["Figures", "Loaded", "Slo", "closed_loop", "figures", "open_loop"]

SLO_PARTS = ("ttft", "itl", "e2e")


class Loaded(msgspec.Struct, frozen=True):
    """All requests of one run, in the order they were made; times count from its start."""

    outcomes: list[Outcome]
    wall_s: float
    """From the start to the end of the last answer."""
    client_cpu_s: float
    """Processor time this process used meanwhile."""


async def open_loop(
    client: Client, arrivals: Sequence[Arrival], make: Callable[[int, Arrival], Ask]
) -> Loaded:
    """Send each request at its time, whether or not earlier ones were answered.

    A request's latency counts from its arrival, also when this client was late in sending it.
    """
    began, cpu = time.perf_counter(), time.process_time()
    tasks: list[asyncio.Task[Outcome]] = []
    # Made beforehand: making prompts must not delay sending.
    asks = [make(number, arrival) for number, arrival in enumerate(arrivals)]
    try:
        for arrival, ask in zip(arrivals, asks, strict=True):
            scheduled = began + arrival.at
            await asyncio.sleep(max(0.0, scheduled - time.perf_counter()))
            tasks.append(asyncio.create_task(client.ask(ask, scheduled=scheduled)))
        outcomes = [outcome.since(began) for outcome in await asyncio.gather(*tasks)]
    except BaseException:
        await _cancel(tasks)
        raise
    return Loaded(outcomes, time.perf_counter() - began, time.process_time() - cpu)


async def closed_loop(client: Client, clients: int, requests: int, make: Callable[[int], Ask]) -> Loaded:
    """``clients`` of them, each sending its next request when its last was answered; ``requests`` in all."""
    asks = [make(number) for number in range(requests)]
    outcomes: list[Outcome | None] = [None] * requests
    waiting = iter(range(requests))
    began, cpu = time.perf_counter(), time.process_time()

    async def one() -> None:
        for number in waiting:
            outcomes[number] = await client.ask(asks[number])

    tasks = [asyncio.create_task(one()) for _ in range(min(clients, requests))]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        await _cancel(tasks)
        raise
    found = [outcome.since(began) for outcome in outcomes if outcome is not None]
    return Loaded(found, time.perf_counter() - began, time.process_time() - cpu)


async def _cancel(tasks: Sequence["asyncio.Task[Outcome] | asyncio.Task[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a good answer keeps, in seconds; None does not matter."""

    ttft: float | None = None
    itl: float | None = None
    """Mean gap between pieces of text."""
    e2e: float | None = None

    @classmethod
    def parse(cls, texts: Sequence[str]) -> "Slo | None":
        """``ttft=0.5``, ``itl=50ms``, ``e2e=10s``; None for none. Raises ConfigError."""
        found: dict[str, float] = {}
        for text in texts:
            name, _, limit = text.partition("=")
            number, scale = limit.strip().removesuffix("s"), 1.0
            if number.endswith("m"):
                number, scale = number[:-1], 1e-3
            try:
                value = float(number) * scale
            except ValueError:
                value = -1.0
            if name not in SLO_PARTS or not 0 < value < 1e9:
                raise ConfigError(f"{text!r} is not an objective such as ttft=0.5 or itl=50ms", param="slo")
            found[name] = value
        return cls(**found) if found else None

    def met(self, outcome: Outcome) -> bool:
        """Whether an answer kept all of it; a failed one never does."""
        gaps = outcome.gaps
        mean = sum(gaps) / len(gaps) if gaps else 0.0
        return (
            outcome.error is None
            and (self.ttft is None or (outcome.ttft is not None and outcome.ttft <= self.ttft))
            and (self.itl is None or mean <= self.itl)
            and (self.e2e is None or outcome.e2e <= self.e2e)
        )


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One run in numbers. Latencies and tokens are those of answers without error.

    Attributes:
        wall_s: start to end of the last answer, so start and end of the load are part of every rate.
        itl: gaps between pieces of text; where a piece holds several tokens, ``tokens_per_piece`` tells.
        late: how long after its arrival a request was sent: the client's own fault.
        goodput_share, goodput_rps: answers within the objective, of all requests and a second.
        prompt_tokens, cached_tokens: by the server's count; None where some answer came without.
        tokens_counted_by: ``server`` (usage), or ``pieces`` where some answer came without.
        client_cores: processors this client kept busy; client_us_per_token: processor time a token.
    """

    mode: Literal["open", "closed"]
    requests: int
    ok: int
    errors: dict[str, int]
    wall_s: float
    requests_s: float
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int
    output_tok_s: float
    tokens_per_piece: float | None
    tokens_counted_by: Literal["server", "pieces"]
    ttft: Latency | None
    itl: Latency | None
    e2e: Latency | None
    late: Latency | None
    goodput_share: float | None
    goodput_rps: float | None
    client_cores: float
    client_us_per_token: float | None


def figures(loaded: Loaded, *, mode: Literal["open", "closed"], slo: Slo | None = None) -> Figures:
    """Sum up one run. O(tokens log tokens)."""
    good = [o for o in loaded.outcomes if o.error is None]
    errors: dict[str, int] = {}
    for o in loaded.outcomes:
        if o.error is not None:
            errors[o.error] = errors.get(o.error, 0) + 1
    tokens, pieces = sum(o.tokens for o in good), sum(len(o.times) for o in good)
    prompts = [o.prompt_tokens for o in good if o.prompt_tokens is not None]
    cached = [o.cached_tokens for o in good if o.cached_tokens is not None]
    kept = sum(slo.met(o) for o in loaded.outcomes) if slo else 0
    return Figures(
        mode=mode,
        requests=len(loaded.outcomes),
        ok=len(good),
        errors=errors,
        wall_s=loaded.wall_s,
        requests_s=len(good) / loaded.wall_s,
        prompt_tokens=sum(prompts) if good and len(prompts) == len(good) else None,
        cached_tokens=sum(cached) if good and len(cached) == len(good) else None,
        output_tokens=tokens,
        output_tok_s=tokens / loaded.wall_s,
        tokens_per_piece=tokens / pieces if pieces else None,
        tokens_counted_by="server" if all(o.counted for o in good) else "pieces",
        ttft=Latency.of(o.ttft for o in good if o.ttft is not None),
        itl=Latency.of(gap for o in good for gap in o.gaps),
        e2e=Latency.of(o.e2e for o in good),
        late=Latency.of(o.sent - o.scheduled for o in loaded.outcomes) if mode == "open" else None,
        goodput_share=kept / len(loaded.outcomes) if slo and loaded.outcomes else None,
        goodput_rps=kept / loaded.wall_s if slo else None,
        client_cores=loaded.client_cpu_s / loaded.wall_s,
        client_us_per_token=1e6 * loaded.client_cpu_s / tokens if tokens else None,
    )
