"""The Guide seam: what keeps outputs to a grammar, token by token."""

from array import array
from typing import Protocol

__all__ = ["Grammar", "Guide"]


class Grammar(Protocol):
    """A compiled grammar, shared by any number of outputs.

    Attributes:
        relaxed: what of the request it does not hold an output to, in words by path.
    """

    relaxed: dict[str, str]

    def guide(self) -> "Guide":
        """A Guide at the beginning of an output. From any thread."""
        ...


class Guide(Protocol):
    """The state of one grammar in one output. Belongs to one job, and so to one thread at a time.

    It follows the tokens of the job, not its KV: a preempted job keeps it, and nothing is replayed.

    Every method may raise GalleyError (``guide_failed``) when the grammar's engine gives up; that ends the
    job it belongs to and no other (CAN-3).
    """

    @property
    def ended(self) -> bool:
        """The output is complete: nothing may follow, not even an end token."""
        ...

    def begin(self, most: int) -> list[int]:
        """The tokens that open every output, at most ``most``, already accepted. At least one token is left
        to be drawn."""
        ...

    def accept(self, token: int, most: int) -> list[int]:
        """Take one drawn token; the tokens that must follow it, at most ``most``, already accepted (GRM-6).

        End tokens are taken too. One that the last mask did not allow raises GalleyError (GRM-3), and so does
        any token after ``fill`` has failed.
        """
        ...

    def fill(self, masks: "array[int]", row: int) -> None:
        """Write the ids allowed next into one row of ``Draws.masks``. An end token is allowed exactly where
        the output may end (GRM-3). May run on another thread while nothing else is called."""
        ...

    def rollback(self, count: int) -> None:
        """Forget the last ``count`` accepted tokens (GRM-4)."""
        ...
