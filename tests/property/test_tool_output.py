"""TXT-6: any split of any output gives the same pieces, and nothing of a text is lost."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from galley.runtime.text.output import joined
from tests.unit.text.corpus import CORPUS, Golden
from tests.unit.text.test_output import RECORDS, meaning, read

SCRAPS = [golden.said for golden in CORPUS] + [
    "<",
    "{",
    "}",
    '"',
    "\n",
    " ",
    "[",
    "]",
    "<think>",
    "</think>",
    "x",
    "🙂",
]


def cut(text: str, places: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in itertools.pairwise(borders)]


@st.composite
def outputs(draw: st.DrawFn) -> Golden:
    """A corpus text with pieces of it lost, doubled or mixed with others, in any format."""
    record = draw(st.sampled_from(sorted(RECORDS)))
    mine = [golden.said for golden in CORPUS if golden.record == record]
    parts = draw(st.lists(st.sampled_from(mine * 3 + SCRAPS), min_size=1, max_size=3))
    text = "".join(parts)
    start = draw(st.integers(0, len(text) // 2))
    end = draw(st.integers(start, len(text)))
    said = draw(st.sampled_from([text, text[start:end], text[:start] + text[end:]]))
    finish = draw(st.sampled_from(["stop", "length"]))
    return Golden(
        "any", record, said, [], finish=finish, think=draw(st.booleans()), opened=draw(st.booleans())
    )


@settings(max_examples=400, deadline=None)
@given(outputs(), st.lists(st.integers(0, 10_000), max_size=12))
def test_txt6_any_split_gives_the_same_pieces(golden: Golden, places: list[int]) -> None:
    whole = joined(read(golden, [golden.said]))
    assert joined(read(golden, cut(golden.said, places))) == whole
    assert joined(read(golden, list(golden.said))) == whole


@settings(max_examples=200, deadline=None)
@given(outputs())
def test_txt6_no_call_means_no_loss(golden: Golden) -> None:
    """Where nothing was read as a call, every character but white space and markers of thought is shown."""
    text, reasoning, calls, _ = meaning(read(golden, [golden.said]))
    if calls or golden.record == "harmony":
        return
    shown = "".join((reasoning + text).split())
    said = golden.said
    for marker in ("<think>", "</think>", "[THINK]", "[/THINK]", "<｜tool▁calls▁end｜>"):
        said, shown = said.replace(marker, ""), shown.replace(marker, "")
    assert sorted(shown) == sorted("".join(said.split()))
