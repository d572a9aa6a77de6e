"""Providers that fail, stall, rate-limit, lie and die on a seeded script, one of them killed again and again:
clients must see no error before the commit point while one is up, and never a wrong or doubled answer."""

from scripts.chaos import chaos


async def test_short_chaos():
    told = await chaos(requests=400, concurrency=8, kill_every_s=0.7, seed=5)
    assert told["errors_before_commit"] == 0, told
    assert told["wrong_answers"] == told["silently_cut"] == told["without_receipt"] == 0, told
    assert told["cut_with_error"] > 0, "the script must also break answers in the middle"
    assert told["extra_calls"] <= 0.25 * told["requests"], told
