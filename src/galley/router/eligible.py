"""What may serve a request at all. Nothing later adds to it: no placement, no fallback, no hedge."""

from collections.abc import Callable, Iterable
from datetime import date

import msgspec

from galley.economics.price import PriceVersion, Quote, UnknownPrice
from galley.router.catalog import Catalog, Logical, Offer
from galley.router.facts import Facts

__all__ = ["Candidate", "Eligible", "Refusal"]

DEFAULT_OUTPUT = 1024
"""Completion tokens assumed in a quote when neither request nor model has a limit."""


Carries = Callable[[str], str | None]


class Refusal(msgspec.Struct, frozen=True):
    """Why a model, or one offer of it (``model@provider``), may not serve."""

    what: str
    why: str


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """An offer that may serve, and what it may cost."""

    offer: Offer
    price: PriceVersion
    quote: Quote


class Eligible(msgspec.Struct, frozen=True, kw_only=True):
    """The eligible offers by logical model, in the order asked, and everything refused with its reason."""

    models: dict[str, list[Candidate]]
    refused: list[Refusal]

    @classmethod
    def find(
        cls, catalog: Catalog, facts: Facts, models: Iterable[str], on: date, *, carries: Carries
    ) -> "Eligible":
        """Hard rules only; O(offers of the models). A model without an eligible offer is not eligible.

        Args:
            carries: why a wire format cannot carry the request faithfully; None when it can.
        """
        kept: dict[str, list[Candidate]] = {}
        refused: list[Refusal] = []
        for name in dict.fromkeys(models):
            model = catalog.models[name]
            why = _model(model, facts)
            if why is not None:
                refused.append(Refusal(name, why))
                continue
            offers = catalog.offers[name]
            if not offers:
                refused.append(Refusal(name, "nobody offers it"))
            found: list[Candidate] = []
            for offer in offers:
                answer = _offer(catalog, model, offer, facts, on=on, carries=carries)
                if isinstance(answer, str):
                    refused.append(Refusal(offer.key, answer))
                else:
                    found.append(answer)
            if found:
                kept[name] = found
        return cls(models=kept, refused=refused)


def _model(model: Logical, facts: Facts) -> str | None:
    missing = facts.needs - set(model.capabilities)
    if missing:
        return f"it lacks {', '.join(sorted(missing))}"
    return None


def _offer(
    catalog: Catalog, model: Logical, offer: Offer, facts: Facts, *, on: date, carries: Carries
) -> Candidate | str:
    policy = catalog.policy
    if offer.location != "local":
        if policy.location == "local-only":
            return "policy is local-only and it is not on this machine"
        if facts.local_only:
            return "the request is local-only and it is not on this machine"
        for allowed in (policy.regions, facts.residency):
            if allowed and offer.region not in allowed:
                return (
                    f"its region {offer.region or 'is unknown and'} is not among {', '.join(sorted(allowed))}"
                )
    carried = facts.needs & offer.lacks
    if carried:
        return f"this provider cannot carry {', '.join(sorted(carried))}"
    if offer.format and (why := carries(offer.format)) is not None:
        return f"its format cannot carry {why}"
    if catalog.provider(offer.provider) is None:
        return "its provider is not running"
    # A local engine counts exactly and refuses by itself, with the error clients know.
    elsewhere = offer.location != "local"
    if elsewhere and facts.prompt_tokens_least >= offer.context:
        return f"about {facts.prompt_tokens} prompt tokens do not fit its context of {offer.context}"
    if facts.max_each is not None:
        if elsewhere and facts.prompt_tokens_least + facts.max_each > offer.context:
            return f"prompt and {facts.max_each} completion tokens do not fit its context of {offer.context}"
        if model.max_output is not None and facts.max_each > model.max_output:
            return f"{facts.max_each} completion tokens are above its limit of {model.max_output}"
    try:
        price = catalog.price(offer, on)
    except UnknownPrice as error:
        return error.message
    each = facts.max_each
    if each is None:
        each = model.max_output or min(DEFAULT_OUTPUT, offer.context)
    quote = price.quote(facts.prompt_tokens, each * facts.choices)
    limits = [limit for limit in (facts.max_pico, catalog.max_pico) if limit is not None]
    if limits and quote.most > min(limits):
        return f"it may cost {quote.most} pico-dollars, more than the limit of {min(limits)}"
    return Candidate(offer=offer, price=price, quote=quote)
