"""Where the choices of one request meet their one reader."""

import asyncio

from galley.types import Delta

__all__ = ["Outbox"]


class Outbox:
    """Deltas waiting for a reader, merged per choice, so a slow reader costs memory for text only (CAN-4).

    Belongs to one event loop; the producers never wait.
    """

    def __init__(self, choices: int) -> None:
        self.error: Exception | None = None
        self._open = choices
        self._waiting: dict[int, list[Delta]] = {}
        self._ready = asyncio.Event()

    def put(self, delta: Delta) -> None:
        """Add a delta, merged with one of the same choice that has not been taken."""
        earlier = self._waiting.setdefault(delta.index, [])
        if earlier and in_order(earlier[-1], delta):
            earlier[-1] = merge(earlier[-1], delta)
        else:
            earlier.append(delta)
        self._ready.set()

    def end(self) -> None:
        """One choice is complete."""
        self._open -= 1
        if self._open == 0:
            self._ready.set()

    def fail(self, error: Exception) -> None:
        """The run is over; the reader gets what was produced before, then the first error."""
        if self.error is None:
            self.error = error
        self._ready.set()

    async def take(self) -> list[Delta] | None:
        """Everything waiting, choices in order of arrival; None when all is done. Raises the failure."""
        while not self._waiting:
            if self.error is not None:
                raise self.error
            if self._open == 0:
                return None
            self._ready.clear()
            await self._ready.wait()
        batch = [delta for deltas in self._waiting.values() for delta in deltas]
        self._waiting.clear()
        return batch


def in_order(a: Delta, b: Delta) -> bool:
    """Whether one delta can hold both: reasoning comes before text, and text before calls."""
    if b.reasoning and (a.text or a.tool_calls):
        return False
    return not (b.text and a.tool_calls)


def merge(a: Delta, b: Delta) -> Delta:
    """Two successive deltas of one choice as one."""
    logprobs = a.logprobs
    if b.logprobs is not None:
        logprobs = [*(logprobs or ()), *b.logprobs]
    return Delta(
        index=a.index,
        text=a.text + b.text,
        token_ids=a.token_ids + b.token_ids,
        logprobs=logprobs,
        finish=b.finish,
        stop=b.stop,
        cached_tokens=a.cached_tokens if a.cached_tokens is not None else b.cached_tokens,
        reasoning=a.reasoning + b.reasoning,
        reasoning_tokens=a.reasoning_tokens + b.reasoning_tokens,
        tool_calls=[*a.tool_calls, *b.tool_calls],
        warnings=[*a.warnings, *b.warnings],
        prompt_logprobs=a.prompt_logprobs if a.prompt_logprobs is not None else b.prompt_logprobs,
        vector=b.vector,
    )
