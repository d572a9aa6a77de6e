"""Policies that ask a trained scorer: ``learned`` (cheap or frontier, before the fact) and ``cascade`` (the
small model first, the next when its own log-probabilities say that it was not sure)."""

from collections.abc import Callable
from typing import Any

from galley.errors import ConfigError
from galley.router.catalog import RouteTable
from galley.router.facts import last_user_text
from galley.router.policy import Choice, Question, number, scaled, take
from galley.router.scorer import Scorer

__all__ = ["Learned"]


class Learned:
    """Options: ``file`` (from ``galley route train``); ``map`` names which logical model stands for which
    model of the file; ``target`` a threshold of the file (``cost25``, ``cost50``, ``quality95`` …), or
    ``threshold`` a number.

    With one output (gain of strong over weak) the strong model comes first when the gain is above the
    threshold. With an output per model the highest of ``score - threshold x scaled price`` does.
    """

    def __init__(self, table: RouteTable, read: Callable[[str], bytes]) -> None:
        options: dict[str, Any] = take(table, {"file", "map", "target", "threshold"})
        where = f"route {table.name!r}"
        if not isinstance(options.get("file"), str):
            raise ConfigError(f'{where}: policy {table.policy!r} needs file = "..."')
        try:
            self.scorer = Scorer.decode(read(options["file"]))
        except OSError as error:
            raise ConfigError(f"{where}: {options['file']}: {error}") from error
        known = self.scorer.file.models
        mapping: dict[str, str] = options.get("map", {})
        self._of = {logical: mapping.get(logical, logical) for logical in table.models}
        strangers = {name for name in self._of.values() if name not in known}
        if strangers:
            raise ConfigError(
                f"{where}: the router file knows {', '.join(known)}, not {', '.join(sorted(strangers))}: map"
            )
        target = options.get("target")
        if target is not None and target not in self.scorer.file.thresholds:
            raise ConfigError(f"{where}: target is one of {', '.join(self.scorer.file.thresholds)}")
        default = self.scorer.file.thresholds[target or "cost50"] if self.scorer.file.thresholds else 0.0
        self.threshold = number(table, "threshold", default, -10.0, 10.0)

    def choose(self, question: Question) -> Choice:
        """See ``Policy.choose``."""
        file = self.scorer.file
        values = self.scorer.scores(last_user_text(question.request))
        names = list(question.eligible)
        if len(file.outputs) == 1:
            gain = values[0]
            strong = gain > self.threshold
            order = sorted(names, key=lambda name: file.models.index(self._of[name]), reverse=strong)
            word = "above" if strong else "not above"
            return Choice(
                order=order,
                scores={"gain": gain},
                reason=f"expected gain of the strong model {gain:.3f} is {word} {self.threshold:.3f}",
            )
        by_model = dict(zip(file.outputs, values, strict=True))
        price = scaled([float(question.expected(name)) for name in names])
        scores = {
            name: by_model[self._of[name]] - self.threshold * cost
            for name, cost in zip(names, price, strict=True)
        }
        order = sorted(names, key=lambda name: -scores[name])
        return Choice(order=order, scores=scores, reason="highest expected quality less the price of it")
