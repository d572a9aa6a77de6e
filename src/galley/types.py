"""Frozen messages that cross a boundary: Request in, Delta and Receipt out.

Everything here is an immutable ``msgspec.Struct``: cheap to make, JSON-ready, and the same across a thread,
a process or a network. State that changes lives elsewhere (``runtime.job.Job``).
"""

from typing import Any, Literal

import msgspec

from galley.routed import Attempt, Judgement, Route
from galley.usage import Money, Resources, Times, Usage
from galley.wants import CacheBreakpoint, CacheHint, Embed, Pooling

__all__ = [
    "MODEL_CHOOSES",
    "Attempt",
    "CacheBreakpoint",
    "CacheHint",
    "Choice",
    "Delta",
    "Digests",
    "Embed",
    "FinishReason",
    "Judgement",
    "Money",
    "Pooling",
    "Receipt",
    "ReceiptStatus",
    "Request",
    "Resources",
    "Route",
    "SamplingParams",
    "StructuredOutputs",
    "Times",
    "TokenLogprob",
    "ToolCallDelta",
    "Usage",
]

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
"""How a choice may end well. Cancels and faults are not finish reasons: they are ``Receipt.status``."""


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """What the output must look like: exactly one of the first five is set. The names are vLLM's.

    Attributes:
        json: a JSON schema (draft 2020-12), as an object or as its text.
        json_object: any JSON object.
        regex: the whole output matches it (Rust syntax: no look-around, no back-references).
        choice: the output is one of these strings.
        grammar: a context-free grammar in the Lark dialect of llguidance; the output derives from ``start``.
        strict: with ``json``: a keyword that cannot be enforced is refused. Without it such keywords are left
            out, and named where the answer can say so.
        whitespace_pattern: with JSON: what may stand between its tokens, as a regex matched once at each
            place. None writes it on one line, with one space after a comma and a colon.
    """

    json: dict[str, Any] | bool | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    strict: bool = True
    whitespace_pattern: str | None = None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to draw tokens. The names are those vLLM's users know. Ranges: ``runtime.sampling.params``.

    Attributes:
        n: choices per prompt, sharing the prompt's KV.
        temperature: 0 (or < 1e-5) is greedy; ties go to the lowest id.
        top_k: 0 or -1 switches it off.
        seed: noise key; None lets Galley choose one and record it on the receipt.
        stop: strings that end the text; the one that completes earliest wins, ties by list order.
        stop_token_ids: ids that end the output, besides the model's own end tokens.
        max_tokens: None means the rest of the context.
        logprobs: None for none, else how many alternatives beside the sampled token (0..20).
        logit_bias: token id to additive bias.
        structured_outputs: a form the output must have. Needs the extra ``guided``.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


