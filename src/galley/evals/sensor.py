"""The local model as a sensor: what a prefill of the prompt tells, before a single token is generated.

Everything comes from one forward of the prompt that a cascade pays for anyway: how surprised the model is
by the prompt, how sure it is of the first token, how it ranks the letters of offered options, and its last
hidden states. The hidden states need no further output of the backend: logits are ``E h`` with a known
matrix ``E`` of full column rank, so ``h`` is the least-squares solution, exact up to rounding; and as that
is linear, the mean state is had from the mean of the logits.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from galley.model.model import Model
from galley.model.quant.blocks import dequantize
from galley.runtime.backend.base import Backend
from galley.runtime.plan import Rows

__all__ = ["NAMES", "Sensor"]

Floats = npt.NDArray[np.float32]
LETTERS = "ABCD"
STEP = 384
"""Tokens a step; also the most of one prompt that is read (its end: the question proper)."""
NAMES = (
    "nll_mean",
    "nll_std",
    "nll_max",
    "nll_last_quarter",
    "surprising",
    "entropy_mean",
    "entropy_first",
    "top_probability",
    "margin",
    "letters_mass",
    "letters_entropy",
    "letters_margin",
    "tokens_log",
    "characters_a_token",
)
"""The named readings; after them come the mean and the last hidden state."""
_OPTIONS = re.compile(r"(?m)^A[.)] .*\n(?:.*\n)*?B[.)] ")


class Sensor:
    """Reads prompts with one local model. Not thread-safe; the backend must not be in other use.

    Args:
        progress: called with the number of prompts read so far.
    """

    def __init__(
        self, model: Model, backend: Backend, *, progress: Callable[[int], None] = lambda done: None
    ) -> None:
        self._model = model
        self._backend = backend
        self._progress = progress
        head = "output.weight" if "output.weight" in model.gguf.tensors else "token_embd.weight"
        info = model.gguf.tensors[head]
        matrix = dequantize(model.gguf.raw(head), info.type, info.shape)
        gram = matrix.T.astype(np.float64) @ matrix.astype(np.float64)
        self._solve = (np.linalg.inv(gram) @ matrix.T.astype(np.float64)).astype(np.float32)
        """float32 [hidden, vocab]: logits to hidden state."""
        self._letters = [model.tokenizer.encode(f" {letter}", special=False)[-1] for letter in LETTERS]

    @property
    def width(self) -> int:
        """Numbers per prompt."""
        return len(NAMES) + 2 * int(self._solve.shape[0])

    def read(self, prompts: Sequence[str]) -> Floats:
        """float32 [len(prompts), width]. Prompts of more than STEP tokens are read from their last STEP."""
        tokens = [self._model.tokenizer.encode(prompt, special=False)[-STEP:] for prompt in prompts]
        out = np.zeros((len(prompts), self.width), np.float32)
        block = self._backend.block_size
        waiting = sorted((i for i in range(len(tokens)) if tokens[i]), key=lambda i: len(tokens[i]))
        done = 0
        while waiting:
            rows, batch, used = Rows(), [], 0
            while waiting and len(rows.tokens) + len(tokens[waiting[0]]) <= STEP:
                index = waiting.pop(0)
                need = -(-len(tokens[index]) // block)
                rows.add(tokens[index], 0, list(range(used, used + need)), len(tokens[index]))
                used += need
                batch.append(index)
            self._backend.run(rows)
            logits = self._backend.logits()
            at = 0
            for index in batch:
                count = len(tokens[index])
                out[index] = self._one(prompts[index], tokens[index], logits[at : at + count])
                at += count
            done += len(batch)
            self._progress(done)
        return out

    def _one(self, prompt: str, ids: list[int], logits: Floats) -> Floats:
        top = logits.max(axis=1)
        shifted = logits - top[:, None]
        weights = np.exp(shifted)
        total = weights.sum(axis=1)
        lse = np.log(total)
        entropy = lse - np.einsum("tv,tv->t", weights, shifted) / total
        nll = lse[:-1] - shifted[np.arange(len(ids) - 1), ids[1:]]
        if not len(nll):
            nll = np.zeros(1, np.float32)
        last = shifted[-1]
        second = np.partition(last, -2)[-2]
        letters = last[self._letters] - lse[-1]
        mass = float(np.exp(letters).sum())
        share = np.exp(letters - letters.max())
        share /= share.sum()
        best = np.sort(letters)
        offered = bool(_OPTIONS.search(prompt))
        named = (
            nll.mean(),
            nll.std(),
            nll.max(),
            nll[-max(1, len(nll) // 4) :].mean(),
            (nll > 6).mean(),
            entropy.mean(),
            entropy[-1],
            np.exp(-lse[-1]),
            -second,
            mass,
            float(-(share * np.log(share + 1e-9)).sum()) if offered else 0.0,
            float(best[-1] - best[-2]) if offered else 0.0,
            np.log(len(ids)),
            len(prompt) / len(ids),
        )
        states = self._solve @ np.stack([logits.mean(axis=0), logits[-1]], axis=1)
        return np.concatenate([np.array(named, np.float32), states[:, 0], states[:, 1]]).astype(np.float32)
