"""LLM: a model in this process, driven in the caller's thread. The shapes are those vLLM's users know."""

import contextlib
import secrets
import time
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from galley.audit.assemble import assemble
from galley.audit.pii import Redactor
from galley.audit.receipts import ReceiptStore
from galley.audit.scribe import Scribe
from galley.config import load
from galley.errors import InvalidRequest
from galley.model.store import Store
from galley.offline import Asked, Embedded, Run, Running, either
from galley.providers.messages import check_text, read_messages, refuse_reserved
from galley.providers.opened import EngineOptions, Opened, disk_options
from galley.providers.vectors import pooling_of
from galley.results import Completion, Embedding, Logprob, Result
from galley.runtime.sampling import params as sampling
from galley.types import (
    Embed,
    Pooling,
    Receipt,
    ReceiptStatus,
    Request,
    Route,
    SamplingParams,
)

__all__ = ["LLM", "Completion", "Embedding", "Logprob", "Result"]


class LLM:
    """Offline inference: no server, no thread, no event loop; prompts given together run together.

    The same prompts, parameters and seeds give the same tokens, however they are grouped (SMP-5, SMP-6).

    Args:
        model: a name in the store (``smollm2-135m``), or a path of a GGUF file.
        threads, backend, isa, kv_type, kv_memory (bytes), context, token_budget, max_jobs: as in the
            configuration, which also has the defaults; see ``galley config show``.
        kv_disk: bytes of KV kept on disk for the next process; default: none, unless the settings say so.
        receipts: where the receipts go; default: ``$GALLEY_HOME``'s store.
        home: the folder of models and receipts instead of ``$GALLEY_HOME``.

    Raises ModelNotFound, BadModelFile, ConfigError. Use it as a context manager, or ``close`` it.
    """

    def __init__(
        self,
        model: str,
        *,
        threads: int | None = None,
        backend: str | None = None,
        isa: str | None = None,
        kv_type: str | None = None,
        kv_memory: int | None = None,
        context: int | None = None,
        token_budget: int | None = None,
        max_jobs: int | None = None,
        kv_disk: int | None = None,
        receipts: ReceiptStore | None = None,
        home: Path | str | None = None,
    ) -> None:
        config = load(
            {
                "home": None if home is None else str(home),
                "engine.threads": threads,
                "engine.backend": backend,
                "engine.isa": isa,
                "engine.kv_type": kv_type,
                "engine.kv_memory": kv_memory,
                "engine.context": context,
                "engine.token_budget": token_budget,
                "engine.max_jobs": max_jobs,
                "kv.disk_bytes": kv_disk,
            }
        )
        wanted = config.engine
        with contextlib.ExitStack() as opened:
            entry = Store(config.home).resolve(model)
            options = {name: getattr(wanted, name) for name in EngineOptions.__struct_fields__}
            options["max_queue"] = 2**31  # offline the caller's list is the queue
            running = Opened(
                entry.path,
                entry.name,
                EngineOptions(**options),
                threaded=False,
                costs=config.home / "cost",
                # A library writes no prompts' KV to disk unless it was asked to, here or in the settings.
                disk=None if config.origin("kv.disk_bytes") == "default" else disk_options(config),
            )
            opened.callback(running.close)
            if running.warning:
                warnings.warn(running.warning, RuntimeWarning, stacklevel=2)
            self.model, self.memory = running.model, running.memory
            self.engine, self._provider = running.engine, running.provider
            self._compiler = running.provider.toolbox.compiler
            clean = Redactor.of(config.redact.stores, config.redact.kinds)
            own = contextlib.closing(ReceiptStore(config.receipts.path, clean=clean["receipts"].receipt))
            self._receipts = receipts or opened.enter_context(own)
            self._scribe = Scribe.opened(self._receipts, **msgspec.structs.asdict(config.audit))
            if self._scribe is not None:
                opened.callback(self._scribe.close)
            self._capture = config.receipts.capture
            self._closed = False
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free weights and KV, and write the last receipts out. Idempotent; nothing can be asked after it."""
        self._closed = True
        self._opened.close()

    def generate(
        self,
        prompts: str | list[int] | Sequence[str] | Sequence[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Result]:
        """Complete prompts given as text or as ids; one Result each, in order.

        ``params`` (or ``sampling_params``, as vLLM calls it) is one for all or one each; default: what the
        model file recommends. Nothing runs unless every prompt is good: InvalidRequest and
        ContextLengthExceeded come first, with ``param`` naming the prompt. An EngineFault is raised when all
        others are done, their receipts kept.
        """
        asked = self._asked(prompts)
        places = [f"prompts[{number}]" for number in range(len(asked))]
        return self._run("python.generate", places, asked, either(params, sampling_params))

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[Result]:
        """Answer one conversation, or a list of them, through the model's chat template.

        Assistant messages may carry ``tool_calls`` and be followed by ``tool`` messages with the results;
        where the template knows no tools they are put in words, and the receipt says so. As ``generate``;
        also raises TemplateError, and InvalidRequest when the model has no template.
        """
        template = self.model.template
        if template is None:
            raise InvalidRequest(
                f"the model {self.model.name!r} has no chat template",
                param="messages",
                code="no_chat_template",
                hint="use generate()",
            )
        refuse_reserved(template_kwargs or {}, "template_kwargs")
        one = isinstance(messages, list) and (not messages or isinstance(messages[0], dict))
        many: list[Any] = [messages] if one else list(messages)
        options = {**(template_kwargs or {}), "add_generation_prompt": add_generation_prompt}
        places = ["messages"] if one else [f"messages[{number}]" for number in range(len(many))]
        asked = []
        for place, given in zip(places, many, strict=True):
            read, changed = read_messages(given, place)
            spoken, told = self._provider.toolbox.spoken(read)
            ids = template.encode(self.model.tokenizer, spoken, **options)
            asked.append(Asked(None, ids, ids, read, changed | told))
        shown = {"add_generation_prompt": add_generation_prompt, "template_kwargs": template_kwargs or {}}
        return self._run("python.chat", places, asked, either(params, sampling_params), **shown)

    def embed(
        self,
        prompts: str | list[int] | Sequence[str] | Sequence[list[int]],
        *,
        pooling: Pooling | None = None,
        dimensions: int | None = None,
        normalise: bool = True,
    ) -> list[Embedding]:
        """The vectors of texts (or ids), in order: final hidden states, pooled, brought to unit length.

        Args:
            pooling: default: what the model file names, else ``mean``.
            dimensions: cut to so many values, where the model file says that it was trained for that.

        Raises InvalidRequest and ContextLengthExceeded before anything runs.
        """
        self._check_open()
        wanted = Embed(dimensions=dimensions, pooling=pooling, normalise=normalise)
        kind = pooling_of(self.model, wanted)
        params = SamplingParams(max_tokens=0, temperature=0.0, seed=0)
        end = self.model.embedding.end
        runs = []
        asked = self._asked(prompts)
        for number, given in enumerate(asked):
            closed = given.text and end is not None
            one = msgspec.structs.replace(given, ids=[*given.ids, end]) if closed else given
            self._refuse(one.ids, params, f"prompts[{number}]")
            request = self._request("python.embed", params, prompts=[one.given], embed=wanted)
            note, witness = self.model.embedding.note(kind), self._scribe is not None
            runs.append(Embedded(request, one, kind, note, witness=witness))
        receipts = self._drive(runs)
        return [run.result(receipt) for run, receipt in zip(runs, receipts, strict=True)]

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequest("this LLM is closed", code="closed")

    def _asked(self, prompts: str | list[int] | Sequence[str] | Sequence[list[int]]) -> list[Asked]:
        """Prompts as ids. Raises InvalidRequest naming one that is neither text nor ids."""
        given: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        if given and all(isinstance(token, int) for token in given):
            given = [given]  # one prompt as ids
        encode = self.model.tokenizer.encode
        asked = []
        for number, prompt in enumerate(given):
            if isinstance(prompt, str):
                check_text(prompt, f"prompts[{number}]")
                asked.append(Asked(prompt, prompt, encode(prompt), None))
            elif isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
                asked.append(Asked(None, list(prompt), list(prompt), None))
            else:
                raise InvalidRequest("a prompt is text or a list of token ids", param=f"prompts[{number}]")
        return asked

    def _refuse(self, ids: list[int], params: SamplingParams, place: str) -> None:
        """Raise for what could never run, naming the caller's argument."""
        try:
            self.engine.scheduler.admission.refuse(ids, params)
        except InvalidRequest as error:
            if error.param == "prompt":
                error.param = place
            raise

    def _request(self, api: str, params: SamplingParams, **more: Any) -> Request:
        return Request(
            id=f"req_{uuid.uuid4().hex}",
            api=api,
            model=self.model.name,
            params=params,
            created=time.time(),
            capture=self._capture,
            **more,
        )

    def _run(
        self,
        api: str,
        places: list[str],
        asked: list[Asked],
        params: SamplingParams | Sequence[SamplingParams] | None,
        **options: Any,
    ) -> list[Result]:
        self._check_open()
        if params is None:
            params = SamplingParams(**self.model.defaults)
        if not isinstance(params, SamplingParams | list | tuple):
            kind = type(params).__name__
            message = f"params is a SamplingParams, or a list of them; got {kind}"
            raise InvalidRequest(message, param="params", code="invalid_type")
        each = [params] * len(asked) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(asked):
            raise InvalidRequest(f"{len(each)} params for {len(asked)} prompts", param="params")
        runs = []
        for number, (place, one, chosen) in enumerate(zip(places, asked, each, strict=True)):
            if not isinstance(chosen, SamplingParams):
                message = f"expected SamplingParams, got {type(chosen).__name__}"
                raise InvalidRequest(message, param=f"params[{number}]", code="invalid_type")
            # 53 bits: exact in every JSON reader, JavaScript's included.
            seed = secrets.randbits(53) if chosen.seed is None else chosen.seed
            seeded = msgspec.structs.replace(chosen, seed=seed)
            sampling.check(seeded, self.model.tokenizer.vocab_size)
            wanted = seeded.structured_outputs
            compiled = None if wanted is None else self._compiler.compile(wanted)
            self._refuse(one.ids, seeded, place)
            request = self._request(
                api,
                seeded,
                messages=one.messages,
                prompts=None if one.messages is not None else [one.given],
                clamped=one.changed,
                **options,
            )
            if compiled is not None and compiled.relaxed:
                request = msgspec.structs.replace(request, clamped=one.changed | compiled.relaxed)
            witness = self._scribe is not None
            runs.append(Run(request, one, self.model, self.engine.finish, compiled, witness=witness))
        receipts = self._drive(runs)
        return [run.result(receipt) for run, receipt in zip(runs, receipts, strict=True)]

    def _drive(self, runs: Sequence[Running]) -> list[Receipt]:
        """Run all to the end in this thread. Every run leaves its receipt, whatever happens."""
        stopped: BaseException | None = None
        started = time.monotonic()
        if self._scribe is not None:
            for begun in [self._scribe.begin(run.request, run.receipt_id) for run in runs]:
                if begun is not None:
                    begun.result()
        try:
            for run in runs:
                for lane in range(run.request.params.n):
                    run.submit(self.engine, lane)
            while self.engine.turn():
                pass
        except BaseException as error:
            stopped = error
            for run in runs:
                for job in run.choices:
                    self.engine.cancel(job)
            while self.engine.turn():
                pass
            raise
        finally:
            receipts = [self._record(run, started, stopped) for run in runs]
        for run in runs:
            if run.error is not None:
                raise run.error
        return receipts

    def _record(self, run: Running, started: float, stopped: BaseException | None) -> Receipt:
        error = run.error if stopped is None else stopped
        status: ReceiptStatus = "ok" if error is None else "error"
        if error is not None and not isinstance(error, Exception):
            status = "cancelled"  # KeyboardInterrupt and its like
        receipt = assemble(
            receipt_id=run.receipt_id,
            request=run.request,
            route=Route(model=self.model.name, provider="local", rule="fixed", reason="in-process"),
            digests=self._provider.digests,
            meters=run.meter.jobs,
            status=status,
            error=error if isinstance(error, Exception) else None,
            choices=run.meter.choices(),
            params=run.request.params,
            seeds=[run.request.params.seed or 0],
            started=started,
            output=run.meter.output(),
            output_ids=run.meter.output_ids(),
            pooling=run.pooling,
        )
        if self._scribe is None:
            self._receipts.record(receipt)
            return receipt
        accounted = self._scribe.put(receipt, run.request, run.meter.pieces)
        if accounted is not None and stopped is None:
            accounted.result()
        return receipt
