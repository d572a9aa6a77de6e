"""Which names are served, by whom, at what price and under which policy: one TOML file.

Two nouns kept apart. A ``Logical`` model is what a request may ask for and what a policy chooses. An
``Offer`` is one provider's serving of it. Routes are names that stand for a choice (``auto``).
"""

import contextlib
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from galley.economics.price import FREE, PriceBook, PriceVersion, UnknownPrice, pico, version
from galley.errors import ConfigError, ModelNotFound
from galley.providers.base import ModelCard, Provider
from galley.router.facts import CAPABILITIES
from galley.router.tables import (
    Document,
    Location,
    Logical,
    OfferTable,
    PolicyTable,
    ProviderTable,
    RouteTable,
    ShadowTable,
)

__all__ = [
    "Catalog",
    "Document",
    "Logical",
    "Offer",
    "OfferTable",
    "PolicyTable",
    "ProviderTable",
    "RouteTable",
    "ShadowTable",
]


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One provider's serving of one logical model."""

    model: str
    provider: str
    wire: str
    """The model's name there."""
    location: Location
    region: str
    context: int
    lacks: frozenset[str] = frozenset()
    """Capabilities of the model that this provider cannot carry."""
    price_id: str = ""
    price_context: tuple[tuple[str, str], ...] = ()
    format: str = ""
    """Wire format, as ``providers.carries`` knows it; none for our own engines."""

    @property
    def key(self) -> str:
        """``model@provider``."""
        return f"{self.model}@{self.provider}"


