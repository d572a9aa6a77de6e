"""How a receipt is made: one pure function over what happened, used by every door (HTTP, CLI, Python).

Nothing here measures; it adds up what the engine measured per choice. So the arithmetic of a receipt can be
tested without an engine, and is the same whoever asks for it.
"""

import hashlib
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from galley import __version__
from galley.errors import GalleyError
from galley.types import (
    Attempt,
    Choice,
    Digests,
    Judgement,
    Money,
    Receipt,
    ReceiptStatus,
    Request,
    Resources,
    Route,
    SamplingParams,
    Times,
    Usage,
)

__all__ = ["Metered", "add_resources", "add_usage", "assemble", "error_fields", "receipt_id"]

SHAPING = ("tools", "template_kwargs", "add_generation_prompt")
"""Fields of a Request, beside messages and parameters, that the rendered prompt depends on."""
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


class Metered(Protocol):
    """What the engine measured of one choice (``runtime.job.JobMeter`` satisfies this).

    Times are monotonic seconds; None where the job never got that far.
    """

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def cache_write_tokens(self) -> int: ...
    @property
    def cache_ends(self) -> tuple[tuple[int, int], ...]: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def arrived(self) -> float: ...
    @property
    def first_scheduled(self) -> float | None: ...
    @property
    def first_token(self) -> float | None: ...
    @property
    def last_token(self) -> float | None: ...
    @property
    def finished(self) -> float | None: ...
    @property
    def itl_max_s(self) -> float | None: ...
    @property
    def steps(self) -> int: ...
    @property
    def computed_tokens(self) -> int: ...
    @property
    def recomputed_tokens(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def prefill_flop(self) -> float: ...
    @property
    def decode_bytes(self) -> float: ...
    @property
    def kv_byte_seconds(self) -> float: ...


def receipt_id(now: float | None = None) -> str:
    """``rcp_`` and 26 Crockford base-32 characters: 48 bits of milliseconds, then 80 random bits.

    Ids of different milliseconds sort by time as plain strings (the ULID layout).
    """
    millis = int((time.time() if now is None else now) * 1000) & (2**48 - 1)
    number = millis << 80 | secrets.randbits(80)
    return "rcp_" + "".join(CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def error_fields(error: BaseException, *, echo: bool = True) -> dict[str, Any]:
    """The receipt's ``error``: the wire object plus the HTTP status. Foreign exceptions show their type.

    The message of a bad request may quote what was sent, which may be a piece of the prompt: without ``echo``
    every quotation but the parameter's name is left out.
    """
    if isinstance(error, GalleyError):
        fields = {**error.body()["error"], "status": error.status}
        if not echo and error.status == 400:
            fields["message"] = QUOTED.sub(
                lambda match: match.group() if match.group()[1:-1] == error.param else "'…'",
                fields["message"],
            )
        return fields
    return {
        "message": f"{type(error).__name__}: {error}"[:2000],
        "type": "server_error",
        "param": None,
        "code": "server_error",
        "status": 500,
    }


def assemble(
    *,
    receipt_id: str,
    request: Request,
    route: Route | None,
    digests: Digests | None,
    meters: Mapping[int, Metered],
    status: ReceiptStatus,
    error: BaseException | None = None,
    choices: Sequence[Choice] = (),
    params: SamplingParams | None = None,
    seeds: Sequence[int] = (),
    started: float | None = None,
    ended: float | None = None,
    output: list[str] | None = None,
    output_ids: list[list[int]] | None = None,
    attempts: Sequence[Attempt] = (),
    price_lines: Sequence[dict[str, Any]] = (),
    money: Money | None = None,
    notes: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
    pooling: str | None = None,
    judgement: Judgement | None = None,
) -> Receipt:
    """Add up one request. O(choices).

    Args:
        receipt_id: made at arrival, so that it can be named in a header before the answer exists.
        meters: by choice index (``prompt * n + choice``); a choice that never reached the engine has none.
        choices: how each choice ended, with the tokens *kept* (TXT-4: tokens after a stop string are neither
            delivered nor billed). Without it the meters' own counts are used.
        params: effective parameters when they differ from the request's (e.g. ``max_tokens`` resolved).
        seeds: the noise key of each prompt, in order, or one for all.
        started, ended: monotonic arrival and end as seen by the caller. Without them the meters' earliest
            arrival and latest finish count; a request refused before the engine has only these.
        output, output_ids: text and token ids of each choice; kept only if ``request.capture``.
        attempts: every call made for the request, when a router made them.
        price_lines: what it cost, by kind. money: what the ledger made of it.
        notes: further adjustments, beside the request's own, for ``clamped``.
        warnings: what went wrong in reading the output.
        pooling: how embeddings were pooled.
        judgement: of a cascade; what its first attempt used, when it was not the answer, is in there alone.

    Usage counts a prompt once however many choices share it (``n`` > 1), as OpenAI does; completion tokens
    add up over choices. ``cached_tokens`` of a prompt is the smallest among its scheduled choices: the later
    ones find what the first has just computed, which is no saving to the user. TTFT is the earliest first
    token of any choice minus arrival. Resources are plain sums over choices, so nothing used is left out.
    """
    effective = params or request.params
    usage = add_usage(meters, choices, max(1, effective.n))
    shown = msgspec.to_builtins(effective)
    if effective.structured_outputs is not None and not request.capture:
        # A schema can say much of what a prompt is about: without capture its digest has to do.
        spelled = msgspec.json.encode(effective.structured_outputs, order="sorted")
        shown["structured_outputs"] = {"sha256": hashlib.sha256(spelled).hexdigest()}
    if seeds:
        shown["seed"] = seeds[0]
        if len(set(seeds)) > 1:
            shown["seeds"] = list(seeds)
    return Receipt(
        id=receipt_id,
        request_id=request.id,
        created=request.created,
        api=request.api,
        model=route.model if route else request.model,
        status=status,
        tenant=request.tenant,
        user=request.user,
        key=request.key,
        stream=request.stream,
        usage=usage,
        times=add_times(meters, started, ended),
        resources=add_resources(meters),
        route=route,
        digests=digests or Digests(),
        choices=list(choices)
        or [
            Choice(index=i, completion_tokens=m.completion_tokens, finish=None)
            for i, m in sorted(meters.items())
        ],
        params=shown,
        ignored_params=list(request.ignored_params),
        clamped={**request.clamped, **(notes or {})},
        error=None if error is None else error_fields(error, echo=request.capture),
        metadata=dict(request.metadata),
        prompt=(request.messages if request.messages is not None else request.prompts)
        if request.capture
        else None,
        output=output if request.capture else None,
        output_ids=output_ids if request.capture else None,
        asked={name: getattr(request, name) for name in SHAPING} if request.capture else {},
        price_lines=list(price_lines),
        money=money,
        attempts=list(attempts),
        version=__version__,
        warnings=list(warnings),
        pooling=pooling,
        judgement=judgement,
    )


def add_resources(meters: Mapping[int, Metered]) -> Resources:
    """Plain sums over choices."""
    every = meters.values()
    return Resources(
        computed_tokens=sum(m.computed_tokens for m in every),
        recomputed_tokens=sum(m.recomputed_tokens for m in every),
        preemptions=sum(m.preemptions for m in every),
        steps=sum(m.steps for m in every),
        prefill_flop=float(sum(m.prefill_flop for m in every)),
        decode_bytes=float(sum(m.decode_bytes for m in every)),
        kv_byte_seconds=float(sum(m.kv_byte_seconds for m in every)),
    )


def add_usage(meters: Mapping[int, Metered], choices: Sequence[Choice], n: int) -> Usage:
    """Token counts over choices; ``n`` choices share one prompt."""
    prompts: dict[int, list[Metered]] = {}
    for index, meter in meters.items():
        prompts.setdefault(index // n, []).append(meter)
    cached = 0
    for group in prompts.values():
        seen = [m.cached_tokens for m in group if m.first_scheduled is not None]
        cached += min(seen, default=0)
    return Usage(
        prompt_tokens=sum(max(m.prompt_tokens for m in group) for group in prompts.values()),
        cached_tokens=cached,
        cache_write_tokens=sum(m.cache_write_tokens for m in meters.values()),
        cache_write_ttl=written_by_lifetime(meters.values()),
        completion_tokens=sum(c.completion_tokens for c in choices)
        if choices
        else sum(m.completion_tokens for m in meters.values()),
        reasoning_tokens=sum(c.reasoning_tokens for c in choices),
    )


def written_by_lifetime(meters: Iterable[Metered]) -> dict[str, int]:
    """Cache-write tokens before an explicit breakpoint, by its lifetime; a token counts for the first
    breakpoint after it."""
    found: dict[str, int] = {}
    for meter in meters:
        at, last = meter.cached_tokens, meter.cached_tokens + meter.cache_write_tokens
        for end, seconds in meter.cache_ends:
            part = min(end, last) - at
            if part > 0:
                name = f"{seconds // 3600}h" if seconds % 3600 == 0 else f"{seconds // 60}m"
                found[name] = found.get(name, 0) + part
                at += part
    return found


def add_times(meters: Mapping[int, Metered], started: float | None, ended: float | None) -> Times:
    """Times of a request from those of its choices; monotonic seconds in, durations out."""
    every = list(meters.values())
    arrived = started if started is not None else min((m.arrived for m in every), default=None)
    if arrived is None:
        return Times()
    scheduled = min((m.first_scheduled for m in every if m.first_scheduled is not None), default=None)
    first = min((m.first_token for m in every if m.first_token is not None), default=None)
    last = max((m.last_token for m in every if m.last_token is not None), default=None)
    finish = (
        ended
        if ended is not None
        else max((m.finished for m in every if m.finished is not None), default=None)
    )
    gaps = 0
    spread = 0.0
    for m in every:
        if m.first_token is not None and m.last_token is not None and m.completion_tokens > 1:
            gaps += m.completion_tokens - 1
            spread += m.last_token - m.first_token
    slowest = [m.itl_max_s for m in every if m.itl_max_s is not None and m.completion_tokens > 1]
    return Times(
        queue_s=max(0.0, scheduled - arrived) if scheduled is not None else 0.0,
        prefill_s=max(0.0, first - scheduled) if first is not None and scheduled is not None else 0.0,
        decode_s=max(0.0, last - first) if first is not None and last is not None else 0.0,
        ttft_s=max(0.0, first - arrived) if first is not None else None,
        itl_mean_s=spread / gaps if gaps else None,
        itl_max_s=max(slowest, default=None),
        total_s=max(0.0, finish - arrived) if finish is not None else 0.0,
    )
