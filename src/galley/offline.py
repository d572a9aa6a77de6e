"""Prompts under way in the caller's thread: what ``LLM`` drives."""

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import msgspec

from galley.audit.assemble import receipt_id
from galley.errors import GalleyError, InvalidRequest
from galley.model.model import Model
from galley.providers.base import Meter
from galley.providers.choice import ChoiceText
from galley.providers.vectors import finished
from galley.results import Embedding, Result, completion
from galley.runtime.engine import Engine
from galley.runtime.guided import Compiled
from galley.runtime.out import StepOut
from galley.runtime.reading import Pooled
from galley.types import Delta, Embed, Pooling, Receipt, Request, SamplingParams

__all__ = ["Asked", "Embedded", "Run", "Running", "either"]

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


class Running(Protocol):
    """One request on its way."""

    request: Request
    receipt_id: str
    meter: Meter
    error: GalleyError | None
    choices: dict[str, list[Delta]]
    """By job id."""
    pooling: str | None

    def submit(self, engine: Engine, lane: int) -> None:
        """Queue one choice."""
        ...


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
        self.pooling: str | None = None
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


class Embedded:
    """One text on its way to its vector."""

    def __init__(
        self, request: Request, asked: Asked, pooling: Pooling, note: str, *, witness: bool = False
    ) -> None:
        self.request = request
        self.receipt_id = receipt_id()
        self.asked = asked
        self.meter = Meter(capture=request.capture, witness=witness)
        self.error: GalleyError | None = None
        self.choices: dict[str, list[Delta]] = {}
        self.pooling: str | None = note
        self._kind: Pooling = pooling

    def submit(self, engine: Engine, lane: int) -> None:
        """Queue it."""
        job = f"{self.request.id}/{lane}"
        pieces = self.choices[job] = []

        def on_step(out: StepOut) -> None:
            if out.meter is not None:
                self.meter.jobs[lane] = out.meter
            if out.error is not None or out.vector is None:
                self.error = self.error or out.error
                return
            try:
                vector = finished(out.vector, self.request.embed or Embed())
            except GalleyError as error:
                self.error = self.error or error
                return
            pieces.append(Delta(index=lane, vector=vector, finish="stop", cached_tokens=out.cached_tokens))
            self.meter.note(pieces[-1])

        reading = Pooled(self._kind, len(self.asked.ids))
        engine.submit(job, self.asked.ids, self.request.params, on_step=on_step, lane=lane, reading=reading)

    def result(self, receipt: Receipt) -> Embedding:
        """The vector."""
        (pieces,) = self.choices.values()
        values = array("f", pieces[0].vector or b"")
        return Embedding(
            request_id=self.request.id,
            prompt=self.asked.text,
            prompt_token_ids=self.asked.ids,
            embedding=values.tolist(),
            pooling=self._kind,
            usage=receipt.usage,
            receipt=receipt,
        )
