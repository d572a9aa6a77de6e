"""The CallReader seam: one tool call (or one list of them), character by character.

A reader says what it has understood through ``out``: ``("start", name)``, then ``("args", text)`` whose
texts add up to one JSON object, then ``("end", "")``. It raises Malformed at the first character with which
the text can no longer be a call; what it said before stands, and the caller retracts a call that has started.
All of it is O(1) a character, so however the text is cut into pieces, the same comes out (TXT-6).
"""

import re
from collections.abc import Mapping
from typing import Any, Protocol

__all__ = ["MAX_NAME", "NAME", "CallReader", "Malformed", "Said", "Schemas"]

MAX_NAME = 256
NAME = re.compile(r"[\w.:/-]+")

Said = list[tuple[str, str]]
Schemas = Mapping[str, Any]
"""The parameters' JSON schema of each tool, by name."""


class Malformed(ValueError):
    """The text is no tool call of this format."""


class CallReader(Protocol):
    """See the module."""

    out: Said
    """What was understood since the caller last emptied it."""

    @property
    def complete(self) -> bool:
        """Whether the calls read so far are whole, should the text end here."""
        ...

    @property
    def done(self) -> bool:
        """Nothing more belongs to it. A text that ended at ``complete`` need not be ``done``."""
        ...

    def feed(self, char: str) -> None: ...
