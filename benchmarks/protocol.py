"""The line protocol that lets several engines, each in its own process, take turns in one run.

One command a line on the child's stdin, one JSON object a line back; ``{"error": …}`` is a failure. Verbs:

==========  =====================================  ====================================================
verb        arguments                              reply
==========  =====================================  ====================================================
hello                                              name, version, isa, …
load        THREADS PATH                           load_s, weight_bytes, vocab
context     TOKENS SEQUENCES UNIFIED               tokens (room of the context)
prefill     ID…                                    prefill_s: until the first token is chosen
decode      STEPS SEQUENCES ID…                    prefill_s, decode_s, tokens, ids (of the first sequence)
logits      PATH CHUNK ID…                         rows, vocab; float32 [rows, vocab] in PATH
tokenize    OUT IN                                 tokens; int32 ids of the UTF-8 file IN in OUT
quit                                               (ends)
==========  =====================================  ====================================================

A process that waits for a command must use no processor time, or it would slow the one being measured:
``Driver.rest`` waits for that and raises if it does not come.
"""

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Driver", "DriverError"]


class DriverError(RuntimeError):
    """A driver process failed, died, or would not lie still."""


class Driver:
    """One engine in a child process."""

    def __init__(self, name: str, command: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        """Start the process. ``env`` replaces the environment. Raises OSError if it cannot start."""
        self.name = name
        self.command = list(command)
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, verb: str, *arguments: object) -> dict[str, Any]:
        """Send one command and wait for its reply. Raises DriverError with the child's own words."""
        line = " ".join([verb, *(str(a) for a in arguments)])
        if "\n" in line:
            raise ValueError("a command is one line")
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise DriverError(f"{self.name} is gone (exit status {self._process.wait()})") from None
        reply = self._process.stdout.readline()
        if not reply:
            raise DriverError(f"{self.name} died during {verb!r} (exit status {self._process.wait()})")
        answer: dict[str, Any] = json.loads(reply)
        if "error" in answer:
            raise DriverError(f"{self.name}: {verb}: {answer['error']}")
        return answer

    def cpu_seconds(self) -> float:
        """Processor time used so far by all threads, from the scheduler's own clock (nanoseconds)."""
        total = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
        return total * 1e-9

    def rest(self, *, window_s: float = 0.03, share: float = 0.02, patience_s: float = 3.0) -> float:
        """Wait until the process is idle; return the seconds that took.

        Idle: less than ``share`` of one core over ``window_s``. Raises DriverError after ``patience_s``: a
        worker then spins between commands and nothing measured beside it would mean anything.
        """
        start = time.monotonic()
        before = self.cpu_seconds()
        while True:
            time.sleep(window_s)
            after = self.cpu_seconds()
            if after - before < share * window_s:
                return time.monotonic() - start
            if time.monotonic() - start > patience_s:
                raise DriverError(f"{self.name} keeps a core busy while it should wait")
            before = after

    def close(self) -> None:
        """Ask the process to end; kill it after five seconds. Idempotent."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            with suppress(BrokenPipeError):
                self._process.stdin.write("quit\n")
                self._process.stdin.close()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                with suppress(BrokenPipeError):  # a dead child's pipe still holds our last words
                    stream.close()
