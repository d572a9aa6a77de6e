"""The prompt-caching fields of a request, in the spellings of OpenAI and of Anthropic."""

from typing import Any

from galley.endpoint.wire import Fields, invalid
from galley.types import CacheBreakpoint

__all__ = ["LIFETIMES", "MOST_BREAKPOINTS", "Breakpoints", "read_caching"]

LIFETIMES = {"5m": 300, "30m": 1800, "1h": 3600, "12h": 43_200, "24h": 86_400}
"""Seconds by the name on the wire."""
MOST_BREAKPOINTS = 4


def lifetime(fields: Fields, default: str) -> str:
    """``ttl`` of an object, one of LIFETIMES."""
    return fields.choice("ttl", tuple(LIFETIMES)) or default


def read_control(fields: Fields) -> str | None:
    """``cache_control: {"type": "ephemeral", "ttl": "5m" | "1h" | …}``: its lifetime."""
    control = fields.object("cache_control")
    if control is None:
        return None
    control.need("type")
    control.choice("type", ("ephemeral",))
    return lifetime(control, "5m")


def read_caching(fields: Fields) -> dict[str, Any]:
    """Fields of a Request from ``prompt_cache_key``, ``prompt_cache_retention``, ``prompt_cache_options`` and
    a ``cache_control`` of the whole request; ``ignored`` lists what has no effect."""
    seconds = None
    ignored = []
    retention = fields.choice("prompt_cache_retention", ("in_memory", "24h"))
    if retention == "24h":
        seconds = LIFETIMES["24h"]
    options = fields.object("prompt_cache_options")
    if options is not None:
        ttl = LIFETIMES[lifetime(options, "30m")]
        if options.choice("mode", ("implicit", "explicit")) == "explicit":
            # Prompts are always cached while there is memory; only the lifetime is explicit.
            ignored.append("prompt_cache_options.mode")
        else:
            seconds = max(seconds or 0, ttl)
        ignored += options.rest()
    whole = read_control(fields)
    if whole is not None:
        seconds = max(seconds or 0, LIFETIMES[whole])
    if retention == "in_memory" and seconds is not None:
        raise invalid(
            "'prompt_cache_retention': 'in_memory' and a lifetime on disk exclude each other.",
            "prompt_cache_retention",
            "invalid_value",
        )
    return {
        "cache_key": fields.text("prompt_cache_key", 512),
        "cache_ttl_s": seconds,
        "cache_memory_only": retention == "in_memory",
        "ignored": ignored,
    }


class Breakpoints:
    """The breakpoints inside the messages of one request, in order."""

    def __init__(self, fields: Fields) -> None:
        options = fields.object("prompt_cache_options")
        self._default = lifetime(options, "30m") if options is not None else "30m"
        self._found: list[CacheBreakpoint] = []

    def read(self, part: Fields, message: int, chars: int) -> None:
        """``cache_control`` or ``prompt_cache_breakpoint`` of a content part, or of a message."""
        ttl = read_control(part)
        explicit = part.object("prompt_cache_breakpoint")
        if explicit is not None:
            explicit.need("mode")
            explicit.choice("mode", ("explicit",))
            ttl = lifetime(explicit, self._default)
        if ttl is not None:
            self._found.append(CacheBreakpoint(message=message, chars=chars, ttl=ttl, ttl_s=LIFETIMES[ttl]))

    def last(self, adjusted: dict[str, str]) -> list[CacheBreakpoint]:
        """At most four; earlier ones are left out, and that is told."""
        if len(self._found) > MOST_BREAKPOINTS:
            adjusted["cache_control"] = f"the last {MOST_BREAKPOINTS} of {len(self._found)} breakpoints"
        return self._found[-MOST_BREAKPOINTS:]
