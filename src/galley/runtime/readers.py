"""The readers: who hears of which job, and the way there."""

import asyncio
import logging
from collections.abc import Callable

from galley.runtime.mailbox import Mailbox, Stream
from galley.runtime.out import StepOut

__all__ = ["Readers", "Sink"]

log = logging.getLogger(__name__)

Sink = Stream | Callable[[StepOut], None]
"""Where the news of one job goes: a stream, or a function called on the engine thread."""


class Readers:
    """By job id, from submission to the last news. Written under the inbox's lock; ``tell`` is the engine
    thread's."""

    def __init__(self) -> None:
        self.sinks: dict[str, Sink] = {}
        self.boxes: dict[Stream, Mailbox] = {}
        self.mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}

    def __contains__(self, job_id: str) -> bool:
        return job_id in self.sinks

    def __len__(self) -> int:
        return len(self.sinks)

    def open(self, stream: Stream, loop: asyncio.AbstractEventLoop) -> None:
        """A stream will read on this event loop."""
        box = self.mailboxes.get(loop)
        if box is None:
            for dead in [known for known in self.mailboxes if known.is_closed()]:
                del self.mailboxes[dead]
            box = self.mailboxes[loop] = Mailbox(loop)
        self.boxes[stream] = box

    def tell(self, outs: list[StepOut]) -> list[str]:
        """To each its news; one wake-up for each event loop. Returns the jobs that nobody hears any more."""
        posts: dict[Mailbox, list[tuple[Stream, StepOut]]] = {}
        deaf: list[str] = []
        for out in outs:
            sink = self.sinks.pop(out.job_id, None) if out.last else self.sinks.get(out.job_id)
            if isinstance(sink, Stream):
                box = self.boxes.pop(sink) if out.last else self.boxes[sink]
                posts.setdefault(box, []).append((sink, out))
            elif sink is not None:
                try:
                    sink(out)
                except Exception:
                    log.exception("on_step of job %s failed; the job is cancelled", out.job_id)
                    deaf.append(out.job_id)
        for box, post in posts.items():
            if not box.post(post):
                deaf.extend(stream.job_id for stream, _ in post)
        return deaf
