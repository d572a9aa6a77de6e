"""How far each engine's logits lie from an fp32 forward of the same weights, teacher-forced.

``python -m benchmarks.accuracy`` writes ``benchmarks/results/accuracy-*.json`` and the tables of
``docs/ACCURACY.md``. Text: WikiText-2 valid, cut into chunks that each start from an empty context; every
position but the last of a chunk predicts the token that really follows.
"""

import gzip
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.fp32_forward import Forward
from benchmarks.galley_side import available_isas, start_galley
from benchmarks.machine import facts
from benchmarks.make_models import default_models, model_label
from benchmarks.peers import LlamaCpp
from benchmarks.protocol import Driver
from benchmarks.report import ROOT, markdown_table, replace_between, save
from benchmarks.stats import Distance, DistanceSums

__all__ = ["Contestant", "Divergence", "distances", "divergences", "main"]

Ids = npt.NDArray[np.int32]

TEXTS = (Path(".bench/wikitext2-valid.txt.gz"), Path("../shared/data/wikitext2-valid.txt.gz"))
"""Where the text is looked for, from the checkout."""
GATES = {"kl_mean": 0.005, "top1": 0.975, "perplexity": 0.01, "int8_kv_adds": 0.002}
INT8_KV = ", int8 KV"
"""What Galley must keep: mean KL at most, top-1 agreement at least, perplexity within."""


class Contestant(msgspec.Struct, frozen=True):
    """One engine in one mode."""

    name: str
    driver: Driver
    step: int
    """Tokens a step: the chunk size is prefill, 1 is decode."""


class Divergence(msgspec.Struct, frozen=True):
    """Where two greedy continuations of one prompt part."""

    prompt: int
    at: int | None
    """Index of the first differing token; None when all tokens are equal."""
    gap: float | None
    """The reference's logit of its best token minus that of its second, there."""
    closer: str | None
    """Whose token is the reference's best; ``neither`` or None."""
    behind: dict[str, float] = {}
    """By engine: the reference's best logit minus that of the engine's token (0 when it chose the best)."""


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A file in memory (``/dev/shm``) where there is one: a chunk of logits is 100 MB."""
    shared = Path("/dev/shm")
    folder = shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(dir=folder, prefix="galley-bench-") as inner:
        yield Path(inner) / name


def read_tokens(text: Path, tokenizer: Driver) -> Ids:
    """All token ids of a (gzipped) text, by the given driver's tokenizer."""
    raw = gzip.decompress(text.read_bytes()) if text.suffix == ".gz" else text.read_bytes()
    with scratch("text") as source, scratch("ids") as target:
        source.write_bytes(raw)
        tokenizer.ask("tokenize", target, source)
        return np.fromfile(target, dtype=np.int32)


def distances(
    reference: Forward, contestants: list[Contestant], tokens: Ids, *, chunk: int, chunks: int
) -> dict[str, Distance]:
    """Distance of every contestant to ``reference`` over ``chunks`` chunks of ``chunk`` tokens."""
    sums = {c.name: DistanceSums() for c in contestants}
    with scratch("logits") as path:
        for number in range(chunks):
            ids = tokens[number * chunk : (number + 1) * chunk]
            start = time.monotonic()
            truth = reference.logits(ids)
            for c in contestants:
                reply = c.driver.ask("logits", path, c.step, *ids)
                if (reply["rows"], reply["vocab"]) != truth.shape:
                    raise ValueError(
                        f"{c.name} gave {reply['rows']} x {reply['vocab']} logits, not {truth.shape}"
                    )
                logits = np.fromfile(path, dtype=np.float32).reshape(truth.shape)
                sums[c.name].add(truth[:-1], logits[:-1], ids[1:])
            took = time.monotonic() - start
            click.echo(f"  chunk {number + 1}/{chunks}: {took:.1f} s", err=True)
    return {name: s.result() for name, s in sums.items()}


def pick_prompts(tokens: Ids, *, count: int, length: int) -> list[list[int]]:
    """``count`` pieces of the text, evenly spread."""
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
    return [tokens[s : s + length].tolist() for s in starts]