MODEL_CHOOSES = ("temperature", "top_p", "top_k", "min_p")
"""Sampling parameters for which a model file may bring defaults of its own."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for. Exactly one of ``messages`` and ``prompts`` is set."""

    id: str
    api: str
    """Which door: ``chat.completions``, ``completions``, ``cli.run``, ``python.generate`` …"""
    model: str
    params: SamplingParams
    left_open: list[str] = []
    """Names of MODEL_CHOOSES that the user did not set: the model file's defaults hold, where it has any."""
    created: float
    """Unix seconds at arrival."""
    messages: list[dict[str, Any]] | None = None
    prompts: list[str | list[int]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str = "auto"
    """``auto``, ``none``, ``required``, or ``function:NAME`` for one function by name."""
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    thinking_budget: int | None = None
    """Most reasoning tokens, then it is closed; 0 allows none. ``reasoning_effort``: ``none`` … ``max``."""
    structured_path: str = ""
    """Where the request had ``params.structured_outputs``, for errors."""
    template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    echo: bool = False
    embed: Embed | None = None
    stream: bool = False
    tenant: str = "local"
    """Who the service is charged to when the machine is shared fairly: docs/DESIGN.md, Tenants."""
    user: str | None = None
    key: str | None = None
    """Id of the API key (never the key itself)."""
    org: str | None = None
    team: str | None = None
    batch: bool = False
    """A line of a batch."""
    metadata: dict[str, str] = {}
    priority: int = 0
    """Lower runs first; 0 is normal."""
    service_tier: Literal["default", "flex", "priority"] = "default"
    """The tier really used: ``flex`` runs after the others; ``priority`` is latency-critical: its prompt is
    computed in the next step."""
    cache_salt: str | None = None
    cache_key: str | None = None
    """``prompt_cache_key``: requests of one key are expected to share a prefix."""
    cache_breakpoints: list[CacheBreakpoint] = []
    cache_ttl_s: int | None = None
    """Keep the whole prompt's prefix so long (``prompt_cache_retention``, ``prompt_cache_options``)."""
    cache_memory_only: bool = False
    """Nothing of this request's KV may be written to disk."""
    max_queue_s: float | None = None
    max_total_s: float | None = None
    allowed_models: list[str] = []
    """What the API key may use, whatever it is called by; empty means all."""
    local_only: bool = False
    """The request forbids leaving this machine. The catalog's policy may forbid it for all requests."""
    residency: list[str] = []
    """Regions in which it may be served; empty leaves that to policy."""
    max_pico: int | None = None
    """Most pico-dollars it may cost."""
    session: str | None = None
    """Key of the conversation it belongs to: later turns stay where the prefix is cached."""
    capture: bool = False
    ignored_params: list[str] = []
    clamped: dict[str, str] = {}
    """Every adjustment made to the input, by parameter, in words. Never silently."""


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log-probability of one sampled token under the raw model distribution (before temperature)."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most likely."""
    top: list[tuple[int, float]] = []
    """The ``logprobs`` most likely ids with their log-probabilities, best first."""
    spelt: list[tuple[str, bytes]] | None = None
    """Text and bytes of the token and then of each of ``top``, where it came from another server, whose ids
    are not known here (they are -1 then)."""


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of one tool call. The first piece of a call has ``id`` and ``name``; arguments add up to JSON.

    ``retracted`` says that the call broke off malformed: its raw text follows as plain text, and what was
    sent of it is no call.
    """

    index: int
    """Number of the call within its choice."""
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    retracted: bool = False


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of output of one choice. What it holds came in this order: reasoning, text, tool calls; where
    the output had another order there are several deltas."""

    index: int
    """prompt number * n + choice number."""
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish: FinishReason | None = None
    stop: str | int | None = None
    """Which stop string or stop token id ended it, when one of the request's own did."""
    cached_tokens: int | None = None
    """Set on a choice's first delta."""
    reasoning: str = ""
    """Text of the model's reasoning, without its markers."""
    reasoning_tokens: int = 0
    """How many of ``token_ids`` were drawn before the reasoning ended."""
    tool_calls: list[ToolCallDelta] = []
    warnings: list[str] = []
    """What went wrong in reading the output; nothing of it was dropped."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """Of the prompt's tokens but the first, on a choice's first delta, where they were asked for."""
    vector: bytes | None = None
    """The embedding: float32 in this machine's byte order."""


class Digests(msgspec.Struct, frozen=True, kw_only=True):
    """sha256 of what produced the answer; ``engine`` is the system fingerprint of code and ISA."""

    weights: str = ""
    tokenizer: str = ""
    template: str = ""
    engine: str = ""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """How one choice ended."""

    index: int
    completion_tokens: int
    finish: FinishReason | None
    reasoning_tokens: int = 0


ReceiptStatus = Literal["ok", "error", "cancelled", "disconnected"]


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly one per request, on every path. Ledger, audit, metrics and dashboards read these."""

    id: str
    request_id: str
    created: float
    api: str
    model: str
    status: ReceiptStatus
    tenant: str
    user: str | None
    key: str | None
    stream: bool
    usage: Usage
    times: Times
    resources: Resources
    route: Route | None
    digests: Digests
    choices: list[Choice]
    params: dict[str, Any]
    """Effective sampling parameters, defaults filled in, with the seed used."""
    ignored_params: list[str]
    clamped: dict[str, str]
    error: dict[str, Any] | None = None
    metadata: dict[str, str] = {}
    prompt: Any = None
    """Only when capture is on."""
    output: list[str] | None = None
    """Only when capture is on."""
    output_ids: list[list[int]] | None = None
    """Token ids of each choice, for ``galley replay``. Only when capture is on."""
    asked: dict[str, Any] = {}
    """What else of the request shaped the prompt (tools, template options). Only when capture is on."""
    price_lines: list[dict[str, Any]] = []
    money: Money | None = None
    attempts: list[Attempt] = []
    audit_leaf: str | None = None
    version: str = ""
    warnings: list[str] = []
    """What went wrong in reading the output, such as a malformed tool call, whose text was returned."""
    pooling: str | None = None
    """Of an embedding: how the states were pooled, and whether the model file says so."""
    judgement: Judgement | None = None
    """Of a cascade: whether the first model's answer was kept."""
    shadow_of: str | None = None
    """The receipt whose request this one mirrored: nobody waited for its answer."""
