"""Which names are served, and by whom."""

import difflib
from collections.abc import Mapping

from galley.errors import ModelNotFound
from galley.providers.base import ModelCard, Provider

__all__ = ["Catalog"]


class Catalog:
    """Names and aliases of the models of all providers. The first provider to claim a name keeps it.

    Args:
        aliases: further names by which a model may be asked for.
    """

    def __init__(self, aliases: Mapping[str, str] | None = None) -> None:
        self.aliases = dict(aliases or {})
        self._by_name: dict[str, tuple[ModelCard, Provider]] = {}

    def add(self, provider: Provider) -> None:
        """Serve everything a provider has."""
        for card in provider.cards:
            self._by_name.setdefault(card.id, (card, provider))

    def remove(self, provider: Provider) -> None:
        """Serve nothing of a provider any more."""
        self._by_name = {name: pair for name, pair in self._by_name.items() if pair[1] is not provider}

    def cards(self) -> list[ModelCard]:
        """Every model once, aliases left out."""
        return [
            next((card for card in provider.cards if card.id == name), card)
            for name, (card, provider) in self._by_name.items()
        ]

    def providers(self) -> list[Provider]:
        """Every provider once."""
        found: list[Provider] = []
        for _, provider in self._by_name.values():
            if provider not in found:
                found.append(provider)
        return found

    def find(self, name: str) -> tuple[ModelCard, Provider]:
        """The model of that name or alias. Raises ModelNotFound with the nearest names."""
        found = self._by_name.get(name) or self._by_name.get(self.aliases.get(name, ""))
        if found is None:
            known = [*self._by_name, *self.aliases]
            lowered = {each.lower(): each for each in known}
            near = difflib.get_close_matches(name.lower()[:200], list(lowered), n=3, cutoff=0.5)
            raise ModelNotFound(
                name[:200],
                nearest=[lowered[each] for each in near] or sorted(self._by_name)[:3],
                hint="GET /v1/models lists what is served here.",
            )
        return found
