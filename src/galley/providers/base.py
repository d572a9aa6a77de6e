"""The Provider seam: where a request can run, and what it must leave behind for the receipt."""

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from galley.audit.assemble import Metered
from galley.runtime.guide import Grammar
from galley.types import CacheHint, Choice, Delta, Digests, FinishReason, Pooling, Request, SamplingParams

if TYPE_CHECKING:
    from galley.model.adapter import Adapter

__all__ = ["Load", "Meter", "ModelCard", "Prepared", "Provider", "Run"]


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may know of a served model before it asks."""

    id: str
    context: int
    """Tokens, prompt and completion together, as served."""
    created: int
    """Unix seconds."""
    quantization: str = ""
    chat: bool = True
    """Whether a chat template is there."""
    parent: str | None = None
    """The model that an adapter adapts."""
    embedding: bool = True
    """Whether it gives embeddings."""
    location: str = "local"
    served_by: str = ""
    """Value of ``x-galley-served-by``, e.g. ``local:smollm2-135m@cpu``."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How busy a provider is, for ``/metrics`` and ``/health``. Counters since start."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """Share of KV blocks held by jobs, 0..1."""
    blocks_total: int = 0
    blocks_free: int = 0
    """Free or merely cached: what a new job may take."""
    block_size: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    """Prompt tokens found there."""
    preemptions: int = 0
    steps: int = 0
    computed: int = 0
    """Positions run through the model."""
    recomputed: int = 0
    """Those of them that a preemption made necessary again."""
    faults: int = 0
    """Steps that failed."""
    violations: int = 0
    """Broken invariants found at idle or after a failed step; the cache was dropped each time."""
    disk_limit: int = 0
    """Bytes the disk tier may take; 0 without one. The rest of these are 0 then."""
    disk_bytes: int = 0
    disk_kept_bytes: int = 0
    """Of them pinned or held."""
    disk_hits: int = 0
    """Prompt tokens that came back from disk."""
    disk_saved: int = 0
    disk_evicted: int = 0
    disk_damaged: int = 0
    """Blocks that failed verification and were removed."""
    disk_refused: int = 0
    disk_failures: int = 0
    predicted_steps: int = 0
    """Steps run under a cost model; the three below are sums over them, in seconds."""
    step_seconds: float = 0.0
    step_predicted_seconds: float = 0.0
    step_error_seconds: float = 0.0
    """Of absolute differences."""


class Meter:
    """What a run leaves for its receipt, filled in while it runs. One per request.

    Attributes:
        jobs: the engine's meter of each choice that reached it.
        kept: completion tokens delivered, by choice (TXT-4: none after a stop string).
        finish: finish reason of each choice that ended well.
        text, ids: pieces of text and token ids by choice, only when ``capture``.
        pieces: every delta by choice, only when ``witness``: the audit log commits to them.
        estimated: the token counts are our own estimate, because the upstream gave none.
        reasoning: reasoning tokens delivered, by choice.
        warnings: what went wrong in reading the outputs.
    """

    def __init__(self, *, capture: bool = False, witness: bool = False) -> None:
        self.capture = capture
        self.witness = witness
        self.pieces: dict[int, list[Delta]] = {}
        self.estimated = False
        self.jobs: dict[int, Metered] = {}
        self.kept: dict[int, int] = {}
        self.finish: dict[int, FinishReason] = {}
        self.text: dict[int, list[str]] = {}
        self.ids: dict[int, list[int]] = {}
        self.reasoning: dict[int, int] = {}
        self.warnings: list[str] = []

    def note(self, delta: Delta) -> None:
        """Count one delta as produced."""
        self.kept[delta.index] = self.kept.get(delta.index, 0) + len(delta.token_ids)
        if delta.finish is not None:
            self.finish[delta.index] = delta.finish
        if delta.reasoning_tokens:
            self.reasoning[delta.index] = self.reasoning.get(delta.index, 0) + delta.reasoning_tokens
        self.warnings += [f"choice {delta.index}: {warning}" for warning in delta.warnings]
        if self.witness:
            self.pieces.setdefault(delta.index, []).append(delta)
        if self.capture:
            self.text.setdefault(delta.index, []).append(delta.text)
            self.ids.setdefault(delta.index, []).extend(delta.token_ids)

    def choices(self) -> list[Choice]:
        """How every choice known so far ended, in order."""
        known = sorted({*self.jobs, *self.kept})
        return [
            Choice(
                index=i,
                completion_tokens=self.kept.get(i, 0),
                finish=self.finish.get(i),
                reasoning_tokens=self.reasoning.get(i, 0),
            )
            for i in known
        ]

    def output(self) -> list[str]:
        """The text of each choice, in order."""
        return ["".join(self.text.get(choice.index, ())) for choice in self.choices()]

    def output_ids(self) -> list[list[int]]:
        """The token ids of each choice, in order."""
        return [self.ids.get(choice.index, []) for choice in self.choices()]


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A request that passed every check that can be made before running it."""

    request: Request
    params: SamplingParams
    """Effective: the seed is chosen."""
    prompts: list[list[int]]
    """Token ids of each prompt."""
    max_tokens: list[int]
    """Most completion tokens of each prompt's choices."""
    cache: list[CacheHint | None] = []
    """What each prompt asks of the prefix cache."""
    echo: list[str] = []
    """The text of each prompt when ``request.echo``."""
    compiled: Grammar | None = None
    """The grammar that every choice is kept to."""
    banned: tuple[int, ...] = ()
    """Ids never drawn."""
    adapter: "Adapter | None" = None
    """What is added to the model's weights."""
    pooling: Pooling | None = None
    """How an embedding is pooled."""
    pooling_note: str = ""
    """The same with where it is said, for header and receipt."""

    @property
    def count(self) -> int:
        """Number of choices: prompts times ``n``."""
        return len(self.prompts) * self.params.n


class Run(Protocol):
    """A running request."""

    def deltas(self) -> AsyncIterator[Delta]:
        """Pieces of output of all choices as they come; ends when every choice has finished.

        Raises the GalleyError that ended a choice. To be iterated once.
        """
        ...

    async def stop(self) -> None:
        """Cancel whatever still runs and wait until its meters are in (CAN-1). Idempotent."""
        ...


class Provider(Protocol):
    """Something that can run requests. All typed errors of a request's content come out of ``prepare``."""

    name: str

    @property
    def cards(self) -> Sequence[ModelCard]:
        """What is served."""
        ...

    @property
    def digests(self) -> Digests:
        """Of what produces the answers; empty while nothing has been opened yet."""
        ...

    @property
    def fingerprint(self) -> str:
        """``system_fingerprint`` on the wire: changes with kernels, weights, tokenizer and template."""
        ...

    async def prepare(self, request: Request) -> Prepared:
        """Render, tokenise, check parameters and context. Nothing has run yet.

        Raises InvalidRequest, ContextLengthExceeded, TemplateError.
        """
        ...

    async def start(self, prepared: Prepared, meter: Meter) -> Run:
        """Hand the choices to the engine. Raises Overloaded when it does not admit them."""
        ...

    def load(self) -> Load:
        """A cheap snapshot."""
        ...

    def token(self, id: int) -> tuple[str, bytes]:
        """A token as text and as raw bytes; a special one as its name, with no bytes."""
        ...

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Text to ids, with the model's own start token when ``special``."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Ids to text, special tokens shown."""
        ...

    def render(self, request: Request) -> str:
        """The prompt a chat request would become. Raises InvalidRequest, TemplateError."""
        ...
