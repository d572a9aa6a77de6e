"""Tables and markers."""

from pathlib import Path

import pytest
from benchmarks.report import markdown_table, replace_between


def test_table_aligns_and_refuses_ragged_rows() -> None:
    assert markdown_table(["a", "bb"], [["xyz", "1"]]).splitlines() == [
        "| a   | bb |",
        "| --- | -: |",
        "| xyz |  1 |",
    ]
    with pytest.raises(ValueError, match="cells"):
        markdown_table(["a", "b"], [["only one"]])


def test_only_the_text_between_the_markers_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    for _ in range(2):
        replace_between(page, "speed", "new\ntext")
        assert page.read_text() == "before\n<!-- speed -->\nnew\ntext\n<!-- /speed -->\nafter\n"


@pytest.mark.parametrize(
    "body",
    ["nothing", "<!-- speed -->", "<!-- /speed --><!-- speed -->", "<!-- speed -->" * 2 + "<!-- /speed -->"],
)
def test_missing_or_doubled_markers_are_an_error(tmp_path: Path, body: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(body)
    with pytest.raises(ValueError, match="speed"):
        replace_between(page, "speed", "x")
    assert page.read_text() == body
