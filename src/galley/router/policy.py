"""The first decision: which logical model. A policy ranks what is eligible; it never adds to it."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from galley.errors import ConfigError
from galley.router.catalog import Logical, RouteTable
from galley.router.eligible import Candidate
from galley.router.facts import Facts, last_user_text
from galley.types import Request, TokenLogprob

__all__ = [
    "Bandit",
    "Choice",
    "Factors",
    "Fixed",
    "Judge",
    "Policy",
    "Question",
    "Reading",
    "Rules",
    "Specialised",
    "speciality",
]


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Models best first, all of them eligible, and why. ``propensity`` is the probability with which the
    first was chosen, given the same question."""

    order: list[str]
    scores: dict[str, float] = {}
    reason: str = ""
    propensity: float = 1.0
    chances: dict[str, float] = {}
    """Probability of each model to be drawn first, where a draw decided; they add up to 1."""
    kind: str = ""
    """Kind of work that was seen in the prompt, where the policy looked for one."""
    judge: "Judge | None" = None
    """Cascades: what judges the first model's answer before anybody sees it."""


class Reading(Protocol):
    """Reads one answer as it comes."""

    tokens: int

    @property
    def full(self) -> bool:
        """Whether further tokens change nothing."""
        ...

    def add(self, entries: Sequence[TokenLogprob]) -> None: ...

    def signals(self) -> list[float]:
        """Raises ValueError before the first token."""
        ...


class Judge(Protocol):
    """Says how likely it is that an answer is good (``cascade.Confidence``).

    Attributes:
        top: alternatives needed beside each token.
        needed: least confidence that is enough.
        keep: give the first answer after all when nobody can take the escalation.
        share: most of the time left that the first model may take, 0..1.
    """

    top: int
    needed: float
    keep: bool
    share: float

    def watch(self) -> Reading: ...
    def confidence(self, signals: Sequence[float]) -> float: ...
    def named(self, signals: Sequence[float]) -> dict[str, float]: ...

    def foreign(self, weights: str) -> str | None:
        """Why answers of these weights cannot be judged; None when they can."""
        ...


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy may look at. ``expected`` is the cheapest quote of each model in pico-dollars, ``wait``
    the shortest expected time to its first output in seconds."""

    request: Request
    facts: Facts
    models: Mapping[str, Logical]
    eligible: Mapping[str, Sequence[Candidate]]
    wait: Mapping[str, float]

    def expected(self, model: str) -> int:
        return min(candidate.quote.expected for candidate in self.eligible[model])


class Policy(Protocol):
    """The Policy seam of routing."""

    def choose(self, question: Question) -> Choice:
        """Rank the eligible models. Called only when there is at least one."""
        ...


class Fixed:
    """The first eligible model in the order listed."""

    def __init__(self, reason: str = "first eligible in the route's order") -> None:
        self._reason = reason

    def choose(self, question: Question) -> Choice:
        return Choice(order=list(question.eligible), reason=self._reason)


def take(table: RouteTable, allowed: set[str]) -> dict[str, Any]:
    """A route's options. Raises ConfigError for one it does not know."""
    strangers = set(table.options) - allowed
    if strangers:
        raise ConfigError(
            f"route {table.name!r}: policy {table.policy!r} knows no option {', '.join(sorted(strangers))}; "
            f"it knows {', '.join(sorted(allowed)) or 'none'}"
        )
    return table.options


def number(table: RouteTable, name: str, default: float, low: float, high: float) -> float:
    """A numeric option. Raises ConfigError when it is none or out of range."""
    value = table.options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"route {table.name!r}: {name} must lie in {low:g}..{high:g}, not {value!r}")
    return float(value)


