"""LLM: a model in this process, driven in the caller's thread. The shapes are those vLLM's users know."""

import contextlib
import secrets
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import msgspec

from galley.audit.assemble import assemble, receipt_id
from galley.audit.receipts import ReceiptStore
from galley.audit.scribe import Scribe
from galley.config import load
from galley.errors import GalleyError, InvalidRequest
from galley.model.model import Model
from galley.model.store import Store
from galley.providers.base import Meter
from galley.providers.choice import ChoiceText
from galley.providers.messages import check_text, read_messages, refuse_reserved
from galley.providers.opened import EngineOptions, Opened, disk_options
from galley.results import Completion, Logprob, Result, completion
from galley.runtime.engine import Engine
from galley.runtime.guided import Compiled
from galley.runtime.out import StepOut
from galley.runtime.sampling import params as sampling
from galley.types import (
    Delta,
    Receipt,
    ReceiptStatus,
    Request,
    Route,
    SamplingParams,
)

__all__ = ["LLM", "Completion", "Logprob", "Result"]


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
            own = contextlib.closing(ReceiptStore(config.receipts.path))
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

    def _run(
        self,
        api: str,
        places: list[str],
        asked: "list[Asked]",
        params: SamplingParams | Sequence[SamplingParams] | None,
        **options: Any,
    ) -> list[Result]:
        if self._closed:
            raise InvalidRequest("this LLM is closed", code="closed")
        if params is None:
            params = SamplingParams(**self.model.defaults)
        if not isinstance(params, SamplingParams | list | tuple):
            kind = type(params).__name__
            message = f"params is a SamplingParams, or a list of them; got {kind}"
            raise InvalidRequest(message, param="params", code="invalid_type")
        each = [params] * len(asked) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(asked):
            raise InvalidRequest(f"{len(each)} params for {len(asked)} prompts", param="params")
        runs: list[Run] = []
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
            try:
                self.engine.scheduler.admission.refuse(one.ids, seeded)
            except InvalidRequest as error:
                if error.param == "prompt":
                    error.param = place
                raise
            request = Request(
                id=f"req_{uuid.uuid4().hex}",
                api=api,
                model=self.model.name,
                params=seeded,
                created=time.time(),
                messages=one.messages,
                prompts=None if one.messages is not None else [one.given],
                capture=self._capture,
                clamped=one.changed,
                **options,
            )
            if compiled is not None and compiled.relaxed:
                request = msgspec.structs.replace(request, clamped=one.changed | compiled.relaxed)
            witness = self._scribe is not None
            runs.append(Run(request, one, self.model, self.engine.finish, compiled, witness=witness))
        return self._drive(runs)

    def _drive(self, runs: "list[Run]") -> list[Result]:
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
        return [run.result(receipt) for run, receipt in zip(runs, receipts, strict=True)]

    def _record(self, run: "Run", started: float, stopped: BaseException | None) -> Receipt:
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
        )
        if self._scribe is None:
            self._receipts.record(receipt)
            return receipt
        accounted = self._scribe.put(receipt, run.request, run.meter.pieces)
        if accounted is not None and stopped is None:
            accounted.result()
        return receipt


Params = SamplingParams | Sequence[SamplingParams] | None


def either(params: Params, sampling_params: Params) -> Params:
    """The one that was given. Raises InvalidRequest when both were."""
    if params is not None and sampling_params is not None:
        raise InvalidRequest("params and sampling_params are one thing: give one", param="sampling_params")
    return params if params is not None else sampling_params


class Asked(msgspec.Struct, frozen=True):
    """One prompt: its text if it came as text, as given, as ids, and the messages if it came as those."""

    text: str | None
    given: str | list[int]
    ids: list[int]
    messages: list[dict[str, Any]] | None
    changed: dict[str, str] = {}


class Run:
    """One prompt under way: its choices' text, tokens and meters."""

    def __init__(
        self,
        request: Request,
        asked: Asked,
        model: Model,
        finish: Callable[[str], None],
        compiled: Compiled | None,
        *,
        witness: bool = False,
    ) -> None:
        self.request = request
        self.receipt_id = receipt_id()
        self._compiled = compiled
        self.asked = asked
        self.meter = Meter(capture=request.capture, witness=witness)
        self.error: GalleyError | None = None
        self.choices: dict[str, list[Delta]] = {}
        self._texts = [ChoiceText(model, asked.ids, request.params, i) for i in range(request.params.n)]
        self._tokenizer = model.tokenizer
        self._finish = finish

    def submit(self, engine: Engine, lane: int) -> None:
        """Queue one choice."""
        job = f"{self.request.id}/{lane}"
        text = self._texts[lane]
        pieces = self.choices[job] = []

        def on_step(out: StepOut) -> None:
            if out.meter is not None:
                self.meter.jobs[lane] = out.meter
            if text.ended:
                return
            if out.error is not None:
                self.error = self.error or out.error
                return
            deltas = text.read(out)
            pieces.extend(deltas)
            for delta in deltas:
                self.meter.note(delta)
            if deltas[-1].finish is not None and out.finish is None:
                self._finish(job)  # a stop string completed in the text

        guide = None if self._compiled is None else self._compiled.guide()
        engine.submit(job, self.asked.ids, self.request.params, on_step=on_step, lane=lane, guide=guide)

    def result(self, receipt: Receipt) -> Result:
        """The finished prompt in vLLM's shape."""
        decode = partial(self._tokenizer.decode, skip_special=False)
        return Result(
            request_id=self.request.id,
            prompt=self.asked.text,
            prompt_token_ids=self.asked.ids,
            outputs=[
                completion(index, pieces, decode, wanted=self.request.params.logprobs is not None)
                for index, pieces in enumerate(self.choices.values())
            ],
            usage=receipt.usage,
            receipt=receipt,
        )
