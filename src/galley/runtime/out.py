"""StepOut: what one step made of one job."""

from typing import TYPE_CHECKING

import msgspec

from galley.errors import GalleyError
from galley.runtime.meter import JobMeter
from galley.runtime.reading import Pooled, Scored
from galley.types import FinishReason, TokenLogprob

if TYPE_CHECKING:
    from galley.runtime.job import Job
    from galley.runtime.plan import Drawn

__all__ = ["StepOut"]


class StepOut(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of one job; the last one of a job has ``finish`` or ``error``, and the ``meter``.

    Attributes:
        token_ids: new output ids, in order; the finishing end token is among them.
        logprobs: one entry a token when the job asked for them, else None.
        stop_token: the id of ``params.stop_token_ids`` that ended the job.
        complete: the job ended because its grammar was complete: the last id is text, not an end token.
        error: set for a cancelled (code ``cancelled``), expired or failed job.
        cached_tokens: prompt tokens found in the cache; on the job's first StepOut with tokens.
        prompt: scores of the prompt's tokens but the first, when the job reads them; as ``cached_tokens``.
        vector: pooled states, float32 in the machine's byte order; on the last StepOut of a job that pools.
    """

    job_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None
    complete: bool = False
    error: GalleyError | None = None
    cached_tokens: int | None = None
    meter: JobMeter | None = None
    prompt: list[TokenLogprob] | None = None
    vector: bytes | None = None

    @classmethod
    def of(
        cls, job: "Job", new: list[int], finish: FinishReason | None, drawn: "Drawn", row: int, *, first: bool
    ) -> "StepOut":
        """What the draw of one row made of its job: ``new`` tokens, the drawn one and those it forced."""
        logprobs, last = None, new[-1]
        if job.params.logprobs is not None:
            logprobs = [TokenLogprob(last, drawn.logprobs[row], drawn.ranks[row], drawn.tops[row])]
        return cls(
            job_id=job.id,
            token_ids=new,
            logprobs=logprobs,
            finish=finish,
            stop_token=last if finish == "stop" and last in job.stop_ids else None,
            complete=finish == "stop" and last not in job.stop_ids and last not in job.eos,
            cached_tokens=job.meter.cached_tokens if first else None,
            meter=None if finish is None else job.meter,
            prompt=scores(job) if first else None,
        )

    @classmethod
    def read(cls, job: "Job") -> "StepOut":
        """The one StepOut of a job that draws nothing."""
        return cls(
            job_id=job.id,
            finish="length",
            cached_tokens=job.meter.cached_tokens,
            meter=job.meter,
            prompt=scores(job),
            vector=job.reading.vector() if isinstance(job.reading, Pooled) else None,
        )

    @property
    def last(self) -> bool:
        """Nothing of this job comes after this."""
        return self.meter is not None

    def then(self, later: "StepOut") -> "StepOut":
        """This one and the next of the same job as one (a slow reader gets them merged, CAN-4)."""
        logprobs = self.logprobs
        if later.logprobs is not None:
            logprobs = [*(logprobs or ()), *later.logprobs]
        return StepOut(
            job_id=self.job_id,
            token_ids=self.token_ids + later.token_ids,
            logprobs=logprobs,
            finish=later.finish,
            stop_token=later.stop_token,
            complete=later.complete,
            error=later.error,
            cached_tokens=self.cached_tokens if self.cached_tokens is not None else later.cached_tokens,
            meter=later.meter,
            prompt=self.prompt if self.prompt is not None else later.prompt,
            vector=later.vector,
        )


def scores(job: "Job") -> list[TokenLogprob] | None:
    """What a job has read of its prompt's log-probabilities."""
    return job.reading.scores if isinstance(job.reading, Scored) else None
