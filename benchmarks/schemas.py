"""Does a structured output always validate? Every schema of a test suite, sampled with a tiny random model.

    python -m benchmarks.schemas SUITE.jsonl.gz [--remotes REMOTES.json.gz] [--samples 20] [--out RESULT.json]

The suite has one group a line, ``{file, optional, description, schema, tests}``, as made from the official
JSON-Schema-Test-Suite (draft 2020-12). A schema is ``refused`` (with a typed error, which is fine), or
accepted; then every sample that ended by itself is parsed and validated by the ``jsonschema`` package. One
that does not validate is ``wrong``. A random model shows what a grammar permits, not what a model would say:
if anything invalid can be written, it will be. Exit status 1 when anything is wrong.
"""

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import referencing
from tests.tiny import tiny_gguf

from galley.errors import GalleyError, InvalidRequest
from galley.model.model import Model
from galley.runtime.backend import open_backend
from galley.runtime.engine import Engine
from galley.runtime.guided import Compiler
from galley.runtime.out import StepOut
from galley.types import SamplingParams, StructuredOutputs

__all__ = ["Sampler", "read_suite"]

CLOSERS = '"]}0123456789,'
"""Tokens that a random model is nudged towards, so that its strings and arrays come to an end."""


class Sampler:
    """A tiny random model that writes what a schema lets it.

    Args:
        folder: where the model file is made.
        max_tokens: longest sample; longer ones are cut and say nothing.
    """

    def __init__(self, folder: Path, *, max_tokens: int = 160, backend: str = "auto") -> None:
        path = tiny_gguf(folder / "tiny.gguf", vocab=700, context=2048, seed=5)
        self.model = Model.open(path, "tiny")
        self.max_tokens = max_tokens
        opened = open_backend(backend, self.model.gguf, self.model.spec, threads=2, num_blocks=1024)
        self.backend = opened.backend
        tokenizer = self.model.tokenizer
        self.engine = Engine(self.backend, eos_ids=tokenizer.eos_ids, max_jobs=64, max_queue=4096)
        self.compiler = Compiler(tokenizer, self.model.spec.vocab)
        self.prompt = tokenizer.encode("Write JSON: ")
        self.bias = {tokenizer.encode(text)[0]: 3.0 for text in CLOSERS}
        self.bias |= dict.fromkeys(tokenizer.eos_ids, 3.0)

    def close(self) -> None:
        self.engine.close()
        self.backend.close()
        self.model.close()

    def compile(self, schema: Any, *, strict: bool = True) -> Any:
        """Raises InvalidRequest where the schema is refused."""
        return self.compiler.compile(StructuredOutputs(json=schema, strict=strict), param="schema")

    def sample(self, compiled: Any, seeds: Iterable[int]) -> Iterator[tuple[str, str | None]]:
        """For each seed what was written, and how it ended: ``stop``, ``length`` or an error's message."""
        outs: dict[str, list[StepOut]] = {}
        for seed in seeds:
            job = f"{seed}"
            outs[job] = []
            params = SamplingParams(
                temperature=1.5, seed=seed, max_tokens=self.max_tokens, logit_bias=self.bias
            )
            self.engine.submit(job, self.prompt, params, on_step=outs[job].append, guide=compiled.guide())
        while self.engine.turn():
            pass
        for steps in outs.values():
            ids = [token for step in steps for token in step.token_ids]
            last = steps[-1]
            text = self.model.tokenizer.decode(ids)
            yield text, last.finish if last.error is None else last.error.message


def read_suite(path: Path) -> list[dict[str, Any]]:
    """The groups of a suite, in order."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def registry(path: Path | None) -> referencing.Registry[Any]:
    """The documents that schemas refer to. Nothing is fetched."""
    documents: dict[str, Any] = {}
    if path is not None:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            documents = json.load(file)
    resources = [
        (uri, referencing.Resource.from_contents(body, referencing.jsonschema.DRAFT202012))
        for uri, body in documents.items()
    ]
    return referencing.Registry().with_resources(resources)


def run(
    groups: list[dict[str, Any]], samples: int, known: referencing.Registry[Any], backend: str
) -> dict[str, Any]:
    """Try every group; see the module."""
    counts: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    refused: Counter[str] = Counter()
    unwritten: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        sampler = Sampler(Path(folder), backend=backend)
        for number, group in enumerate(groups):
            schema = group["schema"]
            name = f"{group['file']}: {group['description']}"
            try:
                compiled = sampler.compile(schema)
            except InvalidRequest as error:
                counts["refused"] += 1
                refused[f"{group['file']}: {error.message.splitlines()[0][:90]}"] += 1
                continue
            except GalleyError:
                counts["untyped"] += 1
                continue
            counts["accepted"] += 1
            validator = jsonschema.Draft202012Validator(schema, registry=known)
            ended = 0
            for text, finish in sampler.sample(compiled, range(1000 * number, 1000 * number + samples)):
                counts["samples"] += 1
                if finish == "length":
                    counts["cut"] += 1
                    continue
                fault = None if finish == "stop" else f"ended with {finish}"
                if fault is None:
                    ended += 1
                    fault = invalid(validator, text)
                if fault is not None:
                    wrong.append({"schema": schema, "name": name, "text": text, "fault": fault[:300]})
            if not ended:
                unwritten.append(name)
        sampler.close()
    counts["wrong_samples"] = len(wrong)
    counts["wrong"] = len({entry["name"] for entry in wrong})
    counts["never_ended"] = len(unwritten)
    return {
        "counts": dict(counts),
        "wrong": wrong,
        "refused": dict(refused.most_common()),
        "never_ended": unwritten,
    }


def invalid(validator: jsonschema.Draft202012Validator, text: str) -> str | None:
    """Why a text is no valid instance, or None."""
    try:
        instance = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    try:
        fault = jsonschema.exceptions.best_match(validator.iter_errors(instance))
    except Exception as error:
        # The validator gave up (a reference it cannot follow): nothing is proven, so it does not pass.
        return f"cannot be validated: {type(error).__name__}: {error}"
    return None if fault is None else str(fault.message)


def main() -> int:
    parser = argparse.ArgumentParser(description="Sample every schema of a suite and validate the samples.")
    parser.add_argument("suite", type=Path)
    parser.add_argument("--remotes", type=Path)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--backend", default="auto", choices=("auto", "native", "reference"))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    began = time.monotonic()
    result = run(read_suite(asked.suite), asked.samples, registry(asked.remotes), asked.backend)
    result["seconds"] = round(time.monotonic() - began, 1)
    if asked.out is not None:
        asked.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for entry in result["wrong"][:40]:
        lines = (entry["name"], json.dumps(entry["schema"])[:300], repr(entry["text"]), entry["fault"])
        print("WRONG", *lines, sep="\n  ")
    print(json.dumps(result["counts"]), f"{result['seconds']} s")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
