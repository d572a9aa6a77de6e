"""The whole decision about one request: what was asked, what was eligible, what was chosen and why."""

import functools
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime

import msgspec

from galley.errors import ConfigError, InvalidRequest, PolicyRefused
from galley.providers.carries import lacks
from galley.router.attempts import as_offered
from galley.router.cascade import Cascade
from galley.router.catalog import Catalog, Offer, RouteTable
from galley.router.eligible import Candidate, Eligible
from galley.router.facts import Facts
from galley.router.health import Health
from galley.router.learned import Learned
from galley.router.place import order
from galley.router.policy import Bandit, Choice, Factors, Fixed, Policy, Question, Rules, Specialised
from galley.types import Request, Route

__all__ = ["Chooser", "Decision"]

SESSIONS = 4096
"""Conversations remembered for stickiness."""
SWITCH_MARGIN = 0.05
"""By how much another model's score must be better before a conversation moves."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a choice; ``galley route explain`` prints it.

    Attributes:
        sequence: offers in the order they are tried; the first is the choice. All of them are eligible.
        micros: microseconds it took.
        limit_pico: most pico-dollars the whole request may cost; None for no limit.
    """

    asked: str
    rule: str
    choice: Choice
    sequence: list[Candidate]
    refused: dict[str, str]
    facts: Facts
    micros: float
    limit_pico: int | None = None

    def route(self, chosen: Candidate) -> Route:
        """For the receipt, once it is known who served."""
        fell = chosen is not self.sequence[0]
        return Route(
            model=chosen.offer.model,
            provider=chosen.offer.provider,
            rule=self.rule,
            reason=self.choice.reason + ("; the first choice did not answer" if fell else ""),
            location=chosen.offer.location,
            scores=self.choice.scores,
            propensity=self.choice.propensity,
            price_version=chosen.price.id,
            candidates=[each.offer.key for each in self.sequence],
            refused=self.refused,
            quote_pico=chosen.quote.most,
            asked=self.asked,
            kind=self.choice.kind,
        )

    def ask(self, request: Request, candidate: Candidate) -> Request:
        """The request as a candidate is to be asked: a cascade's first model is asked for log-probabilities,
        where its provider can give them."""
        asked = as_offered(request, candidate)
        judge = self.choice.judge
        if judge is None or candidate.offer.model != self.choice.order[0]:
            return asked
        if "logprobs" in candidate.offer.lacks:
            return asked
        top = max(judge.top, asked.params.logprobs or 0)
        return msgspec.structs.replace(asked, params=msgspec.structs.replace(asked.params, logprobs=top))


