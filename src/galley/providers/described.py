"""A provider that is only described: for looking at decisions where nothing is to run."""

from collections.abc import Sequence

from galley.errors import EngineFault
from galley.providers.base import Load, Meter, ModelCard, Prepared, Run
from galley.types import Digests, Request

__all__ = ["Described"]


class Described:
    """Satisfies ``Provider`` as far as choosing goes; everything that would run it raises EngineFault."""

    def __init__(self, name: str, cards: Sequence[ModelCard]) -> None:
        self.name = name
        self.cards = cards
        self.digests = Digests()
        self.fingerprint = ""

    async def prepare(self, request: Request) -> Prepared:
        raise self._idle()

    async def start(self, prepared: Prepared, meter: Meter) -> Run:
        raise self._idle()

    def load(self) -> Load:
        return Load()

    def token(self, id: int) -> tuple[str, bytes]:
        raise self._idle()

    def encode(self, text: str, *, special: bool) -> list[int]:
        raise self._idle()

    def decode(self, ids: list[int]) -> str:
        raise self._idle()

    def render(self, request: Request) -> str:
        raise self._idle()

    def _idle(self) -> EngineFault:
        return EngineFault(f"{self.name} is described here, not running")
