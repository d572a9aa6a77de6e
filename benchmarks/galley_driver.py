"""Galley behind the harness's line protocol (``benchmarks.protocol``).

``prefill`` and ``decode`` go the whole engine path: ``Engine.submit``, scheduler, plan, native step,
sampling, ``StepOut``. That is the judged figure. ``backend-prefill`` and ``backend-decode`` call the backend
directly with ready-made plans; the difference of the two is what the runtime costs.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from galley import __version__
from galley.bench.offline import Track, decode_rate, run_prompts
from galley.model.families import spec_from_gguf
from galley.model.gguf import GGUF
from galley.model.spec import ModelSpec
from galley.model.tokenizer import Tokenizer
from galley.runtime.backend import open_backend
from galley.runtime.backend.base import Backend
from galley.runtime.engine import Engine
from galley.runtime.plan import Draws, Rows

NUM_BLOCKS = 1024
"""Of 16 tokens, until ``context`` asks for more: room for 32 sequences of 512."""
TOKEN_BUDGET = 512


class GalleyDriver:
    """One model, one backend; a fresh engine for each sample, so that no prefix is cached from the last.

    ``together`` keeps its engine, and with it the prefixes, until another verb needs the backend.
    """

    def __init__(self, kind: str, isa: str | None, kv_type: str) -> None:
        self._kind = kind
        self._isa = isa
        self._kv_type = kv_type
        self._gguf: GGUF | None = None
        self._spec: ModelSpec | None = None
        self._backend: Backend | None = None
        self._keeper: Engine | None = None
        self._threads = 0
        self._verbs: dict[str, Callable[[str], dict[str, Any]]] = {
            "hello": self._hello,
            "load": self._load,
            "context": self._context,
            "prefill": self._prefill,
            "decode": self._decode,
            "together": self._together,
            "backend-prefill": self._backend_prefill,
            "backend-decode": self._backend_decode,
            "logits": self._logits,
            "tokenize": self._tokenize,
        }

    def answer(self, line: str) -> dict[str, Any]:
        verb, _, rest = line.partition(" ")
        if verb not in self._verbs:
            raise ValueError(f"unknown command {verb}")
        if verb != "together" and self._keeper is not None:
            self._keeper.close()
            self._keeper = None
        return self._verbs[verb](rest)

    @property
    def backend(self) -> Backend:
        if self._backend is None:
            raise ValueError("no model loaded")
        return self._backend

    def _hello(self, rest: str) -> dict[str, Any]:
        name = {"name": "galley", "version": __version__, "kind": self._kind, "token_budget": TOKEN_BUDGET}
        if self._backend is None:
            return name
        return {**name, "isa": self._backend.isa, "fingerprint": self._backend.fingerprint}

    def _load(self, rest: str) -> dict[str, Any]:
        threads, path = rest.split(" ", 1)
        self.close()
        start = time.perf_counter()
        self._threads = int(threads)
        self._gguf = GGUF.open(Path(path))
        self._spec = spec_from_gguf(self._gguf)
        self._open(NUM_BLOCKS)
        assert self._backend is not None
        return {
            "load_s": time.perf_counter() - start,
            "weight_bytes": self._backend.weight_bytes,
            "vocab": self._spec.vocab,
            "isa": self._backend.isa,
            "fingerprint": self._backend.fingerprint,
        }

    def _open(self, num_blocks: int) -> None:
        if self._gguf is None or self._spec is None:
            raise ValueError("no model loaded")
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        opened = open_backend(
            self._kind,
            self._gguf,
            self._spec,
            threads=self._threads,
            num_blocks=num_blocks,
            isa=self._isa,
            kv_type=self._kv_type,
        )
        self._backend = opened.backend
        if opened.warning is not None:
            raise RuntimeError(f"not the backend that was asked for: {opened.warning}")

    def _context(self, rest: str) -> dict[str, Any]:
        tokens, sequences, _unified = (int(n) for n in rest.split())
        need = -(-tokens // self.backend.block_size) + sequences  # each sequence's last block is part empty
        if need > self.backend.num_blocks:
            self._open(need)
        return {"tokens": self.backend.num_blocks * self.backend.block_size}

    # The engine's path -----------------------------------------------------------------------------------

    def _serve(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[Track]]:
        """Run all prompts at once on a fresh engine. Returns the start time and the tracks."""
        engine = Engine(self.backend, eos_ids=(), token_budget=TOKEN_BUDGET)
        engine.start()
        try:
            return run_prompts(engine, prompts, tokens, patience_s=300)
        finally:
            engine.close()

    def _prefill(self, rest: str) -> dict[str, Any]:
        start, tracks = self._serve([_ids(rest)], 1)
        return {"prefill_s": tracks[0].times[0] - start, "ids": tracks[0].ids}

    def _together(self, rest: str) -> dict[str, Any]:
        tokens, prompts = _prompts(rest)
        if self._keeper is None:
            self._keeper = Engine(self.backend, eos_ids=(), token_budget=TOKEN_BUDGET)
            self._keeper.start()
        start, tracks = run_prompts(self._keeper, prompts, tokens, patience_s=300)
        total = max(t.times[-1] for t in tracks) - start
        return {"total_s": total, "tokens": tokens * len(tracks), "ids": tracks[0].ids}

    def _decode(self, rest: str) -> dict[str, Any]:
        """The decode rate is taken while all sequences run (``decode_rate``)."""
        steps, prompts = _prompts(rest)
        start, tracks = self._serve(prompts, steps + 1)
        together = decode_rate(tracks)
        if together is None:
            raise RuntimeError("the sequences never ran together: ask for more steps")
        tokens, seconds = together
        return {
            "prefill_s": max(t.times[0] for t in tracks) - start,
            "decode_s": seconds,
            "tokens": tokens,
            "total_s": max(t.times[-1] for t in tracks) - start,
            "ids": tracks[0].ids,
        }

    # The backend alone -----------------------------------------------------------------------------------

    def _step(self, pieces: list[tuple[list[int], int, list[int], int]]) -> list[int]:
        """One run of (tokens, context, blocks, outputs) and a greedy draw for each output."""
        rows, draws = Rows(), Draws()
        for tokens, context, blocks, outputs in pieces:
            rows.add(tokens, context, blocks, outputs)
            for k in range(outputs):
                position = context + len(tokens) - outputs + k + 1
                draws.add(seed=1, position=position, lane=0, temperature=0.0)
        self.backend.run(rows)
        return self.backend.sample(draws).ids if len(draws) else []

    def _tables(self, count: int, tokens: int) -> list[list[int]]:
        """Disjoint block tables for ``count`` sequences of up to ``tokens``."""
        need = -(-tokens // self.backend.block_size)
        if need * count > self.backend.num_blocks:
            raise ValueError(f"{need * count} KV blocks wanted, {self.backend.num_blocks} are there")
        return [list(range(i * need, (i + 1) * need)) for i in range(count)]

    def _blocks(self, table: list[int], tokens: int) -> list[int]:
        return table[: -(-tokens // self.backend.block_size)]

    def _feed(self, prompt: list[int], table: list[int]) -> int:
        drawn: list[int] = []
        for at in range(0, len(prompt), TOKEN_BUDGET):
            piece = prompt[at : at + TOKEN_BUDGET]
            end = at + len(piece)
            drawn = self._step([(piece, at, self._blocks(table, end), int(end == len(prompt)))])
        return drawn[0]

    def _backend_prefill(self, rest: str) -> dict[str, Any]:
        prompt = _ids(rest)
        table = self._tables(1, len(prompt))[0]
        start = time.perf_counter()
        token = self._feed(prompt, table)
        return {"prefill_s": time.perf_counter() - start, "ids": [token]}

    def _backend_decode(self, rest: str) -> dict[str, Any]:
        steps, prompts = _prompts(rest)
        length = len(prompts[0])
        tables = self._tables(len(prompts), length + steps)
        start = time.perf_counter()
        drawn = [self._feed(prompt, table) for prompt, table in zip(prompts, tables, strict=True)]
        first = [drawn[0]]
        prefill_s = time.perf_counter() - start
        start = time.perf_counter()
        for step in range(steps):
            at = length + step
            drawn = self._step(
                [([t], at, self._blocks(table, at + 1), 1) for t, table in zip(drawn, tables, strict=True)]
            )
            first.append(drawn[0])
        decode_s = time.perf_counter() - start
        return {"prefill_s": prefill_s, "decode_s": decode_s, "tokens": steps * len(prompts), "ids": first}

    # Accuracy --------------------------------------------------------------------------------------------

    def _logits(self, rest: str) -> dict[str, Any]:
        path, size, ids = rest.split(" ", 2)
        chunk, tokens = int(size), _ids(ids)
        if chunk < 1:
            raise ValueError("chunk must be positive")
        table = self._tables(1, len(tokens))[0]
        vocab = 0
        with Path(path).open("wb") as file:
            for at in range(0, len(tokens), chunk):
                piece = tokens[at : at + chunk]
                rows = Rows()
                rows.add(piece, at, self._blocks(table, at + len(piece)), len(piece))
                self.backend.run(rows)
                logits = self.backend.logits()
                vocab = logits.shape[1]
                logits.tofile(file)
        return {"rows": len(tokens), "vocab": vocab}

    def _tokenize(self, rest: str) -> dict[str, Any]:
        target, source = rest.split(" ")
        if self._gguf is None:
            raise ValueError("no model loaded")
        ids = Tokenizer.from_gguf(self._gguf).encode(Path(source).read_text(encoding="utf-8"), add_bos=False)
        np.asarray(ids, dtype=np.int32).tofile(target)
        return {"tokens": len(ids)}

    def close(self) -> None:
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        if self._gguf is not None:
            self._gguf.close()
            self._gguf = None


def _ids(text: str) -> list[int]:
    ids = [int(word) for word in text.split()]
    if not ids:
        raise ValueError("token ids are missing")
    return ids


def _prompts(rest: str) -> tuple[int, list[list[int]]]:
    steps, sequences, text = rest.split(" ", 2)
    ids, count = _ids(text), int(sequences)
    if int(steps) < 1 or count < 1 or len(ids) % count:
        raise ValueError("decode STEPS SEQUENCES ID...: prompts must have equal lengths")
    length = len(ids) // count
    return int(steps), [ids[i * length : (i + 1) * length] for i in range(count)]


@click.command()
@click.option(
    "--backend", "kind", type=click.Choice(["native", "reference"]), default="native", show_default=True
)
@click.option("--isa", help="Instruction set to force; the best one by default.")
@click.option("--kv-type", type=click.Choice(["f16", "int8"]), default="f16", show_default=True)
def main(kind: str, isa: str | None, kv_type: str) -> None:
    """Answer the harness on stdin and stdout."""
    driver = GalleyDriver(kind, isa, kv_type)
    for line in sys.stdin:
        command = line.rstrip("\n")
        if command == "quit":
            break
        try:
            reply = driver.answer(command)
        except Exception as error:  # reported to the harness, which raises it
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)
    driver.close()


if __name__ == "__main__":
    main()
