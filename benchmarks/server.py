"""An OpenAI-compatible server under load: started, asked until it answers, measured, stopped."""

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.process import ProcessTree

__all__ = ["Server", "ServerError", "free_port"]


class ServerError(RuntimeError):
    """A server did not start, died, or answered with something else than a completion."""


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One server process in a session of its own."""

    def __init__(
        self, name: str, command: Sequence[str], *, port: int, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        """Start it. ``command`` holds the port already; its words go to ``log``."""
        self.name = name
        self.command = list(command)
        self.port = port
        self.model = ""
        self._log = log
        self._started = time.perf_counter()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                self.command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        self.tree = ProcessTree(self._process.pid, name)

    def wait(self, patience_s: float = 300.0) -> float:
        """Wait for the first completion; return the seconds since the start of the process.

        Raises ServerError when the process ends or patience does.
        """
        while True:
            try:
                if not self.model:
                    self.model = str(self._call("GET", "/v1/models")["data"][0]["id"])
                body = {"model": self.model, "prompt": [100, 200, 300], "max_tokens": 1, "temperature": 0}
                self._call("POST", "/v1/completions", body)
                return time.perf_counter() - self._started
            except (OSError, http.client.HTTPException, ServerError) as error:
                if self._process.poll() is not None:
                    raise ServerError(f"{self.name} ended: {self._words()}") from None
                if time.perf_counter() - self._started > patience_s:
                    raise ServerError(f"{self.name} is not ready after {patience_s:.0f} s: {error}") from None
                time.sleep(0.02)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise ServerError(f"{self.name}: {path}: {response.status} {text[:200]!r}")
        try:
            reply: dict[str, Any] = json.loads(text)
            if method == "GET":
                reply["data"][0]["id"]  # while it loads, a server may have none
        except (ValueError, KeyError, IndexError, TypeError):
            raise ServerError(f"{self.name}: {path}: {text[:200]!r}") from None
        return reply

    def _words(self) -> str:
        return " ".join(self._log.read_text(encoding="utf-8", errors="replace").split())[-300:]

    def rest(self) -> None:
        """Wait until it is idle. Raises Busier when it will not lie still, ServerError when it died."""
        if self._process.poll() is not None:
            raise ServerError(f"{self.name} ended: {self._words()}")
        self.tree.rest()

    def close(self) -> None:
        """End the whole session; kill it after ten seconds. Idempotent."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
