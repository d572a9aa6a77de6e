"""From the places a request marks in its messages to numbers of prompt tokens."""

from collections.abc import Callable, Sequence
from typing import Any

from galley.errors import TemplateError
from galley.types import CacheBreakpoint, CacheHint, Request

__all__ = ["cache_hint"]

Encode = Callable[[list[dict[str, Any]]], list[int]]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items are equal."""
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return min(len(a), len(b))


def end_of(mark: CacheBreakpoint, messages: Sequence[dict[str, Any]], ids: list[int], encode: Encode) -> int:
    """Prompt tokens before a breakpoint: what the prompt has in common with one that ends there.

    Works with any template, since it compares what the template makes. Raises TemplateError when the template
    does not take a conversation that ends there.
    """
    here = messages[mark.message]
    text = here.get("content")
    cut = {**here, "content": text[: mark.chars]} if isinstance(text, str) else here
    return common(ids, encode([*messages[: mark.message], cut]))


def cache_hint(
    request: Request, ids: list[int], encode: Encode, adjusted: dict[str, str]
) -> CacheHint | None:
    """What a prompt asks of the prefix cache; None when nothing. What cannot be had is told in ``adjusted``.

    Args:
        encode: messages to ids, without a generation prompt.
    """
    ends: dict[int, int] = {}
    for mark in request.cache_breakpoints:
        try:
            end = end_of(mark, request.messages or [], ids, encode)
        except TemplateError:
            adjusted[f"messages[{mark.message}].cache_control"] = "the template does not show where it ends"
            continue
        ends[end] = max(ends.get(end, 0), mark.ttl_s)
    if request.cache_ttl_s is not None:
        ends[len(ids)] = max(ends.get(len(ids), 0), request.cache_ttl_s)
    ends.pop(0, None)
    soon = bool(ends) or request.cache_key is not None
    if not soon and not request.cache_memory_only:
        return None
    return CacheHint(ends=tuple(sorted(ends.items())), soon=soon, memory_only=request.cache_memory_only)