class Catalog:
    """Models, offers, routes and prices. Replaced as a whole by a reload, so a decision sees one state.

    Without a file it holds what the providers have, each model free and on this machine.

    Args:
        aliases: further names by which a model may be asked for.
        own: price of local models that declare none.
    """

    def __init__(
        self,
        aliases: Mapping[str, str] | None = None,
        document: Document | None = None,
        *,
        own: PriceVersion = FREE,
    ) -> None:
        self.own = own
        self.document = document or Document()
        self.policy = self.document.policy
        self.aliases = dict(aliases or {})
        self.models: dict[str, Logical] = {}
        self.offers: dict[str, list[Offer]] = {}
        self.routes: dict[str, RouteTable] = {}
        self.tables: dict[str, ProviderTable] = {}
        ceiling = self.policy.ceiling
        self.prices = PriceBook(
            ceiling=None if ceiling is None else version(ceiling, "ceiling", quality="ceiling")
        )
        self.max_pico: int | None = None
        """Most pico-dollars of one request."""
        if self.policy.max_usd is not None:
            self.max_pico = pico(self.policy.max_usd, "policy.max_usd") * 1_000_000
        self._providers: dict[str, Provider] = {}
        self._served: dict[tuple[str, str], tuple[ModelCard, Provider]] = {}
        self._cards: dict[str, tuple[ModelCard, Provider]] = {}
        self._build(self.document)

    @classmethod
    def read(
        cls, path: Path, aliases: Mapping[str, str] | None = None, *, own: PriceVersion = FREE
    ) -> "Catalog":
        """Parse and check a file. Raises ConfigError naming the place."""
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
            document = msgspec.convert(raw, Document)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}", param="router.catalog") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not TOML: {error}", param="router.catalog") from error
        except msgspec.ValidationError as error:
            raise ConfigError(f"{path}: {error}", param="router.catalog") from error
        try:
            return cls(aliases, document, own=own)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error.message}", param="router.catalog") from error

    def _build(self, document: Document) -> None:
        for model in document.model:
            if model.id in self.models:
                raise ConfigError(f"model {model.id!r} appears twice")
            unknown = set(model.capabilities) - set(CAPABILITIES)
            if unknown:
                raise ConfigError(f"model {model.id!r}: unknown capabilities {sorted(unknown)}")
            if not 0 <= model.quality <= 1 or model.context < 1:
                raise ConfigError(f"model {model.id!r}: quality lies in 0..1 and context is at least 1")
            self.models[model.id] = model
            self.offers[model.id] = []
            if model.price:
                prices = [version(price, f"own/{model.id}", quality="own") for price in model.price]
                self.prices.declare("local", model.id, prices)
        for model in document.model:
            for alias in model.aliases:
                if alias in self.models or self.aliases.get(alias, model.id) != model.id:
                    raise ConfigError(f"model {model.id!r}: the alias {alias!r} is taken")
                self.aliases[alias] = model.id
            self._known(f"model {model.id!r}: fallback", model.fallback)
        for table in document.provider:
            self._add_table(table)
        for route in document.route:
            if route.name in self.models or route.name in self.aliases or route.name in self.routes:
                raise ConfigError(f"route {route.name!r}: the name is taken")
            if not route.models:
                raise ConfigError(f"route {route.name!r} has no models")
            self._known(f"route {route.name!r}", route.models)
            self.routes[route.name] = route
        for shadow in document.shadow:
            where = f"shadow of {shadow.of!r}"
            self._known(where, [shadow.to])
            if (
                shadow.of not in self.models
                and shadow.of not in self.aliases
                and shadow.of not in self.routes
            ):
                raise ConfigError(f"{where}: there is no such model, alias or route")
            if not 0 < shadow.share <= 1 or shadow.at_once < 1:
                raise ConfigError(f"{where}: share lies in 0..1, and at_once is at least 1")
            pico(shadow.max_usd_day, f"{where}: max_usd_day")

    def _known(self, where: str, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.models:
                raise ConfigError(f"{where}: there is no model {name!r}")

    def _add_table(self, table: ProviderTable) -> None:
        if table.name in self.tables or table.name == "local":
            raise ConfigError(f"provider {table.name!r}: the name is taken")
        if table.key_env and table.key_file:
            raise ConfigError(f"provider {table.name!r}: give key_env or key_file, not both")
        self.tables[table.name] = table
        lacks = {"token_ids", "thinking", *table.lacks}
        if unknown := set(table.lacks) - set(CAPABILITIES):
            raise ConfigError(f"provider {table.name!r}: lacks: unknown capabilities {sorted(unknown)}")
        if not table.extended:
            lacks |= {"sampling", "grammar"}
        if table.kind == "anthropic":
            lacks |= {"completion", "n", "logprobs", "embedding"}
        for offer in table.offer:
            self._known(f"provider {table.name!r}: offer", [offer.model])
            wire = offer.name or offer.model
            if offer.price:
                name = f"{table.name}/{wire}"
                self.prices.declare(table.name, wire, [version(price, name) for price in offer.price])
            if any(known.provider == table.name for known in self.offers[offer.model]):
                raise ConfigError(f"provider {table.name!r} offers {offer.model!r} twice")
            self.offers[offer.model].append(
                Offer(
                    model=offer.model,
                    provider=table.name,
                    wire=wire,
                    location=table.location,
                    region=table.region,
                    context=min(offer.context or 1 << 40, self.models[offer.model].context),
                    # Log-probabilities are asked for unasked (cascades): only where they are declared.
                    lacks=frozenset(lacks | ({"logprobs"} - set(self.models[offer.model].capabilities))),
                    price_id=table.price_id,
                    price_context=tuple(sorted(table.price_context.items())),
                    format="openai-extended" if table.kind == "openai" and table.extended else table.kind,
                )
            )

    def add(self, provider: Provider) -> None:
        """Serve what a provider has; what the file says of a model stays. The first provider to claim a name
        keeps its card. Raises ConfigError when the weights are not those declared."""
        self._providers[provider.name] = provider
        for card in provider.cards:
            self._cards.setdefault(card.id, (card, provider))
            self._served.setdefault((provider.name, card.id), (card, provider))
            if provider.name in self.tables:
                continue
            if card.id not in self.models:
                # Not declared: the engine itself says, with its own error, what it cannot do.
                capabilities = [c for c in CAPABILITIES if c != "vision"]
                self.models[card.id] = Logical(id=card.id, capabilities=capabilities, context=card.context)
                self.offers[card.id] = []
            if provider.digests.weights:  # else it has never been opened, and is checked when it is
                self.check_weights(card.id, provider.digests.weights)
            if any(offer.provider == provider.name for offer in self.offers[card.id]):
                continue
            location: Location = "local" if card.location == "local" else "cloud"
            self.offers[card.id].append(
                Offer(
                    model=card.id,
                    provider=provider.name,
                    wire=card.id,
                    location=location,
                    region="",
                    context=card.context,
                )
            )

    def warm(self, on: Any) -> None:
        """Look every price up once, so that no request waits for the package that holds them. Raises
        ConfigError when it is needed and not installed."""
        for offers in self.offers.values():
            for offer in offers:
                with contextlib.suppress(UnknownPrice):
                    self.price(offer, on)

    def price(self, offer: Offer, on: Any) -> PriceVersion:
        """The price of an offer on a day. Raises UnknownPrice."""
        if offer.location == "local" and not offer.price_id:
            declared = self.prices.declared(offer.provider, offer.wire)
            if not declared:
                return self.own
        return self.prices.find(offer.provider, offer.wire, offer.price_id or None, on, offer.price_context)

    def provider(self, name: str) -> Provider | None:
        """The running provider of that name."""
        return self._providers.get(name)

    def remove(self, provider: Provider) -> None:
        """Serve nothing of a provider any more. A model that the file declares stays known; others go."""
        gone = [card.id for card, served in self._cards.values() if served is provider]
        self._served = {key: pair for key, pair in self._served.items() if pair[1] is not provider}
        left = {name: pair for (_, name), pair in self._served.items()}
        declared = {model.id for model in self.document.model}
        for name in gone:
            if name in left:
                self._cards[name] = left[name]
            else:
                del self._cards[name]
            if provider.name not in self.tables:
                self.offers[name] = [one for one in self.offers[name] if one.provider != provider.name]
            if not self.offers[name] and name not in declared:
                del self.models[name], self.offers[name]
        if self._providers.get(provider.name) is provider:
            others = [other for _, other in self._served.values() if other.name == provider.name]
            del self._providers[provider.name]
            self._providers.update((other.name, other) for other in others)

    def check_weights(self, name: str, weights: str) -> None:
        """Raises ConfigError when the file declares other weights for the model."""
        wanted = self.models[name].weights.removeprefix("sha256:") if name in self.models else ""
        if wanted and wanted != weights:
            raise ConfigError(f"model {name!r}: the catalog wants weights {wanted}, here are {weights}")

    def cards(self) -> list[ModelCard]:
        """Every model that is served, once, aliases left out."""
        return [
            next((card for card in provider.cards if card.id == name), card)
            for name, (card, provider) in self._cards.items()
        ]

    def served(self, offer: Offer) -> tuple[ModelCard, Provider]:
        """Card and provider of an offer. Raises KeyError when its provider is not running."""
        return self._served[offer.provider, offer.model]

    def providers(self) -> list[Provider]:
        """Every provider once."""
        found: list[Provider] = []
        for _, provider in self._served.values():
            if provider not in found:
                found.append(provider)
        return found

    def find(self, name: str) -> tuple[ModelCard, Provider]:
        """A served model of that name or alias. Raises ModelNotFound with the nearest names."""
        found = self._cards.get(name) or self._cards.get(self.aliases.get(name, ""))
        if found is None:
            raise self.unknown(name)
        return found

    def unknown(self, name: str) -> ModelNotFound:
        """The error for a name nobody has."""
        known = [*dict.fromkeys([*self._cards, *self.models, *self.routes, *self.aliases])]
        lowered = {each.lower(): each for each in known}
        near = difflib.get_close_matches(name.lower()[:200], list(lowered), n=3, cutoff=0.5)
        return ModelNotFound(
            name[:200],
            nearest=[lowered[each] for each in near] or sorted(known)[:3],
            hint="GET /v1/models lists what is served here.",
        )
