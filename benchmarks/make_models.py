"""The models that are compared, made from the one everybody can pull.

* ``q4_1``: SmolLM2-135M-Instruct as shipped (layers Q4_1, tied embedding and head Q8_0).
* ``q4_0``: the same with its layers requantised to Q4_0 by llama.cpp's own ``llama-quantize``; the head stays
  Q8_0. A vehicle for speed (llama.cpp's fastest 4-bit path), not for quality: it was rounded twice.
"""

import os
import subprocess
from pathlib import Path

import click

from benchmarks.peers import BENCH, LlamaCpp

__all__ = ["default_models", "make_q4_0", "model_label", "shipped"]

ALIAS = "smollm2-135m"


def make_q4_0(source: Path, target: Path, quantize: Path) -> Path:
    """Requantise ``source`` into ``target`` unless it is there. Raises CalledProcessError."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    heads = ["--token-embedding-type", "q8_0", "--output-tensor-type", "q8_0"]
    command = [str(quantize), "--allow-requantize", *heads, str(source), str(partial), "Q4_0", "2"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial.replace(target)
    return target


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
    q4_0 = make_q4_0(q4_1, BENCH / "models" / "smollm2-135m-q4_0.gguf", LlamaCpp().quantize)
    return {"smollm2-q4_1": q4_1, "smollm2-q4_0": q4_0}


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--quantize", type=click.Path(exists=True, path_type=Path), help="llama-quantize to use.")
def main(source: Path, target: Path, quantize: Path | None) -> None:
    """Requantise the Q4_1 layers of SOURCE to Q4_0 in TARGET."""
    click.echo(make_q4_0(source, target, quantize or LlamaCpp().quantize))


if __name__ == "__main__":
    main()
