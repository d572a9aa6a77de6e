"""What a prompt looks like: words and character n-grams for a learned router, and figures of length and form.

Pure Python, the same for training and for serving, so nothing can differ between the two. O(characters).
"""

import math
import re
from collections.abc import Iterator

__all__ = ["FORM", "READ", "form", "grams", "words"]

READ = 6000
"""Characters of a prompt that are read: of a longer one the first and the last half of this. A router need
not read a book to know that it is one; the length itself is among the figures."""
FORM = (
    "log_characters",
    "log_words",
    "log_lines",
    "word_length",
    "digits",
    "capitals",
    "punctuation",
    "symbols",
    "unusual_words",
    "questions",
    "negation",
    "blank",
    "statements",
    "quoted",
    "code",
    "has_options",
    "option_length",
    "option_spread",
    "numeric_options",
    "numbers",
    "largest_number",
    "log_last_line",
    "money",
    "percent",
    "non_ascii",
)
_WORD = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]")
_OPTION = re.compile(r"(?m)^\(?[A-H][.)] ?(.*)$")
_NUMBER = re.compile(r"\d[\d,]*\.?\d*")
_NEGATION = re.compile(r"\b(?:not|never|except|least|false|incorrect|cannot|without|n't)\b", re.I)
_CODE = re.compile(r"```|\bdef |\bclass |#include|;\n|\breturn\b|=>|\bimport \w")
_LONG = re.compile(r"[A-Za-z]{10,}")


def shorten(text: str) -> str:
    """The text, or its first and last READ / 2 characters."""
    return text if len(text) <= READ else f"{text[: READ // 2]}\n{text[-READ // 2 :]}"


def words(text: str) -> list[str]:
    """Lower-case words, single digits and signs."""
    return _WORD.findall(shorten(text).lower())


def grams(word: str) -> Iterator[str]:
    """A word's own character n-grams, 3 to 5, its borders marked."""
    padded = f"<{word}>"
    for size in (3, 4, 5):
        for start in range(len(padded) - size + 1):
            yield "#" + padded[start : start + size]


def form(text: str) -> list[float]:
    """The figures named in FORM, roughly scaled to 0..1 or to logarithms."""
    length = max(1, len(text))
    text = shorten(text)
    read = max(1, len(text))
    split = text.split()
    count = max(1, len(split))
    digits = sum(map(str.isdigit, text))
    capitals = sum(map(str.isupper, text))
    letters = sum(map(str.isalpha, text))
    spaces = sum(map(str.isspace, text))
    symbols = sum(text.count(sign) for sign in "=+*/^<>|{}[]\\_")
    options = _OPTION.findall(text)
    sizes = [len(option) for option in options] or [0]
    mean = sum(sizes) / len(sizes)
    spread = math.sqrt(sum((size - mean) ** 2 for size in sizes) / len(sizes))
    numbers = [float(found.replace(",", "").rstrip(".") or 0) for found in _NUMBER.findall(text)[:200]]
    lines = text.rstrip().rsplit("\n", 1)
    return [
        math.log(length),
        math.log(count),
        math.log1p(text.count("\n")),
        letters / count / 10,
        digits / read,
        capitals / read,
        (read - letters - digits - spaces) / read,
        symbols / read,
        len(_LONG.findall(text)) / count,
        min(4, text.count("?")) / 4,
        float(_NEGATION.search(text) is not None),
        float("___" in text),
        float("Statement" in text),
        min(6, text.count('"')) / 6,
        float(_CODE.search(text) is not None),
        float(len(options) >= 2),
        math.log1p(mean),
        math.log1p(spread),
        sum(option[:1].isdigit() or option[:2] in ("-1", "$1") for option in options) / max(1, len(options)),
        math.log1p(len(numbers)),
        math.log1p(min(1e12, max(numbers, default=0.0))),
        math.log1p(len(lines[-1])),
        float("$" in text),
        float("%" in text or "percent" in text),
        (length - len(text.encode("ascii", "ignore"))) / length if length == read else 0.0,
    ]
