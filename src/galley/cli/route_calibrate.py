"""`galley route calibrate`: how sure the small model must be, learned from answers whose worth is known."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from galley.cli.session import ENGINE_FLAGS, Session, settings_options
from galley.cli.terminal import print_json

if TYPE_CHECKING:
    from galley.cli.house import House
    from galley.evals.calibrate import Question

__all__ = ["calibrate"]

AT_ONCE = 8
"""Questions asked at the same time."""


@click.command()
@click.argument("data", metavar="DATA", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--output", "-o", required=True, metavar="FILE", type=click.Path(path_type=Path, dir_okay=False)
)
@click.option("--model", "name", metavar="MODEL", help="The small model; default: the one in the settings.")
@click.option(
    "--tokens",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="Judge after so many tokens of an answer; 0: after all of it.",
)
@click.option(
    "--max-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="Most tokens an answer."
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask only the first N questions.")
@settings_options(ENGINE_FLAGS)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_obj
def calibrate(
    session: Session,
    /,
    data: Path,
    *,
    output: Path,
    name: str | None,
    tokens: int,
    max_tokens: int,
    limit: int | None,
    as_json: bool,
) -> None:
    """Fit a cascade's judge on DATA, a jsonl of {question, answer} or of {signals, good}.

    Questions are put to the small model on this machine, greedily; an answer is good when its last number is
    the answer's, or when the answer occurs in it. Recorded signals are taken as they are.
    """
    import msgspec
    import numpy as np

    from galley.evals.calibrate import Answers, read_answers
    from galley.evals.calibrate import calibrate as fit

    questions, rows = read_answers(data)
    model = name or session.config.model
    weights = ""
    if questions:
        session.store.resolve(model)
        from galley.cli.house import House

        with House(session.config, model) as house:
            model, weights = house.model.name, house.provider.digests.weights
            rows += asyncio.run(_ask(house, questions[:limit], tokens, max_tokens))
    answers = Answers(
        np.array([row[0] for row in rows]), np.array([row[1] for row in rows]), [r[2] for r in rows]
    )
    source = f"{data.name}, at most {max_tokens} tokens, greedy" if questions else data.name
    found = fit(answers, model=model, weights=weights, tokens=tokens, source=source)
    output.write_bytes(msgspec.msgpack.encode(found))
    if as_json:
        shown = msgspec.to_builtins(found)
        print_json({"file": str(output), **{key: shown[key] for key in shown if key != "keys"}})
        return
    click.echo(f"{output}: {found.rows} answers of {model}, {found.good:.1%} good")
    click.echo(f"held out     AUROC {found.auroc:.3f}, ECE {found.ece:.3f}, Brier {found.brier:.3f}")
    for target, threshold in found.thresholds.items():
        click.echo(f"threshold    {target}: {threshold:.4f}")


async def _ask(
    house: "House", questions: "list[Question]", tokens: int, max_tokens: int
) -> list[tuple[list[float], float, int]]:
    """Signals, worth and prompt key of every answer; each leaves its receipt."""
    from galley.evals.calibrate import graded
    from galley.evals.outcomes import prompt_key
    from galley.router.cascade import TOP, Watch
    from galley.types import SamplingParams

    gate = asyncio.Semaphore(AT_ONCE)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=TOP)

    async def one(question: "Question") -> tuple[list[float], float, int] | None:
        watch, text = Watch(tokens), ""
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": question.prompt}]}
        async with gate, house.open(params, api="cli.route.calibrate", **asked) as answer:
            async for delta in answer.deltas():
                watch.add(delta.logprobs or ())
                text += delta.text
        if not watch.tokens:
            return None
        return watch.signals(), float(graded(text, question.answer)), prompt_key(question.prompt)

    found = await asyncio.gather(*(one(question) for question in questions))
    return [row for row in found if row is not None]
