"""What an upstream's refusal, or the reason it gives for ending, means to us."""

import contextlib
import math
import time
from collections.abc import Mapping

import msgspec

from galley.errors import Upstream, UpstreamKind
from galley.types import FinishReason

__all__ = ["classify", "failure", "reason", "retry_after"]


def failure(kind: UpstreamKind, provider: str, why: str) -> Upstream:
    """An Upstream error that names its provider."""
    return Upstream(why, kind=kind, provider=provider)


def classify(provider: str, status: int, headers: Mapping[str, str], raw: bytes) -> Upstream:
    """What a refusal means for retrying. The body's own words are kept, cut at 500 characters."""
    code, words = "", raw[:500].decode("utf-8", "replace")
    with contextlib.suppress(msgspec.DecodeError, AttributeError, TypeError):
        body = msgspec.json.decode(raw)
        error = body.get("error", body)
        if isinstance(error, dict):
            code = str(error.get("code") or error.get("type") or "")
            words = str(error.get("message") or words)[:500]
        elif isinstance(error, str):
            words = error[:500]
    kind: UpstreamKind
    if status == 429:
        kind = "rate"
    elif status in (401, 402, 403):
        kind = "auth"
    elif status in (408, 409, 425) or status >= 500:
        kind = "server"
    elif "context" in code or "context length" in words.lower():
        kind = "context"
    elif "content" in code and ("filter" in code or "policy" in code):
        kind = "content"
    elif status in (301, 302, 303, 307, 308):
        kind, words = "protocol", f"redirected to {headers.get('location', 'nowhere')}"
    else:
        kind = "request"
    # An upstream's 401 speaks of our key, not of the client's: its words stay out of the answer.
    message = f"answered {status}" + ("" if kind == "auth" else f": {words}")
    return Upstream(
        message, kind=kind, provider=provider, upstream_status=status, retry_after_s=retry_after(headers)
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from ``retry-after-ms`` or ``retry-after`` (seconds or an HTTP date); None when absent or
    senseless. Never negative."""
    with contextlib.suppress(ValueError):
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
    given = headers.get("retry-after")
    if given is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(given)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    from email.utils import parsedate_to_datetime

    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    return None


REASONS: Mapping[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "max_tokens": "length",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_calls": "tool_calls",
    "tool_use": "tool_calls",
    "content_filter": "content_filter",
    "refusal": "content_filter",
    "eos": "stop",
}
"""Finish reasons of the wire."""


def reason(provider: str, word: object) -> FinishReason:
    """Raises GalleyError (protocol) for a reason nobody has heard of: passing it on as ``stop`` would lie."""
    found = REASONS.get(word) if isinstance(word, str) else None
    if found is None:
        raise failure("protocol", provider, f"finish reason {word!r}")
    return found