class Rules:
    """The first rule whose conditions all hold puts its models in front.

    Options: ``rules = [{use = [...], tenant = .., user = .., api = .., min_tokens = .., max_tokens = ..,
    metadata = {k = v}, speciality = ..}]``.
    """

    CONDITIONS = frozenset(("tenant", "user", "api", "min_tokens", "max_tokens", "metadata", "speciality"))

    def __init__(self, table: RouteTable) -> None:
        self._rules: list[dict[str, Any]] = take(table, {"rules"}).get("rules", [])
        for number_, rule in enumerate(self._rules, 1):
            where = f"route {table.name!r}, rule {number_}"
            strangers = set(rule) - self.CONDITIONS - {"use"}
            if strangers or not rule.get("use"):
                raise ConfigError(f"{where}: needs use = [...], and knows no {sorted(strangers)}")
            outside = set(rule["use"]) - set(table.models)
            if outside:
                raise ConfigError(f"{where}: {sorted(outside)} are not among the route's models")

    def choose(self, question: Question) -> Choice:
        for place, rule in enumerate(self._rules, 1):
            if all(self._holds(name, rule[name], question) for name in self.CONDITIONS & set(rule)):
                front = [model for model in rule["use"] if model in question.eligible]
                if front:
                    rest = [model for model in question.eligible if model not in front]
                    return Choice(order=front + rest, reason=f"rule {place}")
        return Choice(order=list(question.eligible), reason="no rule holds; the route's order")

    def _holds(self, name: str, wanted: Any, question: Question) -> bool:
        request = question.request
        if name == "min_tokens":
            return question.facts.prompt_tokens >= int(wanted)
        if name == "max_tokens":
            return question.facts.prompt_tokens <= int(wanted)
        if name == "metadata":
            return all(request.metadata.get(key) == value for key, value in wanted.items())
        if name == "speciality":
            return bool(speciality(last_user_text(request))[0] == wanted)
        return bool(getattr(request, name) == wanted)


_SIGNS: tuple[tuple[str, re.Pattern[str], float], ...] = tuple(
    (kind, re.compile(pattern, re.I), weight)
    for kind, pattern, weight in (
        ("code", r"```|^\s*(?:def|class|import|#include|fn|func|public|SELECT)\b", 2.0),
        (
            "code",
            r"\b(?:function|method|code|bug|stack ?trace|compile|refactor|unit tests?|regex|sql)\b",
            1.0,
        ),
        ("code", r"\b(?:python|javascript|typescript|rust|golang|java|c\+\+|bash|html|css)\b", 1.0),
        ("code", r"[;{}]\s*$|\w+\(\w*\)|==|!=|=>", 0.7),
        ("summary", r"\b(?:summar\w+|tl;?dr|key points|main points|in (?:one|two|three) sentences?)\b", 2.0),
        ("summary", r"\b(?:shorten|condense|abstract of|bullet points?)\b", 1.0),
        ("creative", r"\b(?:poem|haiku|story|lyrics|limerick|screenplay|sonnet|fairy ?tale)\b", 2.0),
        ("creative", r"\b(?:creative|imagine|invent|fictional|character|metaphor)\b", 1.0),
        (
            "maths",
            r"\b(?:solve|equation|integral|derivative|prove|theorem|probability|how (?:many|much))\b",
            1.0,
        ),
        ("maths", r"\d\s*[-+*/^=]\s*\d|\$\d|\d+ ?%", 0.7),
    )
)
_READ = 4000


def speciality(text: str) -> tuple[str | None, dict[str, float]]:
    """What kind of work a text asks for (``code``, ``summary``, ``creative``, ``maths``), with the scores;
    None when nothing is clear: the best must reach 1.5 and be half as much again as the second.

    Linear in the first 4,000 characters. The text is only counted, never obeyed.
    """
    scores = {"code": 0.0, "summary": 0.0, "creative": 0.0, "maths": 0.0}
    text = text[:_READ]
    for kind, pattern, weight in _SIGNS:
        found = len(pattern.findall(text))
        if found:
            scores[kind] += weight * min(3, found) ** 0.5
    first, second = sorted(scores.values())[-1], sorted(scores.values())[-2]
    best = max(scores, key=lambda kind: scores[kind])
    return (best if first >= 1.5 and first >= 1.5 * second else None), scores


class Specialised:
    """Models tagged with the kind of work come first; when the kind is unclear, the route's order stands.

    Options: ``prefer = {summary = "small"}`` names a model for a kind instead of its tag.
    """

    def __init__(self, table: RouteTable) -> None:
        self._prefer: dict[str, str] = take(table, {"prefer"}).get("prefer", {})
        outside = set(self._prefer.values()) - set(table.models)
        if outside:
            raise ConfigError(f"route {table.name!r}: prefer: {sorted(outside)} are not among its models")

    def choose(self, question: Question) -> Choice:
        kind, scores = speciality(last_user_text(question.request))
        listed = list(question.eligible)
        if kind is None:
            return Choice(order=listed, scores=scores, reason="abstains: no kind of work is clear")
        front = [m for m in listed if m == self._prefer.get(kind)]
        front += [m for m in listed if kind in question.models[m].tags and m not in front]
        if not front:
            return Choice(order=listed, scores=scores, reason=f"{kind}: no eligible model is for it")
        rest = [m for m in listed if m not in front]
        return Choice(order=front + rest, scores=scores, reason=f"the last user turn is {kind}")


