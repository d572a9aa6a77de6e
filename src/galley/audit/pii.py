"""Personal data and secrets in text, found by form and, where the form has one, by checksum; and taken out.

Expressions find candidates; a check decides where there is one (Luhn for cards, ISO 7064 mod 97 for IBANs,
the check digits of national numbers), so that an order number is seldom taken for a card. Names and addresses
have no form and are not found: this lowers what a store holds, it does not make text anonymous.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from galley.errors import ConfigError
from galley.types import Receipt

__all__ = ["KINDS", "Found", "Redactor"]


class Found(msgspec.Struct, frozen=True):
    """One find."""

    kind: str
    start: int
    end: int


def digits(text: str) -> list[int]:
    return [int(c) for c in text if c.isdigit()]


def luhn(text: str) -> bool:
    """ISO/IEC 7812: doubled every second digit from the right, the sum is a multiple of ten."""
    found = digits(text)
    doubled = [d if i % 2 == 0 else (2 * d - 9 if d > 4 else 2 * d) for i, d in enumerate(reversed(found))]
    return sum(doubled) % 10 == 0


def card(text: str) -> bool:
    """A card number: 13 to 19 digits with the first of a network, and Luhn."""
    found = digits(text)
    return 13 <= len(found) <= 19 and found[0] in (2, 3, 4, 5, 6) and len(set(found)) > 1 and luhn(text)


def iban(text: str) -> bool:
    """ISO 13616: moved and spelt as a number, it leaves 1 modulo 97."""
    plain = re.sub(r"\s", "", text).upper()
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def ssn(text: str) -> bool:
    """United States: no area 000, 666 or 9xx, no group 00, no serial 0000."""
    area, group, serial = text.split("-")
    return area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"


def steuer_id(text: str) -> bool:
    """Germany: ISO 7064 mod 11, 10; of the first ten digits one or two repeat."""
    found = digits(text)
    repeats = 10 - len(set(found[:10]))
    if len(found) != 11 or found[0] == 0 or repeats not in (1, 2):
        return False
    product = 10
    for digit in found[:10]:
        product = ((digit + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == found[10]


def bsn(text: str) -> bool:
    """Netherlands: weights 9 to 2 and -1, a multiple of eleven."""
    found = digits(text)
    weights = (9, 8, 7, 6, 5, 4, 3, 2, -1)
    return sum(w * d for w, d in zip(weights, found, strict=True)) % 11 == 0 and any(found)


def pesel(text: str) -> bool:
    """Poland: weights 1 3 7 9, and a month that there is."""
    found = digits(text)
    total = sum(w * d for w, d in zip((1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1), found, strict=True))
    month, day = (found[2] * 10 + found[3]) % 20, found[4] * 10 + found[5]
    return total % 10 == 0 and 1 <= month <= 12 and 1 <= day <= 31


def dni(text: str) -> bool:
    """Spain (DNI, NIE): the letter is the number modulo 23."""
    number = text[:-1].upper().translate(str.maketrans("XYZ", "012")).replace("-", "")
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == text[-1].upper()


def nir(text: str) -> bool:
    """France: 97 minus the number modulo 97; Corsica counts as 19 and 18."""
    plain = re.sub(r"\s", "", text).upper().replace("2A", "19").replace("2B", "18")
    return len(plain) == 15 and 97 - int(plain[:13]) % 97 == int(plain[13:])


def cpf(text: str) -> bool:
    """Brazil: two check digits modulo eleven."""
    found = digits(text)
    if len(found) != 11 or len(set(found)) == 1:
        return False
    for end in (9, 10):
        total = sum((end + 1 - i) * found[i] for i in range(end))
        if total * 10 % 11 % 10 != found[end]:
            return False
    return True


def phone(text: str) -> bool:
    """7 to 15 digits (E.164)."""
    return 7 <= len(digits(text)) <= 15


Rule = tuple[str, re.Pattern[str], Callable[[str], bool] | None]


def rule(kind: str, form: str, check: Callable[[str], bool] | None = None) -> Rule:
    """A row of the table below."""
    return kind, re.compile(form, re.VERBOSE), check


RULES: tuple[Rule, ...] = (
    rule(
        "secret",
        r"-----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----[\s\S]*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|\Z)",
    ),
    rule("secret", r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    rule("secret", r"\b(?:sk|pk|rk)-[\w-]{20,} | \b(?:sk|rk)_live_\w{16,} | \bglpat-[\w-]{20}"),
    rule("secret", r"\bgh[pousr]_\w{30,} | \bgithub_pat_\w{22,} | \bhf_\w{30,} | \bxox[abprs]-[\w-]{10,}"),
    rule("secret", r"\bAKIA[0-9A-Z]{16}\b | \bAIza[\w-]{35}"),
    rule("secret", r"(?i:(?<=bearer[ ])[\w.~+/-]{16,}=* | (?<=authorization:[ ]basic[ ])[\w+/]{8,}=*)"),
    rule("email", r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[^\W\d_]{2,24}\b"),
    rule("iban", r"\b[A-Z]{2}\d{2}(?:[ ]?[0-9A-Z]{4}){2,7}(?:[ ]?[0-9A-Z]{1,3})?\b", iban),
    rule(
        "national_id",
        r"(?<!\d)[12][ ]?\d{2}[ ]?\d{2}[ ]?(?:\d{2}|2[AB])[ ]?\d{3}[ ]?\d{3}[ ]?\d{2}(?!\d)",
        nir,
    ),
    rule("card", r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d-])", card),
    rule("national_id", r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])", ssn),
    rule("national_id", r"(?<!\d)\d{3}\.\d{3}\.\d{3}-\d{2}(?!\d)", cpf),
    rule("national_id", r"(?<![\d+])\d{2}[ ]?\d{3}[ ]?\d{3}[ ]?\d{3}(?!\d)", steuer_id),
    rule("national_id", r"(?<![\d+])\d{11}(?!\d)", pesel),
    rule("national_id", r"(?<![\d+])\d{11}(?!\d)", cpf),
    rule("national_id", r"(?<![\d+])\d{9}(?!\d)", bsn),
    rule("national_id", r"\b(?:\d{8}|[XYZ]\d{7})-?[A-HJ-NP-TV-Z]\b", dni),
    rule(  # of the United Kingdom: it has no check digit
        "national_id",
        r"\b(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z][ ]?(?:\d{2}[ ]?){3}[A-D]\b",
    ),
    rule(
        "phone",
        r"(?<![\w.+-])(?<!\d[ ])(?:\+|00)[1-9]\d{0,2}(?:[ ./-]?(?:\(\d{1,5}\)|\d{1,5})){2,6}(?!\w)",
        phone,
    ),
    rule("phone", r"(?<![\w.+-])\(?[2-9]\d{2}\)?[ .-][2-9]\d{2}[ .-]\d{4}(?![\w-])"),
    rule("phone", r"(?<![\w.+-])(?<!\d[ ])0\d{2,4}[ /-]\d{3,4}(?:[ -]?\d{2,4}){1,2}(?![\w-])", phone),
)
"""Kind, form, and what decides. The first that takes a place has it."""
STORES = ("receipts", "responses")
KINDS: tuple[str, ...] = tuple(dict.fromkeys(kind for kind, _, _ in RULES))


class Redactor:
    """Takes what it finds out of text, leaving ``[kind]``.

    Raises ConfigError for a kind that is not known.
    """

    def __init__(self, kinds: Iterable[str] = KINDS) -> None:
        wanted = set(kinds)
        if unknown := wanted - set(KINDS):
            known = ", ".join(KINDS)
            raise ConfigError(f"Unknown kind {min(unknown)!r}; there are {known}.", param="redact.kinds")
        self._rules = [rule for rule in RULES if rule[0] in wanted]

    @classmethod
    def of(cls, stores: Iterable[str], kinds: Iterable[str]) -> "dict[str, Redactor]":
        """The redactor of each store; one that is not among ``stores`` takes nothing out."""
        wanted, chosen = set(stores), tuple(kinds)
        return {store: cls(chosen if store in wanted else ()) for store in STORES}

    def find(self, text: str) -> list[Found]:
        """What there is, in order, without overlap. O(rules · length)."""
        taken: list[Found] = []
        for kind, form, check in self._rules:
            for match in form.finditer(text):
                start, end = match.span()
                if any(start < each.end and each.start < end for each in taken):
                    continue
                if check is None or check(match.group()):
                    taken.append(Found(kind, start, end))
        return sorted(taken, key=lambda each: each.start)

    def text(self, text: str, counts: dict[str, int] | None = None) -> str:
        """The text without what was found; ``counts`` gets how much of each kind."""
        found = self.find(text) if self._rules else []
        if not found:
            return text
        parts, place = [], 0
        for each in found:
            parts += [text[place : each.start], f"[{each.kind}]"]
            place = each.end
            if counts is not None:
                counts[each.kind] = counts.get(each.kind, 0) + 1
        return "".join([*parts, text[place:]])

    def receipt(self, receipt: Receipt) -> Receipt:
        """A receipt to be stored: prompt, output, error and metadata without what was found, and the counts
        among its warnings. Token ids would tell it again, so they go where any text changed."""
        counts: dict[str, int] = {}
        prompt, output = self.value(receipt.prompt, counts), self.value(receipt.output, counts)
        asked, found = self.value(receipt.asked, counts), bool(counts)
        error, metadata = self.value(receipt.error, counts), self.value(receipt.metadata, counts)
        if not counts:
            return receipt
        told = "redacted: " + ", ".join(f"{number} {kind}" for kind, number in sorted(counts.items()))
        return msgspec.structs.replace(
            receipt,
            prompt=prompt,
            output=output,
            output_ids=None if found else receipt.output_ids,
            asked=asked,
            error=error,
            metadata=metadata,
            warnings=[*receipt.warnings, told],
        )

    def value(self, value: Any, counts: dict[str, int] | None = None) -> Any:
        """The same for every string in a JSON value; keys stay. Text in a list of strings or of text parts is
        looked at piece by piece, so what is split between two pieces is not found."""
        if isinstance(value, str):
            return self.text(value, counts)
        if isinstance(value, dict):
            return {key: self.value(inner, counts) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(inner, counts) for inner in value]
        return value
