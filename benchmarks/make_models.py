"""The models that are compared, made from the one everybody can pull.

* ``q4_1``: SmolLM2-135M-Instruct as shipped (layers Q4_1, tied embedding and head Q8_0).
* ``q4_0``: the same with its layers requantised to Q4_0 by llama.cpp's own ``llama-quantize``; the head stays
  Q8_0. A vehicle for speed (llama.cpp's fastest 4-bit path), not for quality: it was rounded twice.
* ``q8_0``: the same, to Q8_0.
* ``hf``: the same, dequantised to bfloat16 in a Hugging Face folder, from which peers convert.
* ``l1b``: random weights in the shape of Llama 3.2 1B, SmolLM2's tokenizer; Q4_0, Q8_0 and a folder.
  Its text means nothing; its arithmetic and its bytes are those of a 1B model.
"""

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import gguf

from benchmarks.gguf_file import GgufFile
from benchmarks.hf_folder import HfFolder, llama_config
from benchmarks.peers import BENCH, LlamaCpp, Model
from benchmarks.random_llama import RandomLlama
from galley.model.quant.blocks import GGMLType

__all__ = [
    "MODELS",
    "default_models",
    "find_model",
    "make_hf",
    "make_llama_1b",
    "model_label",
    "requantise",
    "shipped",
]

ALIAS = "smollm2-135m"


def requantise(source: Path, target: Path, quantize: Path, kind: str = "Q4_0") -> Path:
    """Make ``target``: ``source`` in ``kind`` with an 8-bit head. Raises CalledProcessError."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    heads = ["--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
    command = [str(quantize), "--allow-requantize", *heads, str(source), str(partial), kind, "2"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial.replace(target)
    return target


def make_hf(source: Path, target: Path) -> Path:
    """Dequantise a Llama GGUF with tied embeddings into a bfloat16 folder, unless it is there.

    Raises ValueError for another architecture, or a tokenizer other than SmolLM2's.
    """
    if target.exists():
        return target
    reader = gguf.GGUFReader(source)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    if field("general.architecture") != "llama" or "output.weight" in shapes:
        raise ValueError(f"{source}: not a llama with tied embeddings")
    config = llama_config(
        layers=field("llama.block_count"),
        hidden=field("llama.embedding_length"),
        ffn=field("llama.feed_forward_length"),
        heads=field("llama.attention.head_count"),
        kv_heads=field("llama.attention.head_count_kv"),
        vocab=field("llama.vocab_size"),
        context=field("llama.context_length"),
        rope_theta=field("llama.rope.freq_base"),
        norm_epsilon=field("llama.attention.layer_norm_rms_epsilon"),
    )
    with HfFolder(target, config, shapes, reader) as folder:
        for t in reader.tensors:
            folder.add(t.name, gguf.dequantize(t.data, t.tensor_type).reshape(shapes[t.name]))
    return target


def make_llama_1b(
    folder: Path, tokenizer: Path, *, hf: bool = True, model: RandomLlama | None = None
) -> None:
    """Write what is missing of ``l1b-q4_0.gguf``, ``l1b-q8_0.gguf`` and ``l1b-hf/`` (0.65, 1.14, 2.1 GB).

    ``tokenizer``: a GGUF file whose tokenizer they get. The weights are made once, for all three.
    """
    model = model or RandomLlama()
    reader = gguf.GGUFReader(tokenizer)
    with ExitStack() as stack:
        sinks: list[GgufFile | HfFolder] = []
        for kind in (GGMLType.Q4_0, GGMLType.Q8_0):
            path = folder / f"l1b-{kind.name.lower()}.gguf"
            if not path.exists():
                sinks.append(stack.enter_context(GgufFile(path, model, kind, reader)))
        if hf and not (folder / "l1b-hf").exists():
            config = llama_config(
                layers=model.layers,
                hidden=model.hidden,
                ffn=model.ffn,
                heads=model.heads,
                kv_heads=model.kv_heads,
                vocab=model.vocab,
                context=model.context,
                rope_theta=model.rope_theta,
                norm_epsilon=model.norm_epsilon,
            )
            sinks.append(stack.enter_context(HfFolder(folder / "l1b-hf", config, model.shapes(), reader)))
        if not sinks:
            return
        for name, values in model.tensors():
            for sink in sinks:
                sink.add(name, values)


def shipped() -> Path:
    """The pulled SmolLM2. Raises ModelNotFound when ``galley pull smollm2-135m`` has not run."""
    from galley.config import load
    from galley.model.store import Store

    return Path(Store(load(env=os.environ).home).resolve(ALIAS).path)


def model_label(path: Path) -> str:
    """What a table calls the file: its stem, or its folder's name (the store calls every file ``model``)."""
    return path.parent.name if path.stem == "model" else path.stem


def default_models(source: Path | None = None) -> dict[str, Path]:
    """``{"smollm2-q4_1": path, "smollm2-q4_0": path}``; ``source`` instead of the pulled file when given."""
    q4_1 = source or shipped()
    q4_0 = requantise(q4_1, BENCH / "models" / "smollm2-135m-q4_0.gguf", LlamaCpp().quantize)
    return {"smollm2-q4_1": q4_1, "smollm2-q4_0": q4_0}


MODELS = ("smollm2-q4_0", "smollm2-q4_1", "smollm2-q8_0", "l1b-q4_0", "l1b-q8_0")
"""Labels of what ``benchmarks.compare`` knows; SmolLM2 comes from the pulled file."""


def find_model(label: str, folder: Path = BENCH / "models") -> Model:
    """The model of that label, made where it is missing. ValueError for others; raises as the makers do."""
    if label not in MODELS:
        raise ValueError(f"{label} is not one of {', '.join(MODELS)}")
    family, kind = label.split("-")
    bits = 8 if kind == "q8_0" else 4
    if family == "l1b":
        make_llama_1b(folder, shipped())
        return Model(
            label=label, family=family, bits=bits, gguf=folder / f"{label}.gguf", folder=folder / "l1b-hf"
        )
    source = shipped()
    path = source
    if kind != "q4_1":
        path = folder / f"smollm2-135m-{kind}.gguf"
        if not path.exists():
            llamacpp = LlamaCpp()
            llamacpp.install()  # for its llama-quantize
            requantise(source, path, llamacpp.quantize, kind.upper())
    hf = make_hf(source, folder / "smollm2-135m-hf")
    return Model(label=label, family=family, bits=bits, gguf=path, folder=hf)


@click.group()
def main() -> None:
    """Make the models of the benchmarks."""


@main.command("requantise")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(["Q4_0", "Q8_0"]), default="Q4_0", show_default=True)
@click.option("--quantize", type=click.Path(exists=True, path_type=Path), help="llama-quantize to use.")
def requantise_command(source: Path, target: Path, kind: str, quantize: Path | None) -> None:
    """Requantise the layers of SOURCE into TARGET; the head becomes or stays Q8_0."""
    click.echo(requantise(source, target, quantize or LlamaCpp().quantize, kind))


@main.command("llama-1b")
@click.option("--folder", type=click.Path(path_type=Path), default=BENCH / "models", help="Where to.")
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), help="GGUF; the pulled SmolLM2.")
@click.option("--hf/--no-hf", default=True, show_default=True, help="Write the Hugging Face folder too.")
def llama_1b_command(folder: Path, tokenizer: Path | None, hf: bool) -> None:
    """Write l1b-q4_0.gguf, l1b-q8_0.gguf and l1b-hf/ into a folder."""
    make_llama_1b(folder, tokenizer or shipped(), hf=hf)


if __name__ == "__main__":
    main()
