"""From receipts and feedback to what another policy would have earned.

Only answers whose first model was drawn with a probability below 1 can tell of others: with a propensity of 1
nothing else could have happened. The action is the model tried first; retries and fallbacks belong to the
world.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from galley.audit.feedback import Feedback
from galley.errors import InvalidRequest
from galley.evals.offpolicy import Estimates, Logged, estimate
from galley.types import Receipt

__all__ = ["Drawn", "drawn", "judge"]

PRIOR = 5.0
"""Weight of the mean over all kinds of work in the reward expected of one kind."""


class Drawn(msgspec.Struct, frozen=True, kw_only=True):
    """One decision that was drawn: the models it could have been, and what came of it."""

    receipt: str
    route: str
    kind: str
    models: list[str]
    chosen: str
    propensity: float
    reward: float


def drawn(pairs: Iterable[tuple[Receipt, Feedback]], route: str | None = None) -> list[Drawn]:
    """The decisions that can be learned from, in the order given; of one route, or of all."""
    found = []
    for receipt, feedback in pairs:
        way = receipt.route
        if way is None or not way.candidates or not way.propensity < 1:
            continue
        if route is not None and way.asked != route:
            continue
        models = list(dict.fromkeys(each.rpartition("@")[0] for each in way.candidates))
        found.append(
            Drawn(
                receipt=receipt.id,
                route=way.asked,
                kind=way.kind,
                models=models,
                chosen=models[0],
                propensity=way.propensity,
                reward=feedback.reward,
            )
        )
    return found


def expected(rows: Iterable[Drawn]) -> dict[tuple[str, str], float]:
    """Mean reward by kind of work and model, drawn towards the model's mean over all kinds; the latter under
    the kind ``*``."""
    sums: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for kind in (row.kind, "*"):
            total = sums.setdefault((kind, row.chosen), [0.0, 0.0])
            total[0] += row.reward / row.propensity
            total[1] += 1 / row.propensity
    means = {key: total[0] / total[1] for key, total in sums.items()}
    return {
        (kind, model): (total[0] + PRIOR * means["*", model]) / (total[1] + PRIOR)
        for (kind, model), total in sums.items()
    }


def guess(table: Mapping[tuple[str, str], float], kind: str, model: str) -> float:
    """The reward expected; one half of a model never drawn."""
    return table.get((kind, model), table.get(("*", model), 0.5))


def judge(rows: list[Drawn], *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Estimates for always choosing each model, and for the best model of each kind of work. Rewards expected
    (for DR, and for the best of a kind) come from the half of the rows that is not being judged, so no row
    speaks for itself. Raises InvalidRequest when there is nothing to judge."""
    if len(rows) < 20:
        raise InvalidRequest(
            f"{len(rows)} answers with feedback were drawn by chance; 20 at least are needed",
            param="logs",
            hint="A route with policy bandit draws; POST /v1/feedback tells the rewards.",
        )
    halves = [expected(rows[1::2]), expected(rows[::2])]
    models = sorted({model for row in rows for model in row.models})
    found: dict[str, Estimates] = {}
    for policy in [*models, "best of each kind"]:
        logged = []
        for place, row in enumerate(rows):
            table = halves[place % 2]
            guesses = {model: guess(table, row.kind, model) for model in row.models}
            best = max(guesses, key=lambda model: guesses[model])
            other = best if policy == "best of each kind" else policy
            # A model that was not eligible cannot be chosen: the other policy does then what was done best.
            other = other if other in guesses else best
            logged.append(
                Logged(
                    chosen=row.chosen,
                    propensity=row.propensity,
                    reward=row.reward,
                    other=other,
                    expected=guesses,
                )
            )
        name = policy if policy == "best of each kind" else f"always {policy}"
        found[name] = estimate(logged, resamples=resamples, seed=seed)
    return {"rows": len(rows), "routes": sorted({row.route for row in rows}), "policies": found}
