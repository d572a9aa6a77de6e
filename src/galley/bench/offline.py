"""The engine in this process, without HTTP: one stream, and many at once."""

import threading
import time
from collections.abc import Sequence

import msgspec

from galley.bench.stats import Latency, Spread, spread
from galley.errors import EngineFault
from galley.runtime.engine import Engine
from galley.runtime.out import StepOut
from galley.types import SamplingParams

__all__ = ["Alone", "Batch", "Track", "latency", "run_prompts", "throughput"]


class Track:
    """When each token of one job came, and how the job ended. An ``on_step`` of the engine."""

    def __init__(self, ended: threading.Semaphore) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []
        self.cached = 0
        self.problem: str | None = None
        self._ended = ended

    def __call__(self, out: StepOut) -> None:
        """Runs in the engine's thread."""
        now = time.perf_counter()
        self.ids.extend(out.token_ids)
        self.times.extend([now] * len(out.token_ids))
        self.cached += out.cached_tokens or 0
        if out.error is not None or out.finish is not None:
            if out.error is not None:
                self.problem = str(out.error)
            elif out.meter is not None and out.meter.preemptions:
                self.problem = "the job was preempted: too few KV blocks for this workload"
            self._ended.release()


def run_prompts(
    engine: Engine, prompts: Sequence[list[int]], tokens: int, *, patience_s: float = 600.0
) -> tuple[float, list[Track]]:
    """Run all prompts at once on a started engine, ``tokens`` greedy tokens each.

    Returns the start time (``time.perf_counter``) and a track for each. Raises EngineFault when a job fails,
    is preempted, or does not end within ``patience_s``.
    """
    ended = threading.Semaphore(0)
    tracks = [Track(ended) for _ in prompts]
    params = SamplingParams(max_tokens=tokens, temperature=0.0, seed=1, ignore_eos=True)
    names = [f"bench-{i}" for i in range(len(prompts))]
    start = time.perf_counter()
    for name, prompt, track in zip(names, prompts, tracks, strict=True):
        engine.submit(name, prompt, params, on_step=track)
    try:
        for _ in prompts:
            if not ended.acquire(timeout=patience_s):
                raise EngineFault(f"a job did not end within {patience_s:.0f} s")
    except BaseException:
        for name in names:
            engine.cancel(name)
        raise
    for track in tracks:
        if track.problem is not None:
            raise EngineFault(track.problem)
        if len(track.ids) != tokens:
            raise EngineFault(f"{len(track.ids)} tokens came, {tokens} were asked for")
    return start, tracks


class Alone(msgspec.Struct, frozen=True, kw_only=True):
    """One stream, over all repeats. ``cached_tokens``: prompt tokens found in the prefix cache, summed."""

    prompt: int
    output: int
    ttft: Latency
    itl: Latency | None
    e2e: Latency
    prefill_tok_s: Spread
    """Prompt tokens over time to the first token."""
    decode_tok_s: Spread | None
    """Of the tokens after the first; None when there is only one."""
    cached_tokens: int
    gaps: list[float]
    """Every gap between tokens, in order."""


def latency(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> Alone:
    """The prompts one after the other. Raises what ``run_prompts`` raises."""
    first, whole, gaps, decode, cached = list[float](), list[float](), list[float](), list[float](), 0
    for prompt in prompts:
        start, (track,) = run_prompts(engine, [prompt], tokens)
        first.append(track.times[0] - start)
        whole.append(track.times[-1] - start)
        gaps += [b - a for a, b in zip(track.times, track.times[1:], strict=False)]
        cached += track.cached
        if tokens > 1:
            decode.append((tokens - 1) / (track.times[-1] - track.times[0]))
    ttft, e2e = Latency.of(first), Latency.of(whole)
    assert ttft is not None and e2e is not None
    return Alone(
        prompt=len(prompts[0]),
        output=tokens,
        ttft=ttft,
        itl=Latency.of(gaps),
        e2e=e2e,
        prefill_tok_s=spread(len(prompt) / t for prompt, t in zip(prompts, first, strict=True)),
        decode_tok_s=spread(decode) if decode else None,
        cached_tokens=cached,
        gaps=gaps,
    )


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """So many streams at once, over all repeats."""

    streams: int
    prompt: int
    output: int
    output_tok_s: Spread
    """All output tokens over the time from first submission to last end: prompts included."""
    decode_tok_s: Spread | None
    """While all streams run: between the last one's first token and the first one's end."""
    ttft: Latency
    cached_tokens: int


def throughput(engine: Engine, rounds: Sequence[Sequence[list[int]]], tokens: int) -> Batch:
    """Each round's prompts at once, round after round. Raises what ``run_prompts`` raises."""
    whole, decode, first, cached = list[float](), list[float](), list[float](), 0
    for prompts in rounds:
        start, tracks = run_prompts(engine, prompts, tokens)
        whole.append(tokens * len(tracks) / (max(t.times[-1] for t in tracks) - start))
        first += [t.times[0] - start for t in tracks]
        cached += sum(t.cached for t in tracks)
        together = decode_rate(tracks)
        if together is not None:
            decode.append(together[0] / together[1])
    ttft = Latency.of(first)
    assert ttft is not None
    return Batch(
        streams=len(rounds[0]),
        prompt=len(rounds[0][0]),
        output=tokens,
        output_tok_s=spread(whole),
        decode_tok_s=spread(decode) if len(decode) == len(rounds) else None,
        ttft=ttft,
        cached_tokens=cached,
    )


def decode_rate(tracks: Sequence[Track]) -> tuple[int, float] | None:
    """(tokens, seconds) while all tracks ran; None when they never did.

    From the step in which the last one gives its first token to the step in which the first one ends: every
    track gets one token in each of those steps.
    """
    last = max(tracks, key=lambda t: t.times[0])
    end = min(t.times[-1] for t in tracks)
    count = min(range(len(last.times)), key=lambda k: abs(last.times[k] - end))
    if count == 0:
        return None
    return count * len(tracks), last.times[count] - last.times[0]
