"""TextStream by example (TXT-1 to TXT-5)."""

from typing import Any

import pytest

from galley.runtime.text.stream import Piece, TextStream
from tests.unit.text.alphabet import SPECIAL, Alphabet


def stream(tokenizer: Alphabet | None = None, **changes: Any) -> TextStream:
    settings: dict[str, Any] = {
        "prompt_ids": [65],
        "skip_special": True,
        "stops": [],
        "include_stop": False,
        "min_tokens": 0,
    }
    return TextStream(tokenizer or Alphabet(), **(settings | changes))


def test_txt1_half_a_code_point_is_never_shown() -> None:
    text = stream()
    assert [text.push([byte]).text for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert text.flush("stop") == ""


def test_txt1_unfinished_character_shows_once_at_the_end() -> None:
    text = stream()
    assert text.push(list("é".encode())[:1]).text == ""
    assert text.flush("length") == "\ufffd"


def test_txt2_prompt_ending_inside_a_character_does_not_leak() -> None:
    half = list("🙂".encode())
    text = stream(prompt_ids=half[:2])
    out = text.push([*half[2:], 66]).text + text.flush("stop")
    assert out == bytes([*half[2:], 66]).decode("utf-8", "replace")
    assert "🙂" not in out


def test_txt3_broken_bytes_are_recovered_from_and_nothing_is_shown_twice() -> None:
    """Text is made from bytes, so no token changes what earlier ones said: there is nothing to reset."""
    junk = [b"\xf0\x9f", b"\xff\xfe", b"\x80\x80\x80", "é".encode()[:1], b"\xed\xa0\x80"]
    raw = b"".join(bad + "né 🙂.".encode() for bad in junk)
    text = stream()
    shown = ""
    for byte in raw:
        piece = text.push([byte]).text
        shown += piece
    shown += text.flush("length")
    assert shown == raw.decode("utf-8", "replace")
    assert shown.count("né 🙂.") == len(junk)


@pytest.mark.parametrize(("include", "shown"), [(False, "hi "), (True, "hi END")])
def test_txt4_stop_across_tokens(include: bool, shown: str) -> None:
    text = stream(stops=["END"], include_stop=include)
    pieces = [text.push([byte]) for byte in b"hi END"]
    assert "".join(piece.text for piece in pieces) == shown
    assert [piece.stop for piece in pieces] == [None] * 5 + ["END"]
    assert text.push([67]) == Piece("", "END", 0)
    assert text.flush("stop") == ""


def test_txt4_kept_counts_up_to_the_completing_id() -> None:
    text = stream(Alphabet(b"xEN", b"Dy"), stops=["END"])
    assert text.push([66, 257, 258, 66, 66]) == Piece("Bx", "END", 3)


def test_txt4_held_text_is_released_as_soon_as_it_cannot_match() -> None:
    text = stream(stops=["END"])
    assert text.push(list(b"aEN")).text == "a"
    assert text.push(list(b"E")).text == "EN"
    assert text.push(list(b"Z")).text == "EZ"


def test_txt4_earliest_completion_wins_then_list_order() -> None:
    assert stream(stops=["abc", "b"]).push(list(b"abc")) == Piece("a", "b", 2)
    assert stream(stops=["bc", "abc"]).push(list(b"abc")) == Piece("a", "bc", 3)
    assert stream(stops=["abc", "bc"]).push(list(b"abc")) == Piece("", "abc", 3)


def test_txt4_not_before_min_tokens() -> None:
    text = stream(stops=["b"], min_tokens=3)
    assert text.push(list(b"ab")) == Piece("ab", None, 2)
    assert text.push(list(b"b")) == Piece("", "b", 1)


def test_txt5_held_text_by_reason() -> None:
    for reason, left in (("length", "EN"), ("stop", "EN"), ("content_filter", "")):
        text = stream(stops=["END"])
        assert text.push(list(b"aEN")).text == "a"
        assert text.flush(reason) == left  # type: ignore[arg-type]


def test_special_tokens_are_shown_only_when_asked_for() -> None:
    assert stream().push([65, SPECIAL, 66]).text == "AB"
    assert stream(skip_special=False).push([65, SPECIAL, 66]).text == "A<|end|>B"


def test_opening_space_of_sentencepiece() -> None:
    for prompt, shown in (([], "Hi Hi"), ([SPECIAL], "Hi Hi"), ([65], " Hi Hi")):
        tokenizer = Alphabet(b" Hi", opens_with_space=True)
        assert stream(tokenizer, prompt_ids=prompt).push([257, 257]).text == shown
    assert stream(Alphabet(b" Hi"), prompt_ids=[]).push([257]).text == " Hi"
