"""The sensor's readings against the definition, on a tiny random model."""

import numpy as np
import pytest

from galley.evals.sensor import NAMES, Sensor
from galley.model.model import Model
from galley.model.quant.blocks import dequantize
from galley.runtime.backend.reference import ReferenceBackend
from galley.runtime.plan import Rows
from tests.tiny import tiny_gguf


def test_readings_follow_their_definitions(tmp_path):
    model = Model.open(tiny_gguf(tmp_path / "tiny.gguf", "llama", seed=3), "tiny")
    backend = ReferenceBackend(model.gguf, model.spec, num_blocks=64)
    prompts = ["the cat sat on the mat", "one two three", "a"]
    sensor = Sensor(model, backend)
    read = sensor.read(prompts)
    assert read.shape == (3, sensor.width) and np.isfinite(read).all()
    ids = model.tokenizer.encode(prompts[0], special=False)
    rows = Rows()
    rows.add(ids, 0, list(range(-(-len(ids) // backend.block_size))), len(ids))
    backend.run(rows)
    logits = backend.logits().astype(np.float64)
    logp = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    logp -= logits.max(1, keepdims=True)
    nll = -logp[np.arange(len(ids) - 1), ids[1:]]
    named = dict(zip(NAMES, read[0], strict=False))
    assert named["nll_mean"] == pytest.approx(nll.mean(), rel=1e-4)
    assert named["entropy_first"] == pytest.approx(-(np.exp(logp[-1]) * logp[-1]).sum(), rel=1e-3)
    assert named["top_probability"] == pytest.approx(np.exp(logp[-1].max()), rel=1e-4)
    head = "output.weight" if "output.weight" in model.gguf.tensors else "token_embd.weight"
    info = model.gguf.tensors[head]
    matrix = dequantize(model.gguf.raw(head), info.type, info.shape)
    last = read[0][len(NAMES) + matrix.shape[1] :]
    assert np.allclose(matrix @ last, logits[-1], atol=1e-2), "the state is recovered from its logits"
    backend.close()
    model.close()
