"""What is found in text and what is not, and that none of it reaches a store."""

import random

import pytest

from galley.audit.pii import KINDS, Redactor
from galley.errors import ConfigError

REDACTOR = Redactor()

GOOD = [
    ("email", "jane.doe+tag@mail.example.co.uk"),
    ("email", "j@exämple.de"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "GB82WEST12345698765432"),
    ("iban", "FR1420041010050500013M02606"),
    ("card", "4111 1111 1111 1111"),
    ("card", "378282246310005"),
    ("card", "5555-5555-5555-4444"),
    ("national_id", "536-90-4399"),
    ("national_id", "86095742719"),
    ("national_id", "44051401359"),
    ("national_id", "12345678Z"),
    ("national_id", "X1234567L"),
    ("national_id", "111222333"),
    ("national_id", "529.982.247-25"),
    ("national_id", "255081416802538"),
    ("national_id", "AB 12 34 56 C"),
    ("phone", "+49 30 901820"),
    ("phone", "+1 (212) 555-0199"),
    ("phone", "(212) 555-0199"),
    ("phone", "030/9018-2000"),
    ("secret", "sk-proj-abcdefghijklmnopqrstuvwx"),
    ("secret", "ghp_abcdefghijklmnopqrstuvwxyz0123456789"),
    ("secret", "AKIAIOSFODNN7EXAMPLE"),
    ("secret", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijklmnop"),
    ("secret", "-----BEGIN RSA PRIVATE KEY-----\nMIIB\n-----END RSA PRIVATE KEY-----"),
]
FREE = [
    "version 1.2.3.4, build 20261121, 3.14159265358979",
    "order 4111 1111 1111 1112 was shipped",
    "DE89 3704 0044 0532 0130 01",
    "000-12-3456 and 666-12-3456",
    "call f(x) = 1234567890 * 2",
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "2026-11-21 10:15:13, 12345678A",
    "user @home, a@b, foo@bar",
    "between 1000 and 2000 tokens, 16384 in all; 10.0.0.1:8080",
]


@pytest.mark.parametrize(("kind", "text"), GOOD, ids=lambda each: each[:24])
def test_found(kind: str, text: str) -> None:
    for around in ("{}", "Please use {}, thanks.", "({})", "a: {}\nb"):
        whole = around.format(text)
        assert [found.kind for found in REDACTOR.find(whole)] == [kind], whole
        assert REDACTOR.text(whole) == around.format(f"[{kind}]")


@pytest.mark.parametrize("text", FREE)
def test_left_alone(text: str) -> None:
    assert REDACTOR.text(text) == text


def test_a_wrong_digit_is_no_number_of_anybody() -> None:
    """Of the numbers with a checksum, every single changed digit is let be, but for other kinds' luck."""
    rng = random.Random(1)
    for kind, text in GOOD:
        if kind not in ("iban", "card"):
            continue
        places = [i for i, c in enumerate(text) if c.isdigit() and i > 3]
        at = rng.choice(places)
        spoilt = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
        assert kind not in [found.kind for found in REDACTOR.find(spoilt)], spoilt


def test_whole_values_and_counts() -> None:
    counts: dict[str, int] = {}
    value = {"a": ["j@x.org", {"b": "card 4111111111111111 j@x.org"}], "n": 5, "j@x.org": None}
    assert REDACTOR.value(value, counts) == {
        "a": ["[email]", {"b": "card [card] [email]"}], "n": 5, "j@x.org": None,
    }  # fmt: skip
    assert counts == {"email": 2, "card": 1}


def test_kinds_can_be_chosen_and_must_exist() -> None:
    assert Redactor(["card"]).text("j@x.org 4111111111111111") == "j@x.org [card]"
    with pytest.raises(ConfigError, match="Unknown kind 'nose'"):
        Redactor(["nose"])
    assert set(KINDS) == {"secret", "email", "iban", "card", "national_id", "phone"}


def test_long_text_takes_linear_time() -> None:
    """No expression backtracks without bound."""
    import time

    for text in ("a" * 50_000, "1" * 50_000, "1 " * 25_000, "a.b@" * 12_000, "+49 " * 12_000, "eyJ" * 16_000):
        began = time.process_time()
        REDACTOR.text(text)
        assert time.process_time() - began < 5.0, text[:8]
