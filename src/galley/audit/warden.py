"""The warden: holds back what needs an approval until it has one.

A tool call is held when the model has finished writing it: by then its job is over, its KV lies unused in the
prefix cache (from where the next turn takes it up again), and nothing is metered. A request that may cost
more than the rule allows is held before anything runs.
"""

import asyncio
import fnmatch
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from galley.audit.approvals import Approval, Approvals, Call, Refused
from galley.types import Delta, Request

__all__ = ["Warden"]

POLL_S = 0.1
"""How often the queue is looked at while something waits; decisions may come from another process."""


class Held(msgspec.Struct):
    """A call as the model writes it."""

    name: str
    arguments: str = ""
    retracted: bool = False


class Warden:
    """The rules, and the waiting.

    Args:
        tools: patterns of tool names (``fnmatch``) with their tier, ``write`` or ``destructive``; the first
            that fits counts, and what fits none is free.
        above_pico: a request whose quote is higher waits; None lets all through.
        ttl_s: how long a decision is waited for.
    """

    def __init__(
        self,
        queue: Approvals,
        *,
        tools: Sequence[tuple[str, str]] = (),
        above_pico: int | None = None,
        ttl_s: float = 3600.0,
    ) -> None:
        self.queue = queue
        self.tools = tuple(tools)
        self.above_pico = above_pico
        self.ttl_s = ttl_s

    @classmethod
    def opened(
        cls, path: Path, *, tools: Sequence[tuple[str, str]], above_usd: int | None, ttl_s: float
    ) -> "Warden":
        """The warden that the settings ask for; without rules it holds nothing."""
        return cls(Approvals(path), tools=tools, above_pico=above_usd, ttl_s=ttl_s)

    @property
    def holds_calls(self) -> bool:
        """Whether any tool needs an approval."""
        return bool(self.tools)

    def tier(self, tool: str) -> str | None:
        """The tier of a tool; None when it needs no approval."""
        return next((tier for pattern, tier in self.tools if fnmatch.fnmatchcase(tool, pattern)), None)

    async def let_in(self, request: Request, quote_pico: int | None, noted: list[dict[str, Any]]) -> None:
        """Before a request runs: wait, should it cost too much. Raises Refused."""
        if self.above_pico is None or quote_pico is None or quote_pico <= self.above_pico:
            return
        call = called(request, "request", request.model, f"up to {quote_pico} pico-dollars", "cost")
        await self.settle(call, "write", noted)

    async def watch(
        self,
        request: Request,
        deltas: AsyncIterator[Delta],
        stop: Callable[[], Awaitable[None]],
        noted: list[dict[str, Any]],
    ) -> AsyncIterator[Delta]:
        """The deltas, from the first call that needs an approval on only once all of them have one.

        Args:
            stop: ends the run, so that nothing of it is held or metered while it waits.
            noted: gets what the audit log is to say of each approval.

        Raises Refused.
        """
        held: list[Delta] = []
        calls: dict[tuple[int, int], Held] = {}
        async for delta in deltas:
            for piece in delta.tool_calls:
                call = calls.setdefault((delta.index, piece.index), Held(""))
                call.name = piece.name or call.name
                call.arguments += piece.arguments
                call.retracted |= piece.retracted
            if held or any(self.tier(call.name) is not None for call in calls.values()):
                held.append(delta)
            else:
                yield delta
        if not held:
            return
        await stop()
        for found in calls.values():
            tier = self.tier(found.name)
            if tier is not None and not found.retracted:
                rule = next(pattern for pattern, _ in self.tools if fnmatch.fnmatchcase(found.name, pattern))
                await self.settle(called(request, "tool", found.name, found.arguments, rule), tier, noted)
        for delta in held:
            yield delta

    async def settle(self, call: Call, tier: str, noted: list[dict[str, Any]]) -> None:
        """Ask, wait, and spend the approval. Raises Refused (denied, expired)."""
        began = time.monotonic()
        asked = await asyncio.to_thread(self.queue.propose, call, tier=tier, ttl_s=self.ttl_s)
        last: Approval = asked
        try:
            while last.state == "pending":
                await asyncio.sleep(POLL_S)
                last = await asyncio.to_thread(self.queue.get, asked.id)
            if last.state == "approved":
                last = await asyncio.to_thread(self.queue.use, asked.id, call)
        except asyncio.CancelledError:
            last = self.queue.cancel(asked.id)
            raise
        finally:
            waited = round((time.monotonic() - began) * 1000)
            noted.append({**last.leaf(), "waited_ms": waited})
        if last.state != "used":
            who = next((d for d in last.decisions if not d.approve), None)
            why = f" by {who.approver}{f': {who.reason}' if who.reason else ''}" if who else ""
            kind = "denied" if last.state == "denied" else "expired"
            what = f"{call.name}: the approval {asked.id} was {last.state}{why}."
            raise Refused(what, code=f"approval_{kind}")


def called(request: Request, kind: Any, name: str, arguments: str, rule: str) -> Call:
    """A call of a request."""
    return Call(
        kind=kind,
        name=name,
        arguments=arguments,
        tenant=request.tenant,
        user=request.user,
        key=request.key,
        session=request.session,
        rule=rule,
    )
