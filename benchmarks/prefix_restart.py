"""Time to the first token of a 2,000-token prompt: cold, and after a restart that finds it on disk.

``python -m benchmarks.prefix_restart [--model NAME] [--tokens 2000] [--pairs 5] [--drop-pages]``

Every sample is a process of its own with a fresh arena, through ``Engine``. A cold sample starts with an
empty folder and leaves its KV there on closing; the sample after it is the restart: same prompt and one more
sentence, as another user of the same system prompt would send. The clock runs from ``submit`` to the first
token. ``--drop-pages`` asks the system to forget the files' pages before the restart, as after a reboot.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from galley.config import load
from galley.model.model import Model
from galley.model.store import Store
from galley.runtime.backend import open_backend
from galley.runtime.engine import Engine
from galley.runtime.out import StepOut
from galley.runtime.tier import DiskOptions
from galley.types import SamplingParams

TEXT = (
    "You are the assistant of a harbour office. You answer questions on berths, tides, pilots, customs and "
    "the weather, briefly and with the rule that applies. Rule {n}: a vessel of more than {m} metres gives "
    "notice {h} hours before it arrives at berth {n}. "
)
QUESTION = "\nQuestion {n}: when must a ship of {m} metres give notice?"


def prompt(model: Model, tokens: int, question: int) -> list[int]:
    """``tokens`` ids of system prompt, the same each time, and a question that is not."""
    text = "".join(TEXT.format(n=n, m=40 + 7 * n, h=6 + n % 48) for n in range(tokens // 20))
    head = model.tokenizer.encode(text)[:tokens]
    if len(head) < tokens:
        raise SystemExit(f"the text has only {len(head)} tokens")
    return head + model.tokenizer.encode(QUESTION.format(n=question, m=50 + question))


def sample(name: str, folder: Path, tokens: int, question: int) -> dict[str, float]:
    """One process: open, ask once, close."""
    model = Model.open(Store(load().home).resolve(name).path, name)
    ids = prompt(model, tokens, question)
    blocks = 2 * (len(ids) // 16 + 2)
    backend, warning = open_backend("auto", model.gguf, model.spec, threads=None, num_blocks=blocks)
    if warning:
        raise SystemExit(warning)
    disk = DiskOptions(path=folder, limit=4 << 30)
    engine = Engine(backend, eos_ids=(), model_key=model.weights_digest, disk=disk)
    first: list[float] = []
    last: list[StepOut] = []

    def on_step(out: StepOut) -> None:
        if out.token_ids and not first:
            first.append(time.perf_counter())
        if out.last:
            last.append(out)

    engine.start()
    began = time.perf_counter()
    engine.submit("one", ids, SamplingParams(temperature=0, max_tokens=2), on_step=on_step)
    while not last:
        time.sleep(0.001)
    out = last[0]
    if out.error is not None or out.meter is None:
        raise SystemExit(str(out.error))
    closing = time.perf_counter()
    engine.close()
    backend.close()
    return {
        "ttft_s": first[0] - began,
        "prompt_tokens": len(ids),
        "cached_tokens": out.meter.cached_tokens,
        "close_s": time.perf_counter() - closing,
    }


def run(arguments: list[str]) -> dict[str, float]:
    """A sample in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.prefix_restart", "--sample", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def forget(folder: Path) -> None:
    """Ask the system to drop the files' pages; they must be on disk for that."""
    for file in folder.rglob("*.kv"):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def main() -> None:
    """Pairs of cold and restarted samples, and their medians, as text and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--drop-pages", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sample", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--question", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.sample:
        print(json.dumps(sample(given.model, given.folder, given.tokens, given.question)))
        return
    cold, warm = [], []
    for pair in range(given.pairs):
        with tempfile.TemporaryDirectory() as folder:
            common = ["--model", given.model, "--tokens", str(given.tokens), "--folder", folder]
            cold.append(run([*common, "--question", str(2 * pair)]))
            if given.drop_pages:
                forget(Path(folder))
            warm.append(run([*common, "--question", str(2 * pair + 1)]))
    ratio = statistics.median(w["ttft_s"] / c["ttft_s"] for w, c in zip(warm, cold, strict=True))
    result = {
        "model": given.model,
        "tokens": given.tokens,
        "drop_pages": given.drop_pages,
        "cold": cold,
        "restarted": warm,
        "median_cold_s": statistics.median(c["ttft_s"] for c in cold),
        "median_restarted_s": statistics.median(w["ttft_s"] for w in warm),
        "median_ratio": ratio,
    }
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{given.tokens} tokens: cold {result['median_cold_s']:.3f} s, after a restart "
        f"{result['median_restarted_s']:.3f} s, ratio {ratio:.1%} (medians of {given.pairs} pairs; "
        f"{warm[0]['cached_tokens']:.0f} of {warm[0]['prompt_tokens']:.0f} tokens cached)"
    )


if __name__ == "__main__":
    main()
