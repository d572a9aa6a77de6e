"""The driver's side of the line protocol (``benchmarks/protocol.py``), for peers written in Python.

These scripts run in the peer's own environment: the standard library and the peer are all they may import.
"""

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from typing import Any, TextIO

Reply = dict[str, Any]


def ids_of(text: str) -> list[int]:
    """Token ids of a command. Raises ValueError when there are none."""
    ids = [int(word) for word in text.split()]
    if not ids:
        raise ValueError("token ids are missing")
    return ids


def prompts_of(rest: str) -> tuple[int, list[list[int]]]:
    """``COUNT SEQUENCES ID…``: the count, and as many prompts of equal length."""
    count, sequences, text = rest.split(" ", 2)
    ids, many = ids_of(text), int(sequences)
    if int(count) < 1 or many < 1 or len(ids) % many:
        raise ValueError("COUNT SEQUENCES ID...: prompts must have equal lengths")
    length = len(ids) // many
    return int(count), [ids[i * length : (i + 1) * length] for i in range(many)]


class Track:
    """Tokens of one sequence, and when each came."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []

    def add(self, ids: list[int], now: float) -> None:
        self.ids += ids
        self.times += [now] * len(ids)


def decode_reply(start: float, tracks: list[Track], tokens: int) -> Reply:
    """The reply to ``decode``: the rate is taken while all sequences run.

    From the step in which the last one gives its first token to the step in which the first one ends.
    Raises RuntimeError when a sequence has not exactly ``tokens`` tokens.
    """
    _exact(tracks, tokens)
    begin = max(t.times[0] for t in tracks)
    end = min(t.times[-1] for t in tracks)
    counted = sum(1 for t in tracks for at in t.times if begin < at <= end)
    if counted == 0:
        raise RuntimeError("the sequences never ran together: ask for more steps")
    last = max(t.times[-1] for t in tracks)
    return {
        "prefill_s": begin - start,
        "decode_s": end - begin,
        "tokens": counted,
        "total_s": last - start,
        "ids": tracks[0].ids,
    }


def together_reply(start: float, tracks: list[Track], tokens: int) -> Reply:
    """The reply to ``together``. Raises RuntimeError when a sequence has not exactly ``tokens`` tokens."""
    _exact(tracks, tokens)
    last = max(t.times[-1] for t in tracks)
    return {"total_s": last - start, "tokens": tokens * len(tracks), "ids": tracks[0].ids}


def _exact(tracks: list[Track], tokens: int) -> None:
    for track in tracks:
        if len(track.ids) != tokens:
            raise RuntimeError(f"{len(track.ids)} tokens came, {tokens} were asked for")


class Engine(ABC):
    """One engine. A subclass says how to load a model and how to run prompts; the verbs are the same."""

    @abstractmethod
    def hello(self) -> Reply:
        """Name, version and settings."""

    @abstractmethod
    def load(self, threads: int, path: str) -> None:
        """Load the model in ``path``."""

    @abstractmethod
    def context(self, tokens: int, sequences: int) -> int:
        """Make room for ``tokens`` tokens in all; returns the room. Raises ValueError if too small."""

    @abstractmethod
    def run(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[Track]]:
        """Run all prompts at once, ``tokens`` greedy tokens each. Returns the start time and the tracks."""

    def answer(self, line: str) -> Reply:
        """The reply to one command. Raises ValueError for one that is not understood."""
        verb, _, rest = line.partition(" ")
        if verb == "hello":
            return self.hello()
        if verb == "load":
            threads, path = rest.split(" ", 1)
            start = time.perf_counter()
            self.load(int(threads), path)
            return {"load_s": time.perf_counter() - start}
        if verb == "context":
            tokens, sequences, _unified = (int(n) for n in rest.split())
            return {"tokens": self.context(tokens, sequences)}
        if verb == "prefill":
            start, tracks = self.run([ids_of(rest)], 1)
            return {"prefill_s": tracks[0].times[0] - start, "ids": tracks[0].ids}
        if verb == "decode":
            steps, prompts = prompts_of(rest)
            return decode_reply(*self.run(prompts, steps + 1), steps + 1)
        if verb == "together":
            tokens, prompts = prompts_of(rest)
            return together_reply(*self.run(prompts, tokens), tokens)
        raise ValueError(f"unknown command {verb}")


class Replies:
    """The pipe to the harness. Taken before the peer is imported: whatever it prints goes to stderr."""

    def __init__(self) -> None:
        self._pipe: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def serve(self, engine: Engine) -> None:
        """Answer commands until ``quit`` or the end of the input."""
        for line in sys.stdin:
            command = line.rstrip("\n")
            if command == "quit":
                return
            try:
                reply = engine.answer(command)
            except Exception as error:  # reported to the harness, which raises it
                reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:600]}
            self._pipe.write(json.dumps(reply) + "\n")
            self._pipe.flush()
