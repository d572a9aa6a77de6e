"""What a client is told of its limits: ``x-ratelimit-*`` and soft limits crossed."""

from collections.abc import Sequence

from galley.economics.acts import Rate

__all__ = ["limit_headers"]

Headers = list[tuple[bytes, bytes]]


def limit_headers(rates: Sequence[Rate], warnings: Sequence[str] = ()) -> Headers:
    """OpenAI's six headers for what is limited, with the scope each comes from; nothing for what is not."""
    headers: Headers = []
    for rate in rates:
        for name, value in (
            ("limit", str(rate.limit)),
            ("remaining", str(rate.remaining)),
            ("reset", duration(rate.reset_s)),
        ):
            headers.append((f"x-ratelimit-{name}-{rate.resource}".encode(), value.encode()))
        scope = rate.scope.encode("ascii", "replace")
        headers.append((f"x-galley-ratelimit-scope-{rate.resource}".encode(), scope))
    if warnings:
        words = "; ".join(warnings).encode("ascii", "replace")
        headers.append((b"x-galley-budget-warning", words[:2000]))
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``120ms``, ``1.5s``, ``6m0s``, ``3h2m0s``. Rounded up."""
    millis = -int(-seconds * 1000 // 1)
    if millis < 1000:
        return f"{millis}ms"
    if millis < 60_000:
        return f"{millis / 1000:g}s"
    whole = -(-millis // 1000)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return (f"{hours}h" if hours else "") + f"{minutes}m{left}s"
