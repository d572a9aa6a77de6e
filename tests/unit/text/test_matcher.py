"""The stop matcher: earliest completion, list order, minimal hold-back (TXT-4)."""

import pytest

from galley.runtime.text.matcher import Matcher


def states(matcher: Matcher, text: str) -> list[int]:
    state, seen = 0, []
    for char in text:
        state = matcher.step(state, char)
        seen.append(state)
    return seen


def test_txt4_holds_back_the_longest_proper_prefix_only() -> None:
    matcher = Matcher(["abcd", "bcx"])
    assert [matcher.held[s] for s in states(matcher, "zabcab")] == [0, 1, 2, 3, 1, 2]
    assert [matcher.held[s] for s in states(matcher, "abcq")] == [1, 2, 3, 0]
    # "abc" fails at "x" as abcd, but its tail "bc" goes on as bcx.
    assert matcher.match(states(matcher, "abcx")[-1]) == 1


def test_txt4_ties_go_by_list_order() -> None:
    assert Matcher(["b", "ab"]).match(states(Matcher(["b", "ab"]), "ab")[-1]) == 0
    assert Matcher(["ab", "b"]).match(states(Matcher(["ab", "b"]), "ab")[-1]) == 0
    assert Matcher(["x", "b", "ab"]).match(states(Matcher(["x", "b", "ab"]), "ab")[-1]) == 1
    assert Matcher(["a", "a"]).match(states(Matcher(["a", "a"]), "a")[-1]) == 0


def test_empty_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Matcher(["a", ""])
