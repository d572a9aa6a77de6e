"""Running batches: validated, worked off behind all other traffic, written out. Survives being killed.

Each line is answered at least once and put out exactly once: the journal takes the first result of a line
and no second one. What was running when the process died has no result, so the next process runs it again.
"""

import asyncio
import contextlib
import fcntl
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from galley.endpoint.batches.filestore import Files
from galley.endpoint.batches.journal import Batch, File, Journal, Line
from galley.endpoint.generate import Generate, Outcome
from galley.endpoint.keys import KeyStore
from galley.errors import GalleyError
from galley.router.router import Router

__all__ = ["Runner"]

MAX_LINES = 50_000
MAX_ERRORS = 50
TRIES = 6
FETCH = 64
SWEEP_S = 60.0
TRANSIENT = frozenset(("cancelled", "shutting_down", "model_loading"))
"""Codes of a line that was stopped, not answered: it stays open."""


class Entry(msgspec.Struct, frozen=True):
    """One line of an input file."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class Runner:
    """The one task that works off all batches of this home.

    Args:
        doors: endpoint path to what answers it.
        concurrency: lines under way at once.
        lock: held while running, so that two servers of one home do not do the work twice.
    """

    def __init__(
        self,
        journal: Journal,
        files: Files,
        keys: KeyStore,
        router: Router,
        doors: Mapping[str, Generate],
        *,
        concurrency: int,
        lock: Path,
    ) -> None:
        self._journal = journal
        self._files = files
        self._keys = keys
        self._router = router
        self._doors = doors
        self._concurrency = concurrency
        self._lock_path = lock
        self._lock: IO[bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._sweep_at = 0.0
        self._lines: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._results: dict[str, list[tuple[int, bytes, bool]]] = {}

    def start(self) -> None:
        """Begin in the running event loop."""
        self._task = asyncio.ensure_future(self._run())

    def wake(self) -> None:
        """There is something new to do."""
        self._news.set()

    async def stop(self) -> None:
        """Stop at once. Lines under way stay open in the journal."""
        tasks = [task for task in (self._task, *self._lines.values()) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        with contextlib.suppress(GalleyError):
            await self._flush()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    async def _run(self) -> None:
        while True:
            self._news.clear()
            wait_s = 5.0
            try:
                if self._locked():
                    if time.monotonic() >= self._sweep_at:
                        self._sweep_at = time.monotonic() + SWEEP_S
                        await asyncio.to_thread(self._files.sweep)
                    wait_s = await self._round()
            except Exception as error:  # a full disk must not end the work for good
                sys.stderr.write(f"galley: batches: {type(error).__name__}: {error}\n")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), wait_s)

    def _locked(self) -> bool:
        """Whether this process does the work."""
        if self._lock is None:
            self._lock_path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._lock_path.open("ab")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                return False
            self._lock = lock
        return True

    async def _round(self) -> float:
        """Everything that can be done now; seconds until it is worth looking again without news."""
        await self._flush()
        soonest = 60.0
        for found, owner in await asyncio.to_thread(self._journal.active):
            batch, now = found, time.time()
            if batch.status == "validating":
                batch = await asyncio.to_thread(self._validate, batch, owner)
            if batch.status == "in_progress" and now >= batch.expires_at:
                await self._abandon(
                    batch, "batch_expired", "The batch expired before this line was answered."
                )
                batch = await self._enter(batch, "finalizing", "finalizing_at", expired_at=now)
            if batch.status == "cancelling":
                await self._abandon(batch, "batch_cancelled", "The batch was cancelled.")
                await self._finish(batch, owner)
                continue
            if batch.status == "in_progress":
                soonest = min(soonest, batch.expires_at - now)
                if await self._feed(batch):
                    continue
                batch = await self._enter(batch, "finalizing", "finalizing_at")
            if batch.status == "finalizing":
                await self._finish(batch, owner)
        return max(0.05, soonest)

    # ---- lines

    async def _feed(self, batch: Batch) -> bool:
        """Start lines while there is room; False when the batch has none left, open or under way."""
        if self._router.state != "ready":
            return True
        after, running = -1, any(key[0] == batch.id for key in self._lines)
        while len(self._lines) < self._concurrency:
            fetched = await asyncio.to_thread(self._journal.open_lines, batch.id, after, FETCH)
            if not fetched:
                return running or batch.id in self._results
            for line in fetched:
                after = line.number
                key = (batch.id, line.number)
                settled = {number for number, _, _ in self._results.get(batch.id, ())}
                if key in self._lines or line.number in settled:
                    continue
                if len(self._lines) >= self._concurrency:
                    break
                running = True
                self._lines[key] = asyncio.ensure_future(self._line(batch, line))
        return True

    async def _line(self, batch: Batch, line: Line) -> None:
        """One line to its result. Cancelled, it has none."""
        key = (batch.id, line.number)
        try:
            outcome, request_id = await self._ask(batch, line)
            if outcome is not None:
                response = {
                    "status_code": outcome.status,
                    "request_id": request_id,
                    "body": msgspec.Raw(outcome.body),
                }
                self._note(batch.id, line, response, None)
        finally:
            self._lines.pop(key, None)
            self._news.set()

    async def _ask(self, batch: Batch, line: Line) -> tuple[Outcome | None, str]:
        """The answer, after some patience with faults that may pass; None when it was stopped."""
        request_id = f"batch_req_{secrets.token_hex(12)}"
        principal = batch.principal
        if (
            principal.key is not None
            and self._keys.known(principal.key)
            and not self._keys.get(principal.key)
        ):
            gone = GalleyError("The key that made this batch is revoked or expired.", code="invalid_api_key")
            return Outcome(401, msgspec.json.encode(gone.body()), gone), request_id
        metadata = {"batch_id": batch.id, "custom_id": line.custom_id[:512]}
        door = self._doors[batch.endpoint]
        tries, wait_s = 0, 0.25
        while True:
            body: dict[str, Any] = msgspec.json.decode(line.body)
            outcome = await door.once(body, request_id=request_id, principal=principal, metadata=metadata)
            error = outcome.error
            if error is None:
                return outcome, request_id
            if error.code in TRANSIENT:
                return None, request_id
            tries += 1
            # A full queue is other people's traffic, which goes first: that is waited for without end.
            if not error.retryable or (tries >= TRIES and error.code != "overloaded"):
                return outcome, request_id
            await asyncio.sleep(wait_s)
            wait_s = min(10.0, wait_s * 2)

    def _note(self, batch: str, line: Line, response: Any, error: Any) -> None:
        """A result for the journal; written with the others of this moment."""
        failed = error is not None or response["status_code"] != 200
        shown = {
            "id": f"batch_req_{line.number}_{batch[-12:]}",
            "custom_id": line.custom_id,
            "response": response,
            "error": error,
        }
        self._results.setdefault(batch, []).append((line.number, msgspec.json.encode(shown), failed))

    async def _flush(self) -> None:
        """Results into the journal. What could not be written is tried again with the next ones."""
        taken, self._results = self._results, {}
        while taken:
            batch, results = next(iter(taken.items()))
            try:
                await asyncio.to_thread(self._journal.settle, batch, results)
            except BaseException:
                for each, left in taken.items():
                    self._results[each] = left + self._results.get(each, [])
                raise
            del taken[batch]

    async def _abandon(self, batch: Batch, code: str, message: str) -> None:
        """Stop what runs and give every open line an error."""
        tasks = [task for key, task in self._lines.items() if key[0] == batch.id]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._flush()
        while lines := await asyncio.to_thread(self._journal.open_lines, batch.id, -1, 1000):
            for line in lines:
                self._note(batch.id, line, None, {"code": code, "message": message})
            await self._flush()

    # ---- the two ends

    async def _enter(self, batch: Batch, status: Any, stamp: str, **more: Any) -> Batch:
        fields = {"status": status, stamp: time.time(), **more}
        return await asyncio.to_thread(self._journal.change, batch.id, when=("in_progress",), **fields)

    def _validate(self, batch: Batch, owner: str) -> Batch:
        """The input file as lines of the journal, or the batch failed with what is wrong with it."""
        try:
            path = self._files.path(self._journal.file(batch.input_file_id, owner).id)
            errors: list[dict[str, Any]] = []
            lines = list(read_lines(path, batch.endpoint, errors))
            if not lines and not errors:
                errors.append(problem("empty_file", "The input file has no lines.", None))
        except (GalleyError, OSError) as error:
            lines, errors = [], [problem("invalid_file", f"The input file cannot be read: {error}", None)]
        if errors:
            return self._journal.change(
                batch.id, when=("validating",), status="failed", failed_at=time.time(), errors=errors
            )
        return self._journal.accept(batch.id, lines)

    async def _finish(self, batch: Batch, owner: str) -> None:
        """Output files from the journal, then the last status. Doing it twice changes nothing."""

        def write() -> dict[str, Any]:
            written: dict[str, Any] = {}
            expires = None
            if batch.output_expires_s is not None:
                expires = int(time.time()) + batch.output_expires_s
            for name, failed in (("output_file_id", False), ("error_file_id", True)):
                results = self._journal.results(batch.id, failed=failed)
                first = next(results, None)
                if first is None:
                    continue
                # The same id every time, so that a repetition replaces the file.
                id = f"file-{batch.id.removeprefix('batch_')}-{'errors' if failed else 'output'}"
                file = File(
                    id=id,
                    purpose="batch_output",
                    filename=f"{batch.id}_{'error' if failed else 'output'}.jsonl",
                    bytes=0,
                    created_at=int(time.time()),
                    expires_at=expires,
                )
                self._files.write(file, owner, as_lines(first, results))
                written[name] = id
            return written

        files = await asyncio.to_thread(write)
        now = time.time()
        if batch.status == "cancelling":
            last: dict[str, Any] = {"status": "cancelled", "cancelled_at": now}
        elif batch.expired_at is not None:
            last = {"status": "expired"}
        else:
            last = {"status": "completed", "completed_at": now}
        await asyncio.to_thread(self._journal.change, batch.id, **files, **last)
        await asyncio.to_thread(self._journal.forget_bodies, batch.id)


def as_lines(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    """JSON objects as JSON lines."""
    yield first + b"\n"
    for each in rest:
        yield each + b"\n"


def problem(code: str, message: str, line: int | None) -> dict[str, Any]:
    """One entry of a batch's ``errors``; lines count from 1."""
    return {"code": code, "message": message, "param": None, "line": line}


