"""What a scope may use: hard limits that refuse, soft ones that warn, and plans as named templates."""

from collections.abc import Mapping
from typing import Literal

import msgspec

from galley.errors import InvalidRequest

__all__ = ["PLANS", "Limits", "Margin", "Resource", "Rule", "Rules", "Window", "revenue"]

Window = Literal["day", "month", "total"]
Resource = Literal["money", "tokens", "requests"]
COUNTED: tuple[tuple[Resource, str], ...] = (
    ("money", "pico"),
    ("tokens", "tokens"),
    ("requests", "requests"),
)
"""Resource to its unit in an Amount."""


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Most of each resource. None is no limit. Money in pico-dollars.

    Attributes:
        requests_total: of a session, the iteration cap of an agent's loop.
        requests_minute, tokens_minute: refilled evenly; a minute's worth may come at once.
        concurrency: requests under way at once.
        max_output: completion tokens of one choice.
    """

    money_day: int | None = None
    money_month: int | None = None
    money_total: int | None = None
    tokens_day: int | None = None
    tokens_month: int | None = None
    tokens_total: int | None = None
    requests_day: int | None = None
    requests_month: int | None = None
    requests_total: int | None = None
    requests_minute: int | None = None
    tokens_minute: int | None = None
    concurrency: int | None = None
    max_output: int | None = None

    def counted(self) -> list[tuple[str, Resource, str, Window, int]]:
        """The limits over windows that are set: name, resource, unit in an Amount, window, most."""
        found: list[tuple[str, Resource, str, Window, int]] = []
        for resource, unit in COUNTED:
            for window in ("day", "month", "total"):
                most = getattr(self, f"{resource}_{window}")
                if most is not None:
                    found.append((f"{resource}_{window}", resource, unit, window, most))
        return found

    def any(self) -> bool:
        """Whether anything is limited."""
        return any(getattr(self, name) is not None for name in self.__struct_fields__)

    def check(self) -> "Limits":
        """Itself. Raises InvalidRequest for a negative limit, and for a rate beyond what is counted."""
        for name in self.__struct_fields__:
            most = getattr(self, name)
            largest = 10**11 if name.endswith("_minute") else 2**62
            least = 1 if name.endswith("_minute") or name == "max_output" else 0
            if most is not None and not least <= most <= largest:
                raise InvalidRequest(f"{name} must lie in {least} to {largest}.", param=name)
        return self


class Margin(msgspec.Struct, frozen=True):
    """What a tenant is charged: gross margin in basis points of the price (6000 is 60 % of what is charged),
    or, ``points`` None, nothing at all."""

    points: int | None = 0


def revenue(cost: int, margin: Margin) -> int:
    """Pico-dollars charged for a cost: cost / (1 - margin), rounded half to even, once a request."""
    if margin.points is None:
        return 0
    rest = 10_000 - margin.points
    whole, left = divmod(cost * 10_000, rest)
    return whole + (1 if 2 * left > rest or (2 * left == rest and whole % 2) else 0)


class Rule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """The limits of one scope, of those of a kind that have no rule of their own (``user:*``), or of a plan's
    users (``plan:saas``).

    Attributes:
        plan: name of the plan that its users are on.
        margin: of a plan.
    """

    hard: Limits = Limits()
    soft: Limits = Limits()
    plan: str | None = None
    margin: Margin | None = None

    def limits(self) -> bool:
        """Whether it limits anything itself."""
        return self.hard.any() or self.soft.any()


USD = 10**12
PLANS: dict[str, Rule] = {
    "plan:free": Rule(
        hard=Limits(money_month=USD // 2, requests_minute=10, concurrency=1, max_output=1024),
        margin=Margin(None),
    ),
    "plan:saas": Rule(
        hard=Limits(money_month=5 * USD, requests_minute=60, concurrency=4),
        soft=Limits(money_month=4 * USD),
        margin=Margin(6000),
    ),
    "plan:enterprise": Rule(soft=Limits(money_month=50 * USD), margin=Margin(3000)),
}
"""Templates for the users of a plan, until a rule of the same name is set: half a dollar of inference a user
and month, not charged; five dollars at 60 % margin; fifty, warned of only, at 30 %."""


class Rules:
    """All rules in force. Immutable.

    One rule decides for a scope, and rules never add up within it: its own, if that limits anything; of a
    user, the plan's; then ``kind:*``.
    """

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self._rules = {**PLANS, **rules}
        self.tags = frozenset(scope for scope in rules if scope.startswith("tag:"))
        """Scopes of tags that are counted."""
        self._planned = any(rule.plan is not None for rule in rules.values())
        self.enforced = self._planned or any(
            rule.hard.any() for scope, rule in rules.items() if not scope.startswith("plan:")
        )
        """Whether there is any limit that may refuse a request."""
        self.quiet = not rules
        """Whether no rule has any effect on anybody."""

    def get(self, scope: str) -> Rule | None:
        """The rule set for exactly that scope, or the plan built in."""
        return self._rules.get(scope)

    def plan_rule(self, plan: str) -> Rule:
        """A plan's template. Raises InvalidRequest for one that does not exist."""
        found = self._rules.get(f"plan:{plan}")
        if found is None:
            known = sorted(name[5:] for name in self._rules if name.startswith("plan:"))
            raise InvalidRequest(f"There is no plan {plan!r}. Plans: {', '.join(known)}.", param="plan")
        return found

    def plan(self, scopes: tuple[str, ...]) -> str | None:
        """The plan of a request in these scopes: the most personal rule that names one."""
        order = {"user": 0, "key": 1, "team": 2, "org": 3, "server": 4}
        for scope in sorted(scopes, key=lambda each: order.get(each.partition(":")[0], 9)):
            for name in (scope, scope.partition(":")[0] + ":*"):
                rule = self._rules.get(name)
                if rule is not None and rule.plan is not None:
                    return rule.plan
        return None

    def of(self, scope: str, plan: str | None) -> Rule | None:
        """The one rule for a scope of a request on ``plan``."""
        own = self._rules.get(scope)
        if own is not None and own.limits():
            return own
        kind = scope.partition(":")[0]
        if kind == "user" and plan is not None:
            return self.plan_rule(plan)
        return self._rules.get(f"{kind}:*")

    def rated(self, scope: str, resource: str) -> bool:
        """Whether a rule that may apply to the scope limits a resource by the minute; the plan decides."""
        kind = scope.partition(":")[0]
        may = [self._rules.get(scope), self._rules.get(f"{kind}:*")]
        if kind == "user" and self._planned:
            may += [rule for name, rule in self._rules.items() if name.startswith("plan:")]
        return any(getattr(rule.hard, f"{resource}_minute") is not None for rule in may if rule is not None)

    def margin(self, plan: str | None) -> Margin:
        """What a plan's users are charged; without a plan, the cost itself."""
        if plan is None:
            return Margin(0)
        return self.plan_rule(plan).margin or Margin(0)
