"""TXT-1 and TXT-4 for any ids, any stops, any split into steps."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from galley.runtime.text.stream import TextStream
from tests.unit.text.alphabet import SPECIAL, Alphabet

TOKENS = Alphabet(b"ab", b" a", "é🙂".encode(), "👩‍👩‍👧".encode()[:9], "ไท".encode()[1:4], b"\xff\xc3", b"ba")
PIECES = ["ab", "a", "b", "é", "🙂", "ไทย", "汉字", " ", "👩‍👩‍👧", "\ufffd"]
wild = st.lists(st.integers(0, 256 + len(TOKENS.tokens)), max_size=40)
texts = st.lists(st.sampled_from(PIECES), max_size=20).map(lambda p: list("".join(p).encode()))
ids_of = st.one_of(wild, texts, st.lists(st.sampled_from([97, 98, 257, 258, 263, SPECIAL]), max_size=40))
stop_lists = st.lists(st.text(alphabet="ab é🙂", min_size=1, max_size=4), max_size=4)


def play(
    ids: list[int],
    cuts: list[int],
    *,
    stops: list[str],
    include: bool = False,
    least: int = 0,
    skip: bool = True,
) -> tuple[str, str | None, int]:
    text = TextStream(
        TOKENS, prompt_ids=[65], skip_special=skip, stops=stops, include_stop=include, min_tokens=least
    )
    out, kept = "", 0
    borders = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(borders):
        piece = text.push(ids[start:end])
        out += piece.text
        kept += piece.kept
        if piece.stop is not None:
            assert text.flush("stop") == ""
            return out, piece.stop, kept
    return out + text.flush("length"), None, kept


@settings(max_examples=300, deadline=None)
@given(ids_of, st.lists(st.integers(0, 100)), st.booleans())
def test_txt1_any_split_equals_the_whole_decode(ids: list[int], cuts: list[int], skip: bool) -> None:
    assert play(ids, cuts, stops=[], skip=skip) == (TOKENS.decode(ids, skip), None, len(ids))


@settings(max_examples=400, deadline=None)
@given(ids_of, st.lists(st.integers(0, 100)), stop_lists, st.booleans(), st.integers(0, 12))
def test_txt4_any_split_equals_one_by_one(
    ids: list[int], cuts: list[int], stops: list[str], include: bool, least: int
) -> None:
    one_by_one = play(ids, list(range(len(ids))), stops=stops, include=include, least=least)
    assert play(ids, cuts, stops=stops, include=include, least=least) == one_by_one


@settings(max_examples=400, deadline=None)
@given(texts, stop_lists, st.booleans())
def test_txt4_equals_a_plain_search(ids: list[int], stops: list[str], include: bool) -> None:
    whole = TOKENS.decode(ids)
    # (where it completes, list order) of every occurrence; the least wins.
    ends = [
        (at + len(stop), order, stop)
        for order, stop in enumerate(stops)
        for at in range(len(whole))
        if whole.startswith(stop, at)
    ]
    found = play(ids, [], stops=stops, include=include)
    if not ends:
        assert found == (whole, None, len(ids))
    else:
        end, _, stop = min(ends)
        assert found == (whole[: end if include else end - len(stop)], stop, len(whole[:end].encode()))
