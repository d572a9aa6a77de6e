"""The official tests of JSON Schema: what a grammar of an accepted schema writes is always valid by it.

``make schema-suite SUITE=FILE`` with the groups of draft 2020-12 as JSON lines (``{"file", "schema", …}``)
and, as REMOTES, the documents they refer to (``{uri: document}``). Plain or gzipped. Each schema is compiled
under ``strict``: it is refused with a typed error that names the place, or twenty seeded random writers of
its grammar write valid instances only. No model: a model could only write fewer texts than the writers.
"""

import collections
import gzip
import json
import os
import random
from array import array
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import referencing

from galley.errors import InvalidRequest
from galley.model.model import Model
from galley.runtime.guided import Compiled, Compiler
from galley.types import StructuredOutputs
from tests.tiny import tiny_gguf

pytest.importorskip("llguidance")

VOCAB = 420
SAMPLES = 20
LONGEST = 300
"""Tokens; a writer that has not come to an end by then is given up, and counted."""
SUITE = os.environ.get("JSON_SCHEMA_SUITE")
REMOTES = os.environ.get("JSON_SCHEMA_REMOTES")


def read(path: str) -> str:
    raw = Path(path).read_bytes()
    return (gzip.decompress(raw) if path.endswith(".gz") else raw).decode()


class Writer:
    """Writes what a grammar permits, at random, with a liking for what closes."""

    def __init__(self, model: Model) -> None:
        self._tokenizer = model.tokenizer
        texts = [model.tokenizer.decode([id]) for id in range(VOCAB)]
        self._closing = np.array([bool(text) and set(text) <= set('"]}0123456789,') for text in texts])
        self._closing[list(model.tokenizer.eos_ids)] = True

    def write(self, grammar: Compiled, seed: int) -> str | None:
        rng = random.Random(seed)
        guide = grammar.guide()
        ids = guide.begin(LONGEST)
        masks = array("I", [0]) * -(-VOCAB // 32)
        while not guide.ended:
            guide.fill(masks, 0)
            bits = np.unpackbits(np.frombuffer(masks, np.uint8), bitorder="little")[:VOCAB].astype(bool)
            closing = bits & self._closing
            pick = np.flatnonzero(closing if closing.any() and rng.random() < 0.5 else bits)
            assert len(pick), "nothing is allowed"
            token = int(pick[rng.randrange(len(pick))])
            if token in self._tokenizer.eos_ids:
                guide.accept(token, 0)
                break
            ids.append(token)
            ids += guide.accept(token, LONGEST)
            if len(ids) > LONGEST:
                return None
        return self._tokenizer.decode(ids)


@pytest.mark.slow
def test_what_an_accepted_schema_permits_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if SUITE is None:
        pytest.skip("JSON_SCHEMA_SUITE names no file; see `make schema-suite`")
    documents: dict[str, Any] = json.loads(read(REMOTES)) if REMOTES else {}
    draft = referencing.jsonschema.DRAFT202012
    registry: Any = referencing.Registry().with_resources(
        (uri, draft.create_resource(document)) for uri, document in documents.items()
    )
    model = Model.open(tiny_gguf(tmp_path / "m.gguf", vocab=VOCAB), "tiny")
    compiler, writer = Compiler(model.tokenizer, VOCAB), Writer(model)
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    for line in read(SUITE).splitlines():
        group = json.loads(line)
        where = f"{group['file']}: {group['description']}"
        counts["schemas"] += 1
        try:
            grammar = compiler.compile(StructuredOutputs(json=group["schema"]), param="schema")
        except InvalidRequest as error:
            assert (error.param or "").startswith("schema"), where
            counts["refused"] += 1
            continue
        counts["accepted"] += 1
        checker = jsonschema.Draft202012Validator(group["schema"], registry=registry)
        for seed in range(SAMPLES):
            text = writer.write(grammar, seed)
            if text is None:
                counts["unfinished"] += 1
                continue
            counts["instances"] += 1
            try:
                fault = next(iter(checker.iter_errors(json.loads(text))), None)
            except ValueError as error:
                fault = error
            if fault is not None:
                wrong.append(f"{where}: {text[:120]}: {str(fault).splitlines()[0][:120]}")
    model.close()
    with capsys.disabled():
        print("\n" + ", ".join(f"{count} {name}" for name, count in counts.items()), f"{len(wrong)} invalid")
    assert not wrong, "\n".join(wrong[:30])
    assert counts["accepted"] > 100 and counts["instances"] > 15 * counts["accepted"]
