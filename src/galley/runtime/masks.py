"""Masks: the allowed tokens of every guided job, written while the forward runs (GRM-2)."""

import logging
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from galley.runtime.job import Job

__all__ = ["Masks"]

log = logging.getLogger(__name__)

ALL = array("I", [0xFFFFFFFF])


class Masks:
    """Fills the mask rows of one step on a thread of its own, which starts with the first guided job.

    Args:
        vocab: ids of the model; a row has ``ceil(vocab / 32)`` words.

    Attributes:
        rows: mask rows filled since start.
        seconds: time spent filling them.
        waited: part of it for which a finished forward had to wait.
    """

    def __init__(self, vocab: int) -> None:
        self.words = -(-vocab // 32)
        self.rows = 0
        self.seconds = 0.0
        self.waited = 0.0
        self._pool: ThreadPoolExecutor | None = None
        self._filling: Future[None] | None = None

    def room(self, rows: int) -> "array[int]":
        """An array for ``rows`` masks."""
        return array("I", [0]) * (rows * self.words)

    def start(self, jobs: Sequence[Job], masks: "array[int]") -> None:
        """Begin to fill row ``i`` of ``masks`` for ``jobs[i]``; nobody else may touch them until ``wait``."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="galley-masks")
        self._filling = self._pool.submit(self._fill, list(jobs), masks)

    def wait(self) -> None:
        """Until all rows are written."""
        filling, self._filling = self._filling, None
        if filling is None:
            return
        began = time.perf_counter()
        filling.result()
        self.waited += time.perf_counter() - began

    def close(self) -> None:
        """Stop the thread. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _fill(self, jobs: list[Job], masks: "array[int]") -> None:
        began = time.perf_counter()
        for row, job in enumerate(jobs):
            assert job.guide is not None
            try:
                job.guide.fill(masks, row)
            except Exception:
                # Its guide refuses the draw, which ends this job; the others of the step go on (CAN-3).
                log.warning("the guide of job %s failed", job.id, exc_info=True)
                masks[row * self.words : (row + 1) * self.words] = ALL * self.words
        self.rows += len(jobs)
        self.seconds += time.perf_counter() - began
