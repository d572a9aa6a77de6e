"""The local provider: a Model and an Engine in this process.

Text is made here, on the event loop, not in the engine thread: one TextStream per choice turns ids into text
and finds stop strings, so a slow client or a long stop list never costs the engine a microsecond.
"""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from galley import __version__
from galley.errors import BadModelFile, ContextLengthExceeded, InvalidRequest
from galley.model.model import Model
from galley.providers.adapters import Adapters
from galley.providers.base import Load, Meter, ModelCard, Prepared
from galley.providers.breakpoints import cache_hint
from galley.providers.localrun import LocalRun
from galley.providers.toolbox import Toolbox
from galley.providers.vectors import pooling_of
from galley.runtime.engine import Engine
from galley.runtime.guide import Grammar
from galley.runtime.guided import Compiler
from galley.runtime.sampling import params as sampling
from galley.types import CacheHint, Delta, Digests, Request, SamplingParams

__all__ = ["LocalProvider"]

OFF_LOOP = 32_768
"""Characters (or ids) above which a prompt is rendered and tokenised in a thread: about 10 ms of work."""


class LocalProvider:
    """Runs requests on one model in this process.

    Args:
        engine: started by the caller, who also closes it.
        context: tokens served, prompt and completion together; default (and most): the engine's.
        created: Unix seconds shown by ``/v1/models``.
        adapters: those of this model that requests may name.
    """

    def __init__(
        self,
        model: Model,
        engine: Engine,
        *,
        context: int | None = None,
        created: int = 0,
        adapters: Adapters | None = None,
    ) -> None:
        self.name = "local"
        self.model = model
        self.engine = engine
        try:
            sampling.check(SamplingParams(**model.defaults), model.tokenizer.vocab_size)
        except InvalidRequest as error:
            raise BadModelFile(str(model.path), "metadata[general.sampling]", error.message) from error
        self.context = min(context or engine.context, engine.context)
        backend = engine.backend
        code = f"galley {__version__} {backend.name} {backend.isa} {backend.fingerprint}"
        self.digests = Digests(
            weights=model.weights_digest,
            tokenizer=model.tokenizer.digest,
            template=model.template.digest if model.template else "",
            engine=hashlib.sha256(code.encode()).hexdigest(),
        )
        self.toolbox = Toolbox(model, Compiler(model.tokenizer, model.spec.vocab))
        every = "|".join(msgspec.structs.astuple(self.digests))
        self.fingerprint = "fp_" + hashlib.sha256(every.encode()).hexdigest()[:16]
        self.adapters = adapters or Adapters()
        self._card = ModelCard(
            id=model.name,
            context=self.context,
            created=created,
            quantization=main_type(model),
            chat=model.template is not None,
            embedding=model.embedding.pooling is not None,
            served_by=f"local:{model.name}@cpu",
        )

    @property
    def cards(self) -> Sequence[ModelCard]:
        """The model, then its adapters."""
        return [self._card, *self.adapters.cards(self._card)]

    async def prepare(self, request: Request) -> Prepared:
        """See ``Provider.prepare``. Adds the seed when the request has none, and each prompt's room."""
        params = request.params
        adapter = self.adapters.find(request.model)
        open_names = {
            name: self.model.defaults[name] for name in request.left_open if name in self.model.defaults
        }
        if open_names:
            params = msgspec.structs.replace(params, **open_names)
        if params.seed is None:
            # 53 bits: exact in every JSON reader, JavaScript's included.
            params = msgspec.structs.replace(params, seed=secrets.randbits(53))
        sampling.check(params, self.model.tokenizer.vocab_size)
        pooling = None if request.embed is None else pooling_of(self.model, request.embed)
        adjusted = self.toolbox.adjusted(request)
        kwargs = self.toolbox.reasoning(request).kwargs if request.messages is not None else {}
        if kwargs:
            request = msgspec.structs.replace(request, template_kwargs=request.template_kwargs | kwargs)
        if size_of(request) > OFF_LOOP:
            prompts = await asyncio.to_thread(self._tokenise, request)
        else:
            prompts = self._tokenise(request)
        place = "messages" if request.messages is not None else "prompt"
        if request.embed is not None:
            place = "input"
        room: list[int] = []
        for number, ids in enumerate(prompts):
            path = place if len(prompts) == 1 else f"{place}[{number}]"
            if not ids:
                raise InvalidRequest("The prompt is empty.", param=path, code="empty_prompt")
            left = self.context - len(ids)
            if left < min(1, 1 if params.max_tokens is None else params.max_tokens) or (
                params.max_tokens is not None and params.max_tokens > left
            ):
                raise ContextLengthExceeded(
                    prompt_tokens=len(ids), max_tokens=params.max_tokens, context=self.context, param=path
                )
            room.append(params.max_tokens if params.max_tokens is not None else left)
        echo: list[str] = []
        if request.echo:
            for given, ids in zip(request.prompts or (), prompts, strict=True):
                echo.append(given if isinstance(given, str) else self.decode(ids))
        compiled = await self._guide(request, prompts[0])
        adjusted |= compiled.relaxed if compiled is not None else {}
        noted = request.clamped | adjusted
        cache = [self._cache(request, ids, noted) for ids in prompts]
        if noted != request.clamped:
            request = msgspec.structs.replace(request, clamped=noted)
        return Prepared(
            request=request,
            params=params,
            prompts=prompts,
            max_tokens=room,
            cache=cache,
            echo=echo,
            compiled=compiled,
            banned=self.toolbox.banned(request),
            adapter=adapter,
            pooling=pooling,
            pooling_note="" if pooling is None else self.model.embedding.note(pooling),
        )

    async def _guide(self, request: Request, prompt: list[int]) -> Grammar | None:
        """The request's grammar, compiled off the event loop and off the engine's thread (GRM-1)."""
        wishes = (request.params.structured_outputs, request.reasoning_effort, request.thinking_budget)
        if not request.tools and all(wish is None for wish in wishes):
            return None
        return await asyncio.to_thread(self.toolbox.compile, request, prompt)

    async def start(self, prepared: Prepared, meter: Meter) -> LocalRun:
        """See ``Provider.start``. Job ids are ``<request id>/<choice>``."""
        run = LocalRun(self.engine, self.model, self.toolbox, prepared, meter, adapters=self.adapters)
        await run.begin()
        return run

    async def stream(self, prepared: Prepared, meter: Meter | None = None) -> AsyncIterator[Delta]:
        """``start`` and ``deltas`` in one; leaving the iterator cancels what still runs."""
        run = await self.start(prepared, meter or Meter())
        try:
            async for delta in run.deltas():
                yield delta
        finally:
            await run.stop()

    def load(self) -> Load:
        """See ``Provider.load``."""
        stats = self.engine.stats()
        total = stats.blocks_total
        free = stats.blocks_free + stats.blocks_cached
        disk = stats.disk
        return Load(
            disk_limit=disk.limit if disk else 0,
            disk_bytes=disk.bytes if disk else 0,
            disk_kept_bytes=disk.kept_bytes if disk else 0,
            disk_hits=stats.disk_hit_tokens,
            disk_saved=disk.saved if disk else 0,
            disk_evicted=disk.evicted if disk else 0,
            disk_damaged=disk.damaged if disk else 0,
            disk_refused=disk.refused if disk else 0,
            disk_failures=disk.failures if disk else 0,
            running=stats.running,
            waiting=stats.waiting,
            kv_usage=1 - free / total if total else 0.0,
            blocks_total=total,
            blocks_free=free,
            block_size=stats.block_size,
            prefix_queries=stats.cache_query_tokens,
            prefix_hits=stats.cache_hit_tokens,
            preemptions=stats.preemptions,
            steps=stats.steps,
            computed=stats.computed_tokens,
            recomputed=stats.recomputed_tokens,
            faults=stats.faults,
            violations=stats.violations,
            predicted_steps=stats.forecast.steps,
            step_seconds=stats.forecast.seconds,
            step_predicted_seconds=stats.forecast.predicted_s,
            step_error_seconds=stats.forecast.error_s,
        )

    def token(self, id: int) -> tuple[str, bytes]:
        """See ``Provider.token``."""
        tokenizer = self.model.tokenizer
        if tokenizer.is_special(id):
            return tokenizer.token_str(id), b""
        raw = tokenizer.token_bytes(id)
        return raw.decode("utf-8", "replace"), raw

    def encode(self, text: str, *, special: bool) -> list[int]:
        """See ``Provider.encode``. Control tokens spelt out in the text stay text."""
        return self.model.tokenizer.encode(text, special=False, add_bos=None if special else False)

    def decode(self, ids: list[int]) -> str:
        """See ``Provider.decode``. Raises InvalidRequest for an id outside the vocabulary."""
        self._check_ids(ids, "tokens")
        return self.model.tokenizer.decode(ids, skip_special=False)

    def render(self, request: Request) -> str:
        """See ``Provider.render``."""
        if self.model.template is None:
            raise InvalidRequest(
                f"The model {self.model.name!r} has no chat template.",
                param="messages",
                code="no_chat_template",
                hint="Use /v1/completions.",
            )
        return self.model.template.render(
            self.toolbox.messages(request),
            add_generation_prompt=request.add_generation_prompt,
            tools=request.tools,
            **request.template_kwargs,
        )

    def _cache(self, request: Request, ids: list[int], adjusted: dict[str, str]) -> CacheHint | None:
        """What a prompt asks of the prefix cache; ``adjusted`` is told when it cannot be kept so long."""

        def encode(messages: list[dict[str, Any]]) -> list[int]:
            part = msgspec.structs.replace(request, messages=messages, add_generation_prompt=False)
            return self._tokenise(part)[0]

        hint = cache_hint(request, ids, encode, adjusted)
        if hint is not None and hint.ends:
            disk, backend = self.engine.disk, self.engine.backend
            blocks = hint.ends[-1][0] // backend.block_size
            if disk is None:
                adjusted["cache_control"] = "no disk tier: kept in memory while there is room"
            elif not disk.room(blocks, backend.block_bytes):
                adjusted["cache_control"] = "the disk tier has no room to hold it: kept while there is room"
        return hint

    def _tokenise(self, request: Request) -> list[list[int]]:
        if request.messages is not None:
            if self.model.template is None:
                self.render(request)
            template: Any = self.model.template
            return [
                template.encode(
                    self.model.tokenizer,
                    self.toolbox.messages(request),
                    add_generation_prompt=request.add_generation_prompt,
                    tools=request.tools,
                    **request.template_kwargs,
                )
            ]
        prompts: list[list[int]] = []
        # What an embedding model wants at the end of a text; nothing for a prompt that is to go on.
        end = None if request.embed is None else self.model.embedding.end
        for number, given in enumerate(request.prompts or ()):
            if isinstance(given, str):
                ids = self.encode(given, special=True)
                prompts.append(ids if end is None or not ids else [*ids, end])
            else:
                place = "prompt" if request.embed is None else "input"
                self._check_ids(given, place if len(request.prompts or ()) == 1 else f"{place}[{number}]")
                prompts.append(list(given))
        return prompts

    def _check_ids(self, ids: list[int], path: str) -> None:
        top = self.model.tokenizer.vocab_size
        for place, id in enumerate(ids):
            if not 0 <= id < top:
                raise InvalidRequest(
                    f"Token id {id} is outside the vocabulary (0 to {top - 1}).",
                    param=f"{path}[{place}]",
                    code="invalid_token_id",
                )


def size_of(request: Request) -> int:
    """Roughly how many characters (or ids) are to be tokenised."""
    if request.messages is not None:
        return sum(len(str(message.get("content") or "")) for message in request.messages)
    return sum(len(prompt) for prompt in request.prompts or ())


def main_type(model: Model) -> str:
    """The tensor type that holds most of the weights' bytes, e.g. ``Q4_1``."""
    sizes: dict[str, int] = {}
    for tensor in model.gguf.tensors.values():
        sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.nbytes
    return max(sizes, key=lambda name: sizes[name], default="")
