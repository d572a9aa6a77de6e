"""`galley market`: book, curve, simulate."""

import json

import pytest

from galley.cli.main import invoke

CATALOG = """
[policy]
location = "any"
[market]
sheets = ["lots.toml"]
[[model]]
id = "m"
"""
LOTS = """
simulated = true
[[lot]]
id = "steady"
provider = "cloud"
model = "m"
capacity = 3
to = 2099-01-01T00:00:00Z
region = "eu"
ttft_ms = 300
price = { input = "2", cached = "0.5", output = "8" }
[[lot]]
id = "loose"
provider = "cloud"
model = "m"
capacity = 1
to = 2099-01-01T00:00:00Z
second = "0.0007"
prefill_tps = 20000
decode_tps = 1000
preemptible = true
notice_s = 120
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "catalog.toml").write_text(CATALOG)
    (tmp_path / "lots.toml").write_text(LOTS)
    monkeypatch.setenv("GALLEY_HOME", str(tmp_path))
    monkeypatch.setenv("GALLEY_CATALOG", str(tmp_path / "catalog.toml"))
    return tmp_path


def test_book_is_ordered_by_expected_price_and_says_why_not(home, capsys):
    assert invoke(["market", "book", "--cached", "1000", "--region", "eu", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["simulation"] is True and shown["faults"] == []
    assert [(lot["lot"], lot["refused"] is None) for lot in shown["lots"]] == [
        ("steady", True),
        ("loose", False),
    ]
    # 2000 x 2 + 1000 x 0.5 + 1000 x 8 dollars a million tokens
    assert shown["lots"][0]["expected_pico"] == str(12_500 * 10**6)
    assert "region" in shown["lots"][1]["refused"]
    assert invoke(["market", "book"]) == 0
    text = capsys.readouterr().out
    assert "SIMULATED" in text and text.index("loose") < text.index("steady")


def test_curve_has_four_horizons_and_never_rises(home, capsys):
    assert invoke(["market", "curve", "--model", "m", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [point["within_s"] for point in shown["points"]] == [0, 3600, 28800, 86400]
    prices = [int(point["pico"]) for point in shown["points"]]
    assert prices == sorted(prices, reverse=True) and shown["points"][0]["lot"] == "loose"
    assert invoke(["market", "curve", "--model", "m", "--max-usd", "0.000001"]) == 0
    assert "nothing on the book" in capsys.readouterr().out
    assert invoke(["market", "curve", "--model", "m", "--max-usd", "much"]) == 2


def test_a_catalog_without_a_market_is_told(home, capsys):
    (home / "catalog.toml").write_text('[[model]]\nid = "m"\n')
    assert invoke(["market", "book"]) == 2
    assert "[market]" in capsys.readouterr().err


def test_simulate_says_so_and_repeats_itself(home, capsys):
    outputs = []
    for _ in range(2):
        assert invoke(["market", "simulate", "--days", "1", "--seeds", "1", "--json"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    shown = json.loads(outputs[0])
    assert shown["simulation"] is True and "SIMULATION" in shown["label"] and shown["missed"] == 0
    assert 0 < shown["saving"]["median"] < 1
