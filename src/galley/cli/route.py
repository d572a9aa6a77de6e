"""`galley route`: explain a decision, train a router, measure one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from galley.cli.route_calibrate import calibrate
from galley.cli.route_feedback import feedback
from galley.cli.route_identity import identity
from galley.cli.session import Session
from galley.cli.terminal import print_json

if TYPE_CHECKING:
    from galley.router.policy import Choice

__all__ = ["route"]

SHOWN = (
    "apgr",
    "cpt50",
    "cpt80",
    "aiq",
    "cost_saved_at_best_single",
    "quality_at_best_single_cost",
    "regret",
)


@click.group()
def route() -> None:
    """Explain, train and measure the choice of a model."""


route.add_command(calibrate)
route.add_command(feedback)
route.add_command(identity)


@route.command()
@click.argument("text", metavar="TEXT")
@click.option("--model", "name", metavar="NAME", help="Model or route asked for; default: the first route.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Most tokens of the answer.")
@click.option("--local-only", is_flag=True, help="As a request that must not leave this machine.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_obj
def explain(
    session: Session, text: str, *, name: str | None, max_tokens: int | None, local_only: bool, as_json: bool
) -> None:
    """Show the whole decision about one prompt. Nothing is sent and no model is loaded."""
    shown = _explained(session, text, name=name, max_tokens=max_tokens, local_only=local_only)
    if as_json:
        print_json(shown)
        return
    if "refused_as" in shown:
        click.echo(f"refused      {shown['refused_as']}")
    else:
        click.echo(f"asked        {shown['asked']}")
        click.echo(f"chosen       {shown['sequence'][0]['offer']}  ({shown['sequence'][0]['location']})")
        click.echo(f"rule         {shown['rule']}: {shown['reason']}")
        for model, score in shown["scores"].items():
            click.echo(f"score        {model}: {score:.4f}")
        if shown["judged"]:
            click.echo(f"judged       {shown['judged']}")
        click.echo(f"propensity   {shown['propensity']:g}")
        for place, each in enumerate(shown["sequence"], 1):
            click.echo(
                f"try {place:<8} {each['offer']}  {each['location']}"
                f"  at most {each['most_pico'] / 1e12:.6f} USD"
                f"  ({each['price_version']}, {each['price_quality']})"
            )
    for what, why in shown["refused"].items():
        click.echo(f"not eligible {what}: {why}")
    if "micros" in shown:
        click.echo(f"took         {shown['micros']:.0f} microseconds")


@route.command()
@click.argument("data", metavar="DATA", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--output", "-o", required=True, metavar="FILE", type=click.Path(path_type=Path, dir_okay=False)
)
@click.option(
    "--prices", metavar="FILE", type=click.Path(path_type=Path), help="USD per million tokens, JSON."
)
@click.option(
    "--holdout",
    default=0.2,
    show_default=True,
    type=click.FloatRange(0, 0.9),
    help="Share of prompts (or subjects) kept out of training, by hash, for `route eval`.",
)
@click.option(
    "--by",
    default="prompt",
    show_default=True,
    type=click.Choice(["prompt", "subject"]),
    help="What is held out.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def train(
    data: Path, *, output: Path, prices: Path | None, holdout: float, by: Any, seed: int, as_json: bool
) -> None:
    """Train a router on outcomes: a csv (prompt, weak_correct, strong_correct) or a jsonl (question, scores).

    Needs scikit-learn: pip install 'galley[router]'. What is trained is served without it.
    """
    import msgspec

    from galley.evals.outcomes import Outcomes
    from galley.evals.study import trained

    table, note = _prices(data, prices)
    outcomes = Outcomes.read(data, table)
    file, held = trained(outcomes, holdout=holdout, by=by, seed=seed)
    raw = msgspec.msgpack.encode(file)
    output.write_bytes(raw)
    shown = {
        "file": str(output),
        "bytes": len(raw),
        "trained_on": len(file.keys),
        "held_out": len(held),
        "models": file.models,
        "thresholds": file.thresholds,
        "prices": note,
    }
    if as_json:
        print_json(shown)
        return
    click.echo(f"{output}: {len(raw) / 1e6:.1f} MB, {len(file.keys)} prompts, {len(held)} held out by {by}")
    click.echo(f"models       {', '.join(file.models)} (cheapest first); prices {note}")
    for target, threshold in file.thresholds.items():
        click.echo(f"threshold    {target}: {threshold:.4f}")


@route.command(name="eval")
@click.argument("data", metavar="[DATA]", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--logs", is_flag=True, help="From receipts: what others would have earned.")
@click.option("--route", "of", metavar="NAME", help="With --logs: only this route's decisions.")
@click.option(
    "--router", "router_file", metavar="FILE", type=click.Path(path_type=Path), help="From `route train`."
)
@click.option(
    "--prices", metavar="FILE", type=click.Path(path_type=Path), help="USD per million tokens, JSON."
)
@click.option("--folds", default=5, show_default=True, type=click.IntRange(2, 20), help="Without --router.")
@click.option(
    "--by",
    default="prompt",
    show_default=True,
    type=click.Choice(["prompt", "subject"]),
    help="Without --router: how folds are cut.",
)
@click.option("--resamples", default=1000, show_default=True, type=click.IntRange(0, 100_000))
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_obj
def evaluate_command(
    session: Session,
    data: Path | None,
    *,
    logs: bool,
    of: str | None,
    router_file: Path | None,
    prices: Path | None,
    folds: int,
    by: Any,
    resamples: int,
    seed: int,
    as_json: bool,
) -> None:
    """Measure a router and every baseline, with 95 % bootstrap intervals.

    With --router: on the rows of DATA it was not trained on. Without: cross-validated on all rows, cut by
    hash of the prompt or of the subject. With --logs there is no DATA: off-policy estimates (IPS, SNIPS,
    doubly robust) from the receipts of this home and the feedback on them.
    """
    if logs != (data is None):
        raise click.UsageError("Give DATA, or --logs.")
    if data is None:
        _from_logs(session, of, resamples=resamples, seed=seed, as_json=as_json)
        return
    import msgspec

    from galley.evals.outcomes import Outcomes
    from galley.evals.study import cross_validate, evaluate
    from galley.router.scorer import Scorer

    table, note = _prices(data, prices)
    outcomes = Outcomes.read(data, table)
    if router_file is not None:
        shown = evaluate(Scorer.read(router_file).file, outcomes, resamples=resamples, seed=seed)
    else:
        report = cross_validate(
            outcomes,
            by,
            count=folds,
            resamples=resamples,
            seed=seed,
            tell=lambda line: click.echo(f"  {line}", err=True),
        )
        shown = {
            "dataset": outcomes.name,
            "rows": len(outcomes),
            "folds": folds,
            "by": by,
            "cost_unit": outcomes.unit,
            "policies": report,
        }
    shown["prices"] = note
    if as_json:
        print_json(msgspec.to_builtins(shown))
        return
    click.echo(f"{shown['dataset']}: {shown['rows']} rows; cost in {shown['cost_unit']}")
    click.echo("  ".join([f"{'policy':<15}", *(f"{name[:24]:<24}" for name in SHOWN)]))
    for policy, figures in shown["policies"].items():
        cells = [f"{figures[n].value:.3f} [{figures[n].low:.3f}, {figures[n].high:.3f}]" for n in SHOWN]
        click.echo("  ".join([f"{policy:<15}", *(f"{cell:<24}" for cell in cells)]))


def _from_logs(session: Session, of: str | None, *, resamples: int, seed: int, as_json: bool) -> None:
    import msgspec

    from galley.audit.feedback import FeedbackStore
    from galley.audit.receipts import ReceiptStore
    from galley.evals.logs import drawn, judge

    store = ReceiptStore(session.config.receipts.path)
    try:
        given = FeedbackStore(session.config.home / "feedback.db").since(limit=10_000_000)
        pairs = [(receipt, one) for one in given if (receipt := store.get(one.receipt)) is not None]
    finally:
        store.close()
    shown = judge(drawn(pairs, of), resamples=resamples, seed=seed)
    if as_json:
        print_json(msgspec.to_builtins(shown))
        return
    click.echo(f"{shown['rows']} drawn answers with feedback, of {', '.join(shown['routes'])}")
    names = ("logged", "ips", "snips", "dr")
    click.echo("  ".join([f"{'policy':<24}", *(f"{name:<22}" for name in names), "matched  effective"]))
    for policy, found in shown["policies"].items():
        figures = [getattr(found, name) for name in names]
        cells = [f"{f.value:.3f} [{f.low:.3f}, {f.high:.3f}]" for f in figures]
        click.echo(
            "  ".join([f"{policy:<24}", *(f"{cell:<22}" for cell in cells)])
            + f"  {found.matched:>6.1%}  {found.effective:>8.1f}"
        )


def judged_as(choice: "Choice") -> str | None:
    """What becomes of the first answer of a cascade, in words; None without one."""
    if choice.judge is None:
        return None
    return (
        f"{choice.order[0]} answers first; below confidence {choice.judge.needed:.3f}"
        f" its answer is not given, and {choice.order[1]} is asked"
    )


def _prices(data: Path, given: Path | None) -> tuple[Any, str]:
    """The price file given, or ``<set>-prices.json`` beside the data; and words for the report."""
    from galley.evals.outcomes import Prices

    if given is not None:
        return Prices.read(given), f"from {given.name}"
    beside = data.with_name(data.name.split("-", maxsplit=1)[0] + "-prices.json")
    if beside.is_file():
        return Prices.read(beside), f"from {beside.name}, found beside the data"
    return None, "none given"


def _explained(
    session: Session, text: str, *, name: str | None, max_tokens: int | None, local_only: bool
) -> dict[str, Any]:
    """The decision, JSON-safe. Local models count as running when their files are here; keys of providers
    are not needed, since nothing is sent."""
    import random
    import time

    from galley.errors import ConfigError, PolicyRefused
    from galley.model.families import spec_from_gguf
    from galley.model.gguf import GGUF
    from galley.providers.base import ModelCard
    from galley.providers.described import Described
    from galley.router.catalog import Catalog
    from galley.router.decision import Chooser
    from galley.router.health import Health
    from galley.router.outside import open_providers
    from galley.types import Request, SamplingParams

    path = session.config.router.catalog
    catalog = Catalog.read(path) if path is not None else Catalog()
    cards = []
    for entry in session.store.survey()[0]:
        with GGUF.open(entry.path) as file:
            cards.append(ModelCard(id=entry.name, context=spec_from_gguf(file).context, created=0))
        for alias in entry.aliases:
            catalog.aliases.setdefault(alias, entry.name)
    if cards:
        catalog.add(Described("local", cards))
    for provider in open_providers(catalog, lambda _: None, keyless=True):
        catalog.add(provider)
    if not catalog.models:
        raise ConfigError("There is no model here and no catalog.", hint="galley pull, or router.catalog")
    rng = random.Random(0)
    chooser = Chooser(
        catalog,
        lambda _: Health(time.monotonic, rng, retry_share=0.0),
        rng=rng,
        read=lambda file: Path(file).read_bytes(),
    )
    asked = name or next(iter(catalog.routes), None) or session.config.model
    request = Request(
        id="explain",
        api="cli.route.explain",
        model=asked,
        params=SamplingParams(max_tokens=max_tokens),
        created=time.time(),
        messages=[{"role": "user", "content": text}],
        local_only=local_only,
    )
    try:
        found = chooser.decide(request)
    except PolicyRefused as error:
        return {"asked": asked, "refused_as": error.message, "refused": error.extra["refused"]}
    return {
        "asked": found.asked,
        "rule": found.rule,
        "reason": found.choice.reason,
        "scores": found.choice.scores,
        "propensity": found.choice.propensity,
        "judged": judged_as(found.choice),
        "sequence": [
            {
                "offer": each.offer.key,
                "model": each.offer.model,
                "provider": each.offer.provider,
                "location": each.offer.location,
                "expected_pico": each.quote.expected,
                "most_pico": each.quote.most,
                "price_version": each.price.id,
                "price_quality": each.price.quality,
            }
            for each in found.sequence
        ],
        "refused": found.refused,
        "needs": sorted(found.facts.needs),
        "prompt_tokens": found.facts.prompt_tokens,
        "micros": found.micros,
    }
