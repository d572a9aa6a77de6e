"""One round of load on every target in turn; JSON on stdout. ``python -m benchmarks.gateways.load PLAN``.

PLAN is JSON: {"targets": [{name, url, headers, model, pid}], "first", "seq", "streams", "rate", "seconds"};
the first target is the direct call, ``first`` says with whom the round begins.

  seq     one request at a time over one connection
  stream  one stream at a time: time to the first content, and to the end
  open    ``rate`` requests a second at fixed times, whatever comes back; latency counts from the planned time

Where this process has a real-time priority, the targets get it too for as long as it runs: otherwise what
is measured is who else uses the machine.
"""

import asyncio
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvloop

from benchmarks.gateways.mock import Timer
from benchmarks.process import ProcessTree
from galley.providers.http import Pool

LIMIT_S = 10.0
"""A later answer is an error."""
PROMPT = "Say sixteen words, please. " * 8


class Target:
    """Somebody who answers chat completions."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.name: str = given["name"]
        self.pid: int = given["pid"]
        base, _, path = given["url"].rpartition("/v1/")
        self.url, self._path = base, f"/v1/{path}"
        self._headers = {"content-type": "application/json", **given.get("headers", {})}
        body = {
            "model": given["model"],
            "max_tokens": 16,
            "messages": [
                {"role": "system", "content": "You are a test."},
                {"role": "user", "content": PROMPT},
            ],
        }
        self._plain = json.dumps(body).encode()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        self._stream = json.dumps({**body, **options}).encode()
        self.tree = ProcessTree(self.pid, self.name)

    async def plain(self, pool: Pool) -> None:
        """One whole answer. Raises RuntimeError when it is none."""
        reply = await pool.request("POST", self._path, self._headers, self._plain)
        body = await reply.read(1 << 20)
        if reply.status != 200 or b'"choices"' not in body or body.count(b"word ") != 16:
            raise RuntimeError(f"{reply.status} {body[:300]!r}")

    async def stream(self, pool: Pool) -> tuple[float, float]:
        """Seconds to the first content and to the end of one stream. Raises RuntimeError when it is cut."""
        began = time.perf_counter()
        reply = await pool.request("POST", self._path, self._headers, self._stream)
        first, said = 0.0, b""
        async for data in reply.chunks():
            said += data
            if not first and b'"word ' in said:
                first = time.perf_counter() - began
        if reply.status != 200 or b"data: [DONE]" not in said or said.count(b'"word ') != 16:
            raise RuntimeError(f"{reply.status} {said[:300]!r} … {said[-100:]!r}")
        return first, time.perf_counter() - began


def percentile(values: list[float], share: float) -> float:
    """Of unsorted values, in milliseconds, to the microsecond."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3, 3)


def summary(values: list[float]) -> dict[str, float]:
    """Quantiles in milliseconds."""
    if not values:
        return {"n": 0}
    return {"n": len(values), **{f"p{s}": percentile(values, s / 100) for s in (50, 95, 99)}}


async def sequential(target: Target, count: int) -> dict[str, Any]:
    """One at a time."""
    pool, spent = Pool(target.url), []
    for _ in range(10):
        await target.plain(pool)
    before = target.tree.cpu_seconds()
    for _ in range(count):
        began = time.perf_counter()
        await target.plain(pool)
        spent.append(time.perf_counter() - began)
    cpu = (target.tree.cpu_seconds() - before) * 1e3 / count
    pool.close()
    return {**summary(spent), "cpu_ms": round(cpu, 3)}


async def streams(target: Target, count: int) -> dict[str, Any]:
    """One stream at a time."""
    pool, firsts, ends = Pool(target.url), [], []
    for _ in range(3):
        await target.stream(pool)
    before = target.tree.cpu_seconds()
    for _ in range(count):
        first, end = await target.stream(pool)
        firsts.append(first)
        ends.append(end)
    cpu = (target.tree.cpu_seconds() - before) * 1e3 / count
    pool.close()
    return {"first": summary(firsts), "end": summary(ends), "cpu_ms": round(cpu, 3)}


async def open_loop(target: Target, rate: float, seconds: float) -> dict[str, Any]:
    """Requests at fixed times."""
    pool = Pool(target.url, max_idle=4096)
    spent: list[float] = []
    errors: dict[str, int] = {}
    tasks: list[asyncio.Task[None]] = []
    late = 0.0

    async def one(due: float) -> None:
        try:
            async with asyncio.timeout(LIMIT_S):
                await target.plain(pool)
            spent.append(time.perf_counter() - due)
        except Exception as error:
            name = f"{type(error).__name__} {str(error)[:80]}"
            errors[name] = errors.get(name, 0) + 1

    loop = asyncio.get_running_loop()
    done = loop.create_future()
    total = int(rate * seconds)
    timer = Timer(loop)
    began = time.perf_counter()

    def send() -> None:
        nonlocal late
        if len(tasks) >= total:
            return
        due = began + (len(tasks) + 1) / rate
        late = max(late, time.perf_counter() - due)
        tasks.append(loop.create_task(one(due)))
        if len(tasks) == total:
            timer.start(0, send)
            done.set_result(None)

    before = target.tree.cpu_seconds()
    timer.start(1 / rate, send, every=True)
    await done
    await asyncio.gather(*tasks)
    cpu = (target.tree.cpu_seconds() - before) * 1e3 / total
    pool.close()
    return {
        **summary(spent),
        "errors": sum(errors.values()),
        "kinds": errors,
        "sent_late_ms": round(late * 1e3, 3),
        "cpu_ms": round(cpu, 3),
    }


@contextlib.contextmanager
def same_priority(targets: list[Target]) -> Iterator[None]:
    """The targets at this process's real-time priority, if it has one."""
    policy = os.sched_getscheduler(0)
    if policy != os.SCHED_FIFO:
        yield
        return
    mine = os.sched_getparam(0)
    change_all(targets, policy, mine)
    try:
        yield
    finally:
        change_all(targets, os.SCHED_OTHER, os.sched_param(0))


def change_all(targets: list[Target], policy: int, parameter: os.sched_param) -> None:
    """Every thread of every process."""
    for target in targets:
        for pid in target.tree.members():
            for thread in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setscheduler(int(thread), policy, parameter)


def rss_mb(target: Target) -> float:
    """Resident set of the tree, in 1e6 bytes."""
    pages = 0
    for pid in target.tree.members():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/statm") as file:
            pages += int(file.read().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


async def main(plan: dict[str, Any]) -> dict[str, Any]:
    """The whole round."""
    targets = [Target(each) for each in plan["targets"]]
    order = targets[plan["first"] :] + targets[: plan["first"]]
    phases: list[tuple[str, Callable[[Target], Any]]] = [
        ("seq", lambda target: sequential(target, plan["seq"])),
        ("stream", lambda target: streams(target, plan["streams"])),
        ("open", lambda target: open_loop(target, plan["rate"], plan["seconds"])),
    ]
    found: dict[str, Any] = {}
    with same_priority(targets):
        for name, load in phases:
            for target in order:
                gc.collect()
                await asyncio.sleep(0.2)
                try:
                    found.setdefault(name, {})[target.name] = await load(target)
                except Exception as error:
                    found.setdefault(name, {})[target.name] = {
                        "failed": f"{type(error).__name__} {error}"[:300]
                    }
    found["rss_mb"] = {target.name: rss_mb(target) for target in targets}
    return found


if __name__ == "__main__":
    with open(sys.argv[1]) as given:
        wanted = json.load(given)
    print(json.dumps(uvloop.run(main(wanted))))
