"""`galley route identity`: does an endpoint serve the model it claims?"""

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from galley.cli.session import Session
from galley.cli.terminal import print_json

if TYPE_CHECKING:
    from galley.providers.remote import RemoteProvider

__all__ = ["identity"]

PROMPTS = (
    "Write one sentence about the sea.",
    "Name five animals.",
    "Continue: Once upon a time",
    "Explain what a mirror is.",
    "Give me a random number between 1 and 1000.",
    "Write a short poem about rain.",
    "What would you cook from rice and eggs?",
    "Describe a strange city.",
)
AT_ONCE = 4
DIFFERENT = 6
"""Exit code when a difference was found: that of an upstream which failed."""


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--provider", required=True, metavar="NAME", help="Whose serving of MODEL is tested.")
@click.option("--against", metavar="NAME", help="A provider of the catalog that is trusted.")
@click.option(
    "--reference", metavar="FILE", type=click.Path(path_type=Path), help="Answers recorded with --record."
)
@click.option(
    "--record", metavar="FILE", type=click.Path(path_type=Path), help="Keep the provider's answers here."
)
@click.option(
    "--prompts", metavar="FILE", type=click.Path(path_type=Path, exists=True), help="One prompt a line."
)
@click.option("--samples", default=10, show_default=True, type=click.IntRange(2, 200), help="A prompt.")
@click.option("--max-tokens", default=50, show_default=True, type=click.IntRange(min=1))
@click.option("--alpha", default=0.01, show_default=True, type=click.FloatRange(0.001, 0.5), help="Level.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_obj
def identity(
    session: Session,
    /,
    model: str,
    *,
    provider: str,
    against: str | None,
    reference: Path | None,
    record: Path | None,
    prompts: Path | None,
    samples: int,
    max_tokens: int,
    alpha: float,
    as_json: bool,
) -> None:
    """Test whether a provider's answers come from the same model as the reference's.

    Both answer some prompts several times at temperature 1; a permutation test on the answers says whether
    they differ. Where both are the same, it says otherwise in ALPHA of cases. Exit code 6: they differ.
    """
    from galley.errors import InvalidRequest

    if (against is None) == (reference is None) and record is None:
        raise click.UsageError("Give --against or --reference (or only --record, to keep answers).")
    asked: Sequence[str] = PROMPTS
    if prompts is not None:
        asked = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]

    def answers(name: str) -> dict[str, list[str]]:
        return asyncio.run(_sample(_provider(session, name), model, asked, samples, max_tokens))

    other = answers(provider)
    if record is not None:
        record.write_text(json.dumps({"model": model, "max_tokens": max_tokens, "answers": other}))
    if reference is None and against is None:
        click.echo(f"{record}: {samples} answers to each of {len(asked)} prompts")
        return
    from galley.evals.identity import same_model

    if reference is not None:
        try:
            kept = json.loads(reference.read_text(encoding="utf-8"))
            known, length = kept["answers"], kept["max_tokens"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(
                f"{reference}: no record of answers: {error!r}", param="reference"
            ) from error
        if length != max_tokens:
            raise InvalidRequest(
                f"{reference} was recorded with --max-tokens {length}, not {max_tokens}", param="reference"
            )
    else:
        assert against is not None
        known = answers(against)
    found = same_model(known, other, alpha=alpha)
    if as_json:
        print_json(
            {"model": model, "provider": provider, **{f: getattr(found, f) for f in found.__struct_fields__}}
        )
    else:
        word = "no difference found" if found.same else "DIFFERENT"
        click.echo(f"{model}@{provider}: {word} (p = {found.p_value:.4f}, level {alpha:g})")
        click.echo(f"{found.reference} and {found.other} answers to {found.prompts} prompts")
    if not found.same:
        raise click.exceptions.Exit(DIFFERENT)


def _provider(session: Session, name: str) -> "RemoteProvider":
    """A provider of the catalog. Raises ConfigError."""
    from galley.config import secret
    from galley.errors import ConfigError
    from galley.router.catalog import Catalog
    from galley.router.outside import open_providers

    path = session.config.router.catalog
    if path is None:
        raise ConfigError("There is no catalog.", param="router.catalog")
    for found in open_providers(Catalog.read(path), secret):
        if found.name == name:
            return found
    raise ConfigError(f"The catalog has no provider {name!r}.", param="provider")


async def _sample(
    provider: "RemoteProvider", model: str, prompts: Sequence[str], samples: int, max_tokens: int, /
) -> dict[str, list[str]]:
    """So many answers to each prompt. Raises what the provider raises."""
    from galley.errors import ConfigError
    from galley.providers.base import Meter
    from galley.types import Request, SamplingParams

    if all(card.id != model for card in provider.cards):
        raise ConfigError(f"{provider.name} does not offer {model!r}.", param="model")
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(prompt: str, number: int) -> str:
        request = Request(
            id=f"identity-{time.time_ns()}-{number}",
            api="cli.route.identity",
            model=model,
            params=SamplingParams(temperature=1.0, max_tokens=max_tokens),
            created=time.time(),
            messages=[{"role": "user", "content": prompt}],
        )
        async with gate:
            run = await provider.start(await provider.prepare(request), Meter())
            try:
                return "".join([delta.text async for delta in run.deltas()])
            finally:
                await run.stop()

    try:
        return {
            prompt: list(await asyncio.gather(*(one(prompt, number) for number in range(samples))))
            for prompt in prompts
        }
    finally:
        provider.close()
        await asyncio.sleep(0)  # the loop takes leave of the connections
