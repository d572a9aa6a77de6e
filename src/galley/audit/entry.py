"""What an entry of the audit log says: the leaf of one request, built from its receipt.

Canonical JSON: keys sorted, no white space, UTF-8, no floating-point numbers (those are text). It holds no
prompt, no output, no name of a person: ids, digests, counts and keyed commitments. docs/AUDIT.md has every
field.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from galley.audit.subjects import Subject, Subjects, canonical
from galley.audit.tiles import MOST
from galley.types import Delta, Receipt, Request

__all__ = ["Spoken", "begin_entry", "erasure_entry", "request_entry", "spoken"]

VERSION = 1
SYSTEM = ("system", "developer")
LONGEST = 200
"""Characters of a name or a reason that an entry repeats; longer ones are cut, with a mark."""


class Spoken(msgspec.Struct, frozen=True):
    """What one choice said."""

    text: str
    reasoning: str
    calls: list[dict[str, str]]
    ids: list[int]


def spoken(pieces: Mapping[int, Sequence[Delta]]) -> dict[int, Spoken]:
    """The pieces of each choice put together. Calls that were retracted are none."""
    found = {}
    for index, deltas in sorted(pieces.items()):
        calls: dict[int, dict[str, str]] = {}
        for delta in deltas:
            for piece in delta.tool_calls:
                if piece.retracted:
                    calls.pop(piece.index, None)
                    continue
                call = calls.setdefault(piece.index, {"name": piece.name or "", "arguments": ""})
                call["arguments"] += piece.arguments
        found[index] = Spoken(
            text="".join(delta.text for delta in deltas),
            reasoning="".join(delta.reasoning for delta in deltas),
            calls=list(calls.values()),
            ids=[id for delta in deltas for id in delta.token_ids],
        )
    return found


def asked(request: Request) -> dict[str, Any]:
    """What the prompt was made of: the thing the prompt's commitment is to."""
    return {
        "messages": request.messages,
        "prompts": request.prompts,
        "tools": request.tools,
        "template_kwargs": request.template_kwargs,
    }


def short(text: str) -> str:
    """At most LONGEST characters, with a mark where it was cut."""
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def actor(receipt_key: str | None, subject: Subject) -> dict[str, Any]:
    """Who asked: the API key's id, and the subject under its random id."""
    return {"key": receipt_key, "subject": subject.id}


def route_of(receipt: Receipt) -> dict[str, Any] | None:
    route = receipt.route
    if route is None:
        return None
    return {
        "provider": route.provider,
        "rule": short(route.rule),
        "reason": short(route.reason),
        "location": route.location,
        "scores": {short(name): f"{score:.6g}" for name, score in sorted(route.scores.items())[:16]},
        "propensity": f"{route.propensity:.6g}",
        "candidates": [short(name) for name in route.candidates[:16]],
        "price_version": route.price_version,
        "quote_pico": None if route.quote_pico is None else str(route.quote_pico),
    }


def money_of(receipt: Receipt) -> dict[str, Any] | None:
    """Whole pico-dollars as text; None where there is no price (an own engine has none)."""
    if not receipt.price_lines:
        return None
    lines = [
        {
            "kind": line.get("kind"),
            "quantity": line.get("quantity"),
            "pico": str(line.get("pico", 0)),
            "price_version": line.get("price_version"),
        }
        for line in receipt.price_lines[:32]
    ]
    return {"pico": str(sum(line.get("pico", 0) for line in receipt.price_lines)), "lines": lines}


def request_entry(
    receipt: Receipt,
    request: Request,
    said: Mapping[int, Spoken],
    subject: Subject,
    subjects: Subjects,
    *,
    approvals: Sequence[Mapping[str, Any]] = (),
    body: Mapping[str, Any] | None = None,
) -> bytes:
    """The leaf of one request. O(size of prompt and output), for the commitments."""
    system = [m.get("content") for m in request.messages or () if m.get("role") in SYSTEM]
    prompt_version = request.metadata.get("prompt_version")
    joules = receipt.resources.joules
    usage = receipt.usage
    fields: dict[str, Any] = {
        "v": VERSION,
        "type": "request",
        "id": receipt.id,
        "request": short(receipt.request_id),
        "time": int(receipt.created * 1e6),
        "actor": actor(receipt.key, subject),
        "session": subject.commit("session", request.session.encode()) if request.session else None,
        "api": receipt.api,
        "asked_model": short(request.model),
        "model": short(receipt.model),
        "digests": receipt.digests,
        "version": receipt.version,
        "prompt_version": {
            "name": None if prompt_version is None else short(prompt_version),
            "system": subjects.common("system", canonical(system)) if system else None,
        },
        "route": route_of(receipt),
        "attempts": [
            {"provider": a.provider, "model": short(a.model), "outcome": a.outcome, "status": a.status}
            for a in receipt.attempts[:16]
        ],
        "approvals": list(approvals),
        "usage": {
            "prompt": usage.prompt_tokens,
            "cached": usage.cached_tokens,
            "cache_write": usage.cache_write_tokens,
            "completion": usage.completion_tokens,
            "reasoning": usage.reasoning_tokens,
        },
        "money": money_of(receipt),
        "energy_mj": None if joules is None else round(joules * 1000),
        "commit": {
            "prompt": subject.commit("prompt", canonical(asked(request))),
            "output": [
                {
                    "choice": index,
                    "text": subject.commit("output", canonical([each.text, each.reasoning, each.calls])),
                    "tokens": subject.chain(receipt.id, index, each.ids),
                    "count": len(each.ids),
                }
                for index, each in sorted(said.items())
            ],
        },
        "body": body,
        "status": receipt.status,
        "finish": [choice.finish for choice in receipt.choices],
        "error": None
        if receipt.error is None
        else {"code": receipt.error.get("code"), "status": receipt.error.get("status")},
        "seed": str(receipt.params["seed"]) if receipt.params.get("seed") is not None else None,
    }
    entry = canonical(fields)
    if len(entry) > MOST:  # hundreds of choices: one commitment to all of them stands for each
        outputs = fields["commit"]["output"]
        fields["commit"]["output"] = {
            "choices": len(outputs),
            "sha256": subject.commit("outputs", canonical(outputs)),
        }
        fields["finish"] = sorted({str(reason) for reason in fields["finish"]})
        entry = canonical(fields)
    return entry


def begin_entry(request: Request, receipt: str, subject: Subject) -> bytes:
    """Strict mode, before anything runs: that this request was let in. Its ``request`` entry has the rest."""
    return canonical(
        {
            "v": VERSION,
            "type": "begin",
            "id": receipt,
            "time": time.time_ns() // 1000,
            "actor": actor(request.key, subject),
            "api": request.api,
            "asked_model": short(request.model),
        }
    )


def erasure_entry(erased: Mapping[str, Any]) -> bytes:
    """That a subject's key was destroyed: from now on nobody can open what was committed to."""
    return canonical({"v": VERSION, "type": "erasure", "time": erased["time"], "subject": erased["id"]})
