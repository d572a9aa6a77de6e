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
together    TOKENS SEQUENCES ID…                   total_s, tokens, ids; prefixes may come from the cache
logits      PATH CHUNK ID…                         rows, vocab; float32 [rows, vocab] in PATH
tokenize    OUT IN                                 tokens; int32 ids of the UTF-8 file IN in OUT
quit                                               (ends)
==========  =====================================  ====================================================

``decode`` asks for ``STEPS + 1`` tokens of every sequence: the first belongs to the prefill. ``together``
submits all prompts at once and waits until each has TOKENS tokens; an engine that caches prefixes does so
from one ``together`` to the next. ``logits`` and ``tokenize`` serve the accuracy run: drivers may lack them.

A process that waits for a command must use no processor time, or it would slow the one being measured:
``Driver.rest`` waits for that and raises if it does not come.
"""

import json
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.process import Busier, ProcessTree

__all__ = ["Driver", "DriverError"]


class DriverError(RuntimeError):
    """A driver process failed, died, or would not lie still."""


class Driver:
    """One engine in a child process."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """Start the process. Raises OSError if it cannot start.

        Args:
            env: replaces the environment.
            log: file that gets its standard error, for engines that talk much; ours when None.
        """
        self.name = name
        self.command = list(command)
        self._log = log
        with ExitStack() as stack:
            stderr = stack.enter_context(log.open("wb")) if log is not None else None
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env
            )
        self.tree = ProcessTree(self._process.pid, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, verb: str, *arguments: object, patience_s: float = 900.0) -> dict[str, Any]:
        """Send one command and wait for its reply.

        Raises DriverError with the child's own words, or when it takes ``patience_s``: it is killed then.
        """
        line = " ".join([verb, *(str(a) for a in arguments)])
        if "\n" in line:
            raise ValueError("a command is one line")
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise DriverError(f"{self.name} is gone ({self._end()})") from None
        watchdog = threading.Timer(patience_s, self._process.kill)
        watchdog.start()
        try:
            reply = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        if not reply:
            raise DriverError(f"{self.name} died during {verb!r} ({self._end()})")
        answer: dict[str, Any] = json.loads(reply)
        if "error" in answer:
            raise DriverError(f"{self.name}: {verb}: {answer['error']}")
        return answer

    def _end(self) -> str:
        """How the process ended, and its last words where they were kept."""
        end = f"exit status {self._process.wait()}"
        if self._log is None:
            return end
        words = self._log.read_text(encoding="utf-8", errors="replace").split()
        return f"{end}: {' '.join(words)[-300:]}"

    def cpu_seconds(self) -> float:
        """Processor time used so far by the process and its children, their ended threads included."""
        return self.tree.cpu_seconds()

    def rest(self, *, patience_s: float = 3.0) -> float:
        """Wait until the process is idle; return the seconds that took.

        Raises DriverError after ``patience_s``: a worker then spins between commands.
        """
        try:
            return self.tree.rest(patience_s=patience_s)
        except Busier as error:
            raise DriverError(str(error)) from None

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
