"""Sampling options: every field of SamplingParams as a flag of ``run`` and ``chat``."""

from collections.abc import Callable
from typing import Any

import click

from galley.types import MODEL_CHOOSES, SamplingParams


def biases(_ctx: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> dict[int, float] | None:
    """``("198=-100",)`` to ``{198: -100.0}``. Raises BadParameter."""
    found = {}
    for text in given:
        token, _, bias = text.partition("=")
        try:
            found[int(token)] = float(bias)
        except ValueError as error:
            raise click.BadParameter(f"{text!r} is not ID=BIAS, such as 198=-100") from error
    return found or None


OPTIONS: list[Callable[[Any], Any]] = [
    click.option(
        "--max-tokens", type=int, metavar="N", help="Most tokens to write; default: the rest of the context."
    ),
    click.option("--temperature", type=float, metavar="T", help="0 is greedy. Default: the model's, else 1."),
    click.option(
        "--top-p",
        type=float,
        metavar="P",
        help="Keep the smallest set with this mass. Default: the model's, else 1.",
    ),
    click.option("--top-k", type=int, metavar="K", help="Keep the K most likely; 0 is off."),
    click.option("--min-p", type=float, metavar="P", help="Drop what is below P times the most likely."),
    click.option(
        "--repetition-penalty", type=float, metavar="X", help="Above 1 discourages repeating. Default: 1."
    ),
    click.option(
        "--frequency-penalty", type=float, metavar="X", help="Per occurrence in the output. Default: 0."
    ),
    click.option(
        "--presence-penalty", type=float, metavar="X", help="Once a token has occurred. Default: 0."
    ),
    click.option(
        "--logit-bias",
        multiple=True,
        metavar="ID=BIAS",
        callback=biases,
        help="Add BIAS to a token's logit. Repeatable.",
    ),
    click.option(
        "--seed", type=int, metavar="N", help="Same seed, same answer; default: chosen and on the receipt."
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. Repeatable."),
    click.option(
        "--stop-token-id", "stop_token_ids", type=int, multiple=True, metavar="ID", help="End at this token."
    ),
    click.option("--include-stop", "include_stop_str_in_output", is_flag=True, help="Keep the stop text."),
    click.option("--min-tokens", type=int, metavar="N", help="No end before N tokens."),
    click.option("--ignore-eos", is_flag=True, help="Go on past the model's own end."),
    click.option("--keep-special", is_flag=True, help="Show special tokens as text."),
]


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All of the above, in this order."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def left_open(values: dict[str, Any]) -> list[str]:
    """The parameters left to the model file's own defaults, where it has any."""
    return [name for name in MODEL_CHOOSES if values[name] is None]


def params_of(values: dict[str, Any]) -> SamplingParams:
    """The parameters named on the command line; everything else at its documented default."""
    given = {
        key: value
        for key, value in values.items()
        if value is not None and value != () and value is not False
    }
    if given.pop("keep_special", False):
        given["skip_special_tokens"] = False
    for key in ("stop", "stop_token_ids"):
        if key in given:
            given[key] = list(given[key])
    return SamplingParams(**given)
