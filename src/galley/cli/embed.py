"""`galley embed`: texts to vectors, no server."""

import asyncio
import sys
from array import array
from typing import TYPE_CHECKING, Any

import click

from galley.cli.session import ENGINE_FLAGS, Session, capture_option, settings_options
from galley.cli.terminal import print_json
from galley.types import Embed, SamplingParams

if TYPE_CHECKING:
    from galley.cli.house import House


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option("--pooling", type=click.Choice(["mean", "last", "cls"]), help="Instead of the model's own.")
@click.option("--dimensions", type=int, metavar="N", help="Cut to N values, where the model allows it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of one line a text.")
@settings_options(ENGINE_FLAGS)
@capture_option
@click.pass_obj
def embed(
    session: Session,
    /,
    *,
    model: str,
    texts: tuple[str, ...],
    pooling: Any,
    dimensions: int | None,
    as_json: bool,
) -> None:
    """Turn texts into vectors.

    Without TEXT every line of standard input is one. A line of the output is a vector of unit length; with
    several texts standard error shows how alike they are to the first.
    """
    given = list(texts)
    if not given:
        if sys.stdin.isatty():
            raise click.UsageError("Give a TEXT, or pipe lines in.")
        given = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not given:
        raise click.UsageError("There is no text.")
    session.store.resolve(model)  # Before the heavy imports: a missing model is told at once.
    from galley.cli.house import House

    with House(session.config, model) as house:
        asyncio.run(_embed(house, given, Embed(dimensions=dimensions, pooling=pooling), as_json=as_json))


async def _embed(house: "House", texts: list[str], wanted: Embed, *, as_json: bool) -> None:
    params = SamplingParams(max_tokens=0, temperature=0.0, seed=0)
    found: dict[int, array[float]] = {}
    async with house.open(params, api="cli.embed", prompts=texts, embed=wanted) as answer:
        async for delta in answer.deltas():
            found[delta.index] = array("f", delta.vector or b"")
    vectors = [found[index].tolist() for index in range(len(texts))]
    receipt = answer.receipt
    assert receipt is not None
    if as_json:
        print_json(
            {
                "model": receipt.model,
                "pooling": receipt.pooling,
                "embeddings": vectors,
                "usage": receipt.usage,
                "receipt": receipt.id,
            }
        )
        return
    for vector in vectors:
        click.echo(" ".join(f"{value:.8g}" for value in vector))
    for number, vector in enumerate(vectors[1:], 2):
        alike = sum(a * b for a, b in zip(vectors[0], vector, strict=True))
        click.echo(f"[1 and {number}: cosine {alike:.4f}]", err=True)
    click.echo(f"[{receipt.usage.prompt_tokens} tokens, pooling {receipt.pooling}]", err=True)
