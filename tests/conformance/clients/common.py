"""What every client's script needs: where the server is, and what it wrote down about the client."""

import json
import sys
import time
import urllib.request

URL, KEY = sys.argv[1], sys.argv[2]
TOOLS = "tools" in sys.argv[3:]
"""Whether this server reads tools on the chat door."""
TEXT = "Hello wörld"
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "Doubles x.",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
}


SHAPED = "tiny"
"""A real model of random weights: what a schema does not enforce, it does not say."""
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "grün"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 9},
        "sure": {"type": "boolean"},
    },
    "required": ["colour", "size", "sure"],
    "additionalProperties": False,
}


def shaped(found) -> None:
    """Whether an object is what SCHEMA describes, of its every type."""
    assert set(found) == {"colour", "size", "sure"}, found
    assert found["colour"] in ("red", "grün") and type(found["sure"]) is bool, found
    assert type(found["size"]) is int and 0 <= found["size"] <= 9, found


def receipts(model: str) -> list[dict]:
    """What the server recorded for a model, newest first."""
    ask = urllib.request.Request(
        f"{URL}/v1/receipts?model={model}&limit=100", headers={"authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(ask) as answer:
        return json.load(answer)["data"]


def settled(model: str, status: str) -> dict:
    """The newest receipt of a model, once it has that status."""
    for _ in range(200):
        found = receipts(model)
        if found and found[0]["status"] == status:
            return found[0]
        time.sleep(0.02)
    raise AssertionError(f"no {status} receipt of {model}: {[r['status'] for r in found]}")


def raises(kind: type[BaseException], call) -> BaseException:
    """The error a call must raise."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def tried_once(call) -> None:
    """A permanent refusal is asked for once."""
    before = len(receipts("broken"))
    try:
        call()
    except Exception:
        assert len(receipts("broken")) == before + 1, "it was tried again"
        return
    raise AssertionError("the refusal did not raise")