class Factors:
    """Weighted sum of quality, expected price and expected wait, each scaled over the eligible models.

    Options: ``quality``, ``price``, ``wait``: weights >= 0.
    """

    def __init__(self, table: RouteTable) -> None:
        take(table, {"quality", "price", "wait"})
        weights = [number(table, name, 1.0, 0, 1e6) for name in ("quality", "price", "wait")]
        total = sum(weights)
        if total <= 0:
            raise ConfigError(f"route {table.name!r}: at least one weight must be above 0")
        self._quality, self._price, self._wait = (weight / total for weight in weights)

    def choose(self, question: Question) -> Choice:
        names = list(question.eligible)
        quality = scaled([question.models[name].quality for name in names])
        price = scaled([float(question.expected(name)) for name in names])
        wait = scaled([question.wait[name] for name in names])
        scores = {
            name: self._quality * q + self._price * (1 - p) + self._wait * (1 - t)
            for name, q, p, t in zip(names, quality, price, wait, strict=True)
        }
        order = sorted(names, key=lambda name: -scores[name])
        return Choice(order=order, scores=scores, reason="highest weighted score")


def scaled(values: Sequence[float]) -> list[float]:
    """Min-max to 0..1; all alike is 0."""
    low, high = min(values), max(values)
    return [0.0 if high == low else (value - low) / (high - low) for value in values]


class Bandit:
    """Epsilon-greedy over a decayed mean reward per (kind of work, model), with exact propensities.

    The reward of an answer is what ``learn`` is told, 0..1. Unknown arms start at the model's declared
    quality with the weight of 10 answers; each lesson weighs 1 and older ones fade by 0.5 %.
    Options: ``epsilon`` (0.05), ``price`` (weight of the scaled price against reward, 0.3).
    """

    PRIOR = 10.0
    FADE = 0.995

    def __init__(self, table: RouteTable, rng: random.Random) -> None:
        take(table, {"epsilon", "price"})
        self._epsilon = number(table, "epsilon", 0.05, 0, 1)
        self._price = number(table, "price", 0.3, 0, 1)
        self._rng = rng
        self._arms: dict[tuple[str, str], list[float]] = {}

    def choose(self, question: Question) -> Choice:
        kind = speciality(last_user_text(question.request))[0] or "unclear"
        names = list(question.eligible)
        price = scaled([float(question.expected(name)) for name in names])
        scores = {
            name: (1 - self._price) * self._mean(kind, question.models[name]) + self._price * (1 - p)
            for name, p in zip(names, price, strict=True)
        }
        order = sorted(names, key=lambda name: -scores[name])
        explore = self._rng.random() < self._epsilon
        chosen = self._rng.choice(names) if explore else order[0]
        share = self._epsilon / len(names)
        chances = {name: share + (1 - self._epsilon if name == order[0] else 0.0) for name in names}
        return Choice(
            order=[chosen, *(name for name in order if name != chosen)],
            scores=scores,
            propensity=chances[chosen],
            chances=chances,
            kind=kind,
            reason=f"{'explores' if explore else 'best so far'} for {kind} work",
        )

    def learn(self, kind: str, model: str, reward: float) -> None:
        """Tell how good an answer to that kind of work was. Raises ValueError outside 0..1."""
        if not 0 <= reward <= 1:
            raise ValueError(f"reward {reward}")
        arm = self._arms.setdefault((kind, model), [0.0, 0.0])
        arm[0] = arm[0] * self.FADE + reward
        arm[1] = arm[1] * self.FADE + 1

    def inherit(self, other: "Bandit") -> None:
        """Go on with what another has learned."""
        self._arms = other._arms

    def _mean(self, kind: str, model: Logical) -> float:
        total, count = self._arms.get((kind, model.id), (0.0, 0.0))
        return (total + self.PRIOR * model.quality) / (count + self.PRIOR)


Maker = Callable[[RouteTable], Policy]
