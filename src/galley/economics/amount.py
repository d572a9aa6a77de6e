"""What a budget counts, as one exact vector: money, tokens, requests and requests under way."""

import msgspec

from galley.errors import GalleyError

__all__ = ["LARGEST", "ZERO", "Amount", "AmountTooLarge", "dollars"]

LARGEST = 2**63 - 1
"""What a column holds: 9.2 million dollars in pico-dollars, for one line and for one counter."""


class AmountTooLarge(GalleyError):
    """An amount, or the counter it would be added to, does not fit 64 bits. Nothing was written."""

    status = 400
    type = "invalid_request_error"
    code = "amount_too_large"
    exit_code = 2


class Amount(msgspec.Struct, frozen=True):
    """Whole numbers, each of its own unit; none is ever rounded. Added and subtracted unit by unit."""

    pico: int = 0
    """Pico-dollars (1e-12 USD)."""
    tokens: int = 0
    """Prompt and completion together."""
    requests: int = 0
    slots: int = 0
    """Requests under way: only ever reserved, never spent."""

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            self.pico + other.pico,
            self.tokens + other.tokens,
            self.requests + other.requests,
            self.slots + other.slots,
        )

    def __sub__(self, other: "Amount") -> "Amount":
        return Amount(
            self.pico - other.pico,
            self.tokens - other.tokens,
            self.requests - other.requests,
            self.slots - other.slots,
        )

    def __bool__(self) -> bool:
        return bool(self.pico or self.tokens or self.requests or self.slots)

    @property
    def negative(self) -> bool:
        """Whether any part is below zero."""
        return min(self.pico, self.tokens, self.requests, self.slots) < 0

    def checked(self) -> "Amount":
        """Itself. Raises AmountTooLarge where a part does not fit a column."""
        if max(self.pico, self.tokens, self.requests, self.slots) > LARGEST:
            raise AmountTooLarge(f"{self} does not fit the ledger's 64-bit columns.")
        return self

    def parts(self) -> dict[str, int]:
        """By column name."""
        return {
            "pico": self.pico,
            "tokens": self.tokens,
            "requests": self.requests,
            "slots": self.slots,
        }


ZERO = Amount()


def dollars(pico: int) -> str:
    """Pico-dollars as an exact decimal of dollars, no digit left out or added: ``0.00001875``."""
    sign, whole, rest = "-" if pico < 0 else "", abs(pico) // 10**12, abs(pico) % 10**12
    digits = f"{rest:012d}".rstrip("0")
    return f"{sign}{whole}.{digits:0<2}"