def read_lines(path: Path, endpoint: str, errors: list[dict[str, Any]]) -> Iterator[Line]:
    """The requests of an input file. What is wrong goes to ``errors``, up to 50 of them."""
    seen: set[str] = set()
    number = 0
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return
        for place, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                entry = msgspec.json.decode(raw, type=Entry)
                body = msgspec.json.decode(entry.body)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                errors.append(problem("invalid_json_line", f"This line is no request: {error}", place))
            else:
                if entry.custom_id in seen:
                    message = f"The custom_id {entry.custom_id[:100]!r} is used twice."
                    errors.append(problem("duplicate_custom_id", message, place))
                elif not 1 <= len(entry.custom_id) <= 512:
                    errors.append(problem("invalid_custom_id", "custom_id: 1 to 512 characters.", place))
                elif entry.method != "POST" or entry.url != endpoint:
                    message = f"{entry.method[:20]} {entry.url[:100]} does not match POST {endpoint}."
                    errors.append(problem("mismatched_endpoint", message, place))
                elif not isinstance(body, dict):
                    errors.append(problem("invalid_json_line", "'body' must be an object.", place))
                elif number >= MAX_LINES:
                    errors.append(problem("too_many_lines", f"More than {MAX_LINES} lines.", place))
                    return
                else:
                    yield Line(number, entry.custom_id, bytes(entry.body))
                seen.add(entry.custom_id)
                number += 1
            if len(errors) >= MAX_ERRORS:
                return