class Chooser:
    """Decides, over one catalog. Not thread-safe.

    Args:
        health: the state of an upstream by offer key.
        read: contents of a learned router's file.
    Raises ConfigError: a route's options are wrong.
    """

    def __init__(
        self,
        catalog: Catalog,
        health: Callable[[str], Health],
        *,
        rng: random.Random,
        read: Callable[[str], bytes],
        today: Callable[[], date] = lambda: datetime.now(UTC).date(),
    ) -> None:
        self.catalog = catalog
        self._health = health
        self._today = today
        self._rng = rng
        catalog.warm(today())
        self._policies = {name: self._policy(table, read) for name, table in catalog.routes.items()}
        self._sessions: OrderedDict[str, tuple[str, str, int]] = OrderedDict()

    def _policy(self, table: RouteTable, read: Callable[[str], bytes]) -> Policy:
        simple: Mapping[str, Callable[[RouteTable], Policy]] = {
            "rules": Rules,
            "specialised": Specialised,
            "factors": Factors,
        }
        if table.policy in simple:
            return simple[table.policy](table)
        if table.policy == "fixed":
            if table.options:
                raise ConfigError(f"route {table.name!r}: policy 'fixed' has no options")
            return Fixed()
        if table.policy == "bandit":
            return Bandit(table, self._rng)
        if table.policy == "cascade":
            return Cascade(table, read)
        return Learned(table, read)

    def decide(self, request: Request) -> Decision:
        """Choose. Raises ModelNotFound for an unknown name, PolicyRefused when nothing is eligible."""
        began = time.perf_counter()
        catalog = self.catalog
        facts = Facts.of(request)
        name = request.model
        if name in catalog.routes:
            table, policy = catalog.routes[name], self._policies[name]
            rule, models = table.policy, table.models
        else:
            real = name if name in catalog.models else catalog.aliases.get(name, "")
            if real not in catalog.models:
                raise catalog.unknown(name)
            how = "named by the request" if real == name else f"alias {name!r}"
            rule, policy = "fixed", Fixed(how)
            models = [real, *catalog.models[real].fallback]
        if "embedding" in facts.needs:
            able = [offer for model in models for offer in catalog.offers[model] if embeds(catalog, offer)]
            if not able:
                raise InvalidRequest(
                    f"The model {name!r} gives no embeddings.", param="model", code="model_not_supported"
                )
        barred: dict[str, str] = {}
        if request.allowed_models:
            barred = {each: "the key may not use it" for each in models if each not in request.allowed_models}
            models = [each for each in models if each not in barred]
        carries = functools.cache(functools.partial(lacks, request))
        eligible = Eligible.find(catalog, facts, models, self._today(), carries=carries)
        refused = barred | {refusal.what: refusal.why for refusal in eligible.refused}
        if not eligible.models:
            raise refuse(name, refused)
        choice = policy.choose(self._question(request, facts, eligible))
        if name not in catalog.routes and choice.order[0] != models[0]:
            choice = msgspec.structs.replace(
                choice, reason=f"{choice.reason}; not eligible, so its declared fallback"
            )
        warm = self._sessions.get(facts.session) if facts.session else None
        tools = (request.messages or [{}])[-1].get("role") == "tool"
        drawn = choice
        choice, ranked = self._rank(drawn, eligible, warm, tools=tools)
        if drawn.chances:
            # The probability of what will be tried first, with all that overrules the draw.
            leads = {
                name: self._rank(led_by(drawn, name), eligible, warm, tools=tools)[1][0]
                for name in drawn.order
            }
            chance = sum(drawn.chances[name] for name, lead in leads.items() if lead == ranked[0])
            choice = msgspec.structs.replace(choice, propensity=min(1.0, chance))
        local_first = catalog.policy.location == "local-first"
        sequence = [
            candidate
            for model in ranked
            for candidate in order(
                eligible.models[model],
                self._health,
                local_first=local_first,
                warm=warm[1] if warm is not None else None,
            )
        ]
        limits = [limit for limit in (facts.max_pico, catalog.max_pico) if limit is not None]
        return Decision(
            asked=name,
            rule=rule,
            choice=choice,
            sequence=sequence,
            refused=refused,
            facts=facts,
            micros=(time.perf_counter() - began) * 1e6,
            limit_pico=min(limits, default=None),
        )

    def _question(self, request: Request, facts: Facts, eligible: Eligible) -> Question:
        wait = {
            model: min(self._health(candidate.offer.key).cost for candidate in candidates)
            for model, candidates in eligible.models.items()
        }
        return Question(
            request=request, facts=facts, models=self.catalog.models, eligible=eligible.models, wait=wait
        )

    def _rank(
        self, choice: Choice, eligible: Eligible, warm: tuple[str, str, int] | None, *, tools: bool
    ) -> tuple[Choice, list[str]]:
        """A choice with what overrules it (the conversation, local first), and the models in the order in
        which they are tried."""
        if warm is not None:
            choice = self._stick(choice, eligible, warm, tools=tools)
        ranked = list(choice.order)
        if self.catalog.policy.location == "local-first":
            ranked.sort(key=lambda model: all(c.offer.location != "local" for c in eligible.models[model]))
        return choice, ranked

    def _stick(
        self, choice: Choice, eligible: Eligible, warm: tuple[str, str, int], *, tools: bool
    ) -> Choice:
        """Stay with the conversation's model unless another's score is better by the margin, plus the share
        of the other's price that goes on computing again what is cached where the conversation is. The
        results of tools always go to the model that called them."""
        stays, provider, cached = warm
        best = choice.order[0]
        if choice.judge is not None and not tools:
            # Whoever answered last keeps its cache while the first model tries: nothing is lost by asking it.
            return choice
        if stays not in eligible.models or stays == best:
            return choice
        lost = 0.0
        here = next((c for c in eligible.models[stays] if c.offer.provider == provider), None)
        if here is not None:
            again = min(c.price.input for c in eligible.models[best]) * cached
            lost = min(1.0, again / max(1, eligible.models[best][0].quote.expected))
        gain = choice.scores.get(best, 0.0) - choice.scores.get(stays, 0.0)
        if gain > SWITCH_MARGIN * (1 + lost * 4) and not tools:
            return choice
        rest = [model for model in choice.order if model != stays]
        why = "the results are for the model that called" if tools else "stays with the conversation's model"
        return msgspec.structs.replace(
            choice, order=[stays, *rest], reason=f"{choice.reason}; {why}", judge=None
        )

    def remember(self, session: str | None, chosen: Candidate, tokens: int) -> None:
        """A turn of a conversation was served: model, provider, and the tokens now cached there."""
        if session is None:
            return
        self._sessions[session] = (chosen.offer.model, chosen.offer.provider, tokens)
        self._sessions.move_to_end(session)
        while len(self._sessions) > SESSIONS:
            self._sessions.popitem(last=False)

    def inherit(self, other: "Chooser") -> None:
        """Take over the conversations of the chooser before a reload, and what its bandits have learned."""
        self._sessions = other._sessions
        for name, policy in self._policies.items():
            before = other._policies.get(name)
            if isinstance(policy, Bandit) and isinstance(before, Bandit):
                policy.inherit(before)

    def learn(self, route: Route, reward: float) -> bool:
        """What an answer was worth, 0..1, by the route on its receipt. True when a bandit learned from it: it
        drew the model that then answered. Raises ValueError for a reward outside 0..1."""
        policy = self._policies.get(route.asked)
        drawn = route.candidates[0].rpartition("@")[0] if route.candidates else ""
        if not isinstance(policy, Bandit) or route.rule != "bandit" or drawn != route.model:
            return False
        policy.learn(route.kind, route.model, reward)
        return True


def led_by(choice: Choice, name: str) -> Choice:
    """The choice if another model had been drawn."""
    rest = [each for each in choice.order if each != name]
    return msgspec.structs.replace(choice, order=[name, *rest])


def embeds(catalog: Catalog, offer: Offer) -> bool:
    """Whether an offer gives embeddings at all."""
    return "embedding" in catalog.models[offer.model].capabilities and "embedding" not in offer.lacks


def refuse(name: str, refused: Mapping[str, str]) -> PolicyRefused:
    """The error that names every reason."""
    shown = "; ".join(f"{what}: {why}" for what, why in list(refused.items())[:8])
    return PolicyRefused(
        f"Nothing may serve {name!r} for this request. {shown}.",
        param="model",
        hint="galley route explain shows the whole decision.",
        extra={"refused": dict(list(refused.items())[:32])},
    )