def divergences(
    reference: Forward, ours: Driver, theirs: Driver, prompts: list[list[int]], *, steps: int
) -> list[Divergence]:
    """Greedy continuations of both engines; at the first difference, what the reference thinks."""
    found = []
    for number, prompt in enumerate(prompts):
        a = ours.ask("decode", steps, 1, *prompt)["ids"]
        b = theirs.ask("decode", steps, 1, *prompt)["ids"]
        if len(a) != len(b):
            raise ValueError(f"{len(a)} and {len(b)} tokens came back")
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if at is None:
            found.append(Divergence(prompt=number, at=None, gap=None, closer=None))
            continue
        logits = reference.logits(np.asarray(prompt + a[:at], dtype=np.int32))[-1]
        second, best = np.sort(logits)[-2:]
        behind = {ours.name: float(best - logits[a[at]]), theirs.name: float(best - logits[b[at]])}
        closer = next((name for name, short in behind.items() if short == 0.0), "neither")
        found.append(Divergence(prompt=number, at=at, gap=float(best - second), closer=closer, behind=behind))
    return found


def distance_table(results: dict[str, dict[str, Distance]]) -> str:
    header = ["model, engine", "mean KL", "median", "p99.9", "max", "top-1 same", "perplexity / fp32's"]
    rows = []
    for model, engines in results.items():
        for name, d in engines.items():
            rows.append(
                [
                    f"{model}, {name}",
                    f"{d.kl_mean:.5f} ± {d.kl_mean_se:.5f}",
                    f"{d.kl_median:.5f}",
                    f"{d.kl_p999:.4f}",
                    f"{d.kl_max:.3f}",
                    f"{100 * d.top1:.2f} % ± {100 * d.top1_se:.2f}",
                    f"{d.perplexity_ratio:.5f} ± {d.perplexity_ratio_se:.5f}",
                ]
            )
    return markdown_table(header, rows)


def divergence_table(found: list[Divergence], ours: str, theirs: str) -> str:
    header = [
        "prompt",
        "first difference",
        "fp32 top-2 gap",
        "fp32 agrees with",
        f"{ours} behind",
        f"{theirs} behind",
    ]
    rows = []
    for d in found:
        if d.at is None or d.gap is None:
            rows.append([str(d.prompt), "none", "", "", "", ""])
            continue
        behind = [f"{d.behind[name]:.4f}" for name in (ours, theirs)]
        rows.append([str(d.prompt), str(d.at), f"{d.gap:.4f}", str(d.closer), *behind])
    return markdown_table(header, rows)


def failures(results: dict[str, dict[str, Distance]], galley: list[str]) -> list[str]:
    """Which gates Galley misses, in words.

    A mean KL counts as worse than the peer's beyond two standard errors of the difference. An int8 cache is
    held to what it adds to the mean KL of f16, where both were measured, not to the share of equal tokens.
    """
    missed = []
    for model, engines in results.items():
        for name in galley:
            d = engines[name]
            if d.kl_mean > GATES["kl_mean"]:
                missed.append(f"{model}, {name}: mean KL {d.kl_mean:.5f} > {GATES['kl_mean']}")
            plain = engines.get(name.removesuffix(INT8_KV))
            if plain is not None and d.kl_mean - plain.kl_mean > GATES["int8_kv_adds"]:
                missed.append(f"{model}, {name}: adds {d.kl_mean - plain.kl_mean:.5f} to the mean KL of f16")
            if not name.endswith(INT8_KV) and d.top1 < GATES["top1"]:
                missed.append(f"{model}, {name}: top-1 {d.top1:.4f} < {GATES['top1']}")
            if abs(d.perplexity_ratio - 1) > GATES["perplexity"]:
                missed.append(f"{model}, {name}: perplexity ratio {d.perplexity_ratio:.4f}")
            for peer, p in engines.items():
                if peer not in galley and d.kl_mean > p.kl_mean + 2 * float(
                    np.hypot(d.kl_mean_se, p.kl_mean_se)
                ):
                    missed.append(
                        f"{model}, {name}: mean KL {d.kl_mean:.5f} is worse than {peer}'s {p.kl_mean:.5f}"
                    )
    return missed


