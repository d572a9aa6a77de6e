"""How answers end and what they say they used, alike at both doors (TXT-7)."""

import json

import pytest

from galley.errors import GalleyError
from tests.unit.endpoint.fake import FakeProvider

WORDS = ("one ", "two ", "three")


def events(text: str) -> list:
    blocks = [block[6:] for block in text.split("\n\n") if block.startswith("data: ")]
    return [block if block == "[DONE]" else json.loads(block) for block in blocks]


@pytest.mark.parametrize("door", ["chat", "complete"])
@pytest.mark.parametrize(("most", "finish"), [(2, "length"), (None, "stop")])
async def test_txt7_finish_reason_is_the_same_at_both_doors_streamed_or_not(open_desk, door, most, finish):
    desk = open_desk(FakeProvider(WORDS))
    ask = getattr(desk, door)
    whole = (await ask(max_tokens=most)).json()
    streamed = await ask(max_tokens=most, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events(streamed.text)
    assert done == "[DONE]"
    assert whole["choices"][0]["finish_reason"] == finish
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert [reason for reason in reasons if reason] == [finish] and reasons[-1] == finish
    # The last chunk has the usage, and only that; the receipt has the same, asked for or not.
    assert usage["choices"] == [] and all(chunk["usage"] is None for chunk in chunks)
    assert usage["usage"] == whole["usage"]
    assert usage["usage"]["completion_tokens"] == (most or len(WORDS))
    for answer in (streamed, await ask(max_tokens=most, stream=True)):
        receipt = await desk.receipt(answer)
        assert receipt["usage"]["completion_tokens"] == (most or len(WORDS))
        assert receipt["choices"][0]["finish"] == finish


@pytest.mark.parametrize("door", ["chat", "complete"])
async def test_txt7_an_abort_is_an_error_and_no_finish_reason(open_desk, door):
    desk = open_desk(FakeProvider(WORDS, fault=GalleyError("gone", code="cancelled"), fault_at=2))
    ask = getattr(desk, door)
    assert (await ask()).status_code == 500
    streamed = await ask(stream=True, stream_options={"include_usage": True})
    *chunks, last = events(streamed.text)
    assert last["error"]["code"] == "cancelled"
    assert all(choice["finish_reason"] is None for chunk in chunks for choice in chunk["choices"])
    receipt = await desk.receipt(streamed)
    assert receipt["status"] == "cancelled" and receipt["usage"]["completion_tokens"] == 2