@click.command()
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="WikiText-2's validation text, plain or gzip; by default one of " + ", ".join(map(str, TEXTS)) + ".",
)
@click.option(
    "--model", "models", type=click.Path(exists=True, path_type=Path), multiple=True, help="GGUF; repeatable."
)
@click.option("--tokens", default=20480, show_default=True, help="Tokens to score, a multiple of --chunk.")
@click.option("--chunk", default=512, show_default=True, help="Context restarts after this many.")
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--isa", "isas", multiple=True, help="Galley instruction set; repeatable; all of this CPU by default."
)
@click.option(
    "--kv-type",
    "kv_types",
    type=click.Choice(["f16", "int8"]),
    multiple=True,
    default=["f16"],
    show_default=True,
    help="Galley's KV; repeatable.",
)
@click.option("--galley/--no-galley", "with_galley", default=True, help="Measure Galley at all.")
@click.option("--peer-decode/--no-peer-decode", default=False, help="llama.cpp token by token as well.")
@click.option("--prompts", default=20, show_default=True, help="Greedy comparisons.")
@click.option("--write/--no-write", default=True, help="Write the tables into docs/ACCURACY.md.")
def main(
    *,
    text: Path | None,
    models: tuple[Path, ...],
    tokens: int,
    chunk: int,
    threads: int,
    isas: tuple[str, ...],
    kv_types: tuple[str, ...],
    with_galley: bool,
    peer_decode: bool,
    prompts: int,
    write: bool,
) -> None:
    """Measure distance to the fp32 reference; exit status 1 when Galley misses a gate."""
    if chunk < 2 or tokens % chunk:
        raise click.UsageError("--tokens must be a multiple of --chunk, and --chunk at least 2")
    text = text or next((ROOT / place for place in TEXTS if (ROOT / place).exists()), None)
    if text is None:
        raise click.UsageError(
            "--text: WikiText-2's validation text is needed (valid.txt of the word language model in "
            "github.com/pytorch/examples; CC BY-SA, so it is not kept here)"
        )
    peer = LlamaCpp()
    peer.install()
    files = {model_label(p): p for p in models} or default_models()
    chosen: list[str] = (list(isas) or available_isas()) if with_galley else []
    results: dict[str, dict[str, Distance]] = {}
    greedy: dict[str, list[Divergence]] = {}
    ours: list[Driver] = []
    for label, file in files.items():
        click.echo(f"{label}: {file}", err=True)
        reference = Forward(file)
        with ExitStack() as stack:
            theirs = stack.enter_context(peer.start())
            theirs.ask("load", threads, file)
            theirs.ask("context", chunk, 1, 0)
            contestants = [Contestant(peer.name, theirs, chunk)]
            if peer_decode:
                contestants.append(Contestant(f"{peer.name}, token by token", theirs, 1))
            ours = []
            for isa, kv_type in itertools.product(chosen, kv_types):
                driver = stack.enter_context(start_galley(isa=isa, kv_type=kv_type))
                driver.ask("load", threads, file)
                ours.append(driver)
                contestants.append(Contestant(driver.name, driver, chunk))
            ids = read_tokens(text, theirs)
            if len(ids) < tokens:
                raise click.UsageError(f"the text has {len(ids)} tokens, {tokens} are wanted")
            results[label] = distances(reference, contestants, ids, chunk=chunk, chunks=tokens // chunk)
            if ours:
                picked = pick_prompts(ids, count=prompts, length=32)
                greedy[label] = divergences(reference, ours[0], theirs, picked, steps=63)
    galley = list(dict.fromkeys(driver.name for driver in ours))
    missed = failures(results, galley)
    setup = {
        "tokens": tokens,
        "chunk": chunk,
        "threads": threads,
        "data": text.name,
        "gates": GATES,
    }
    body: dict[str, Any] = {
        "machine": facts(),
        "setup": setup,
        "peers": [peer.describe()],
        "models": list(files),
    }
    path = save("accuracy", {**body, "distances": results, "greedy": greedy, "missed": missed})
    table = distance_table(results)
    click.echo(table)
    parts = [table, ""]
    for label, found in greedy.items():
        click.echo(divergence_table(found, galley[0], peer.name))
        parts += [f"Greedy continuations, {label}:", "", divergence_table(found, galley[0], peer.name), ""]
    if write:
        source = (
            f"From `benchmarks/results/{path.name}`: {facts()['cpu']}, {tokens} tokens in chunks of {chunk}."
        )
        place = "accuracy int8" if "int8" in kv_types else "accuracy"
        replace_between(ROOT / "docs" / "ACCURACY.md", place, "\n".join([source, "", *parts]))
    for line in missed:
        click.echo(f"MISSED {line}", err=True)
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
