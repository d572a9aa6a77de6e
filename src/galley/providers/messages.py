"""Conversations given in Python, held to what the HTTP door holds them to."""

from collections.abc import Iterable
from typing import Any

from galley.errors import InvalidRequest

__all__ = ["RESERVED", "read_messages", "refuse_reserved"]

ROLES = ("system", "developer", "user", "assistant")
RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "tokenizer", "self")
)
"""Variables a chat template gets anyway."""


def refuse_reserved(names: Iterable[str], param: str) -> None:
    """Raises InvalidRequest for a template variable that may not be set by the user."""
    for name in names:
        if not isinstance(name, str) or name in RESERVED or not name.isidentifier():
            raise InvalidRequest(f"{str(name)[:64]!r} may not be set here.", param=param)


def read_messages(given: Any, place: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The messages as a template takes them, and what was changed, by path.

    ``developer`` is read as ``system``; an assistant's missing content as empty. Raises InvalidRequest with
    the path of what is wrong, beginning with ``place``.
    """
    if not isinstance(given, list | tuple):
        raise _wrong(place, "a list of messages", given)
    if not given:
        raise InvalidRequest(f"{place!r} must not be empty.", param=place, code="empty_array")
    read: list[dict[str, Any]] = []
    changed: dict[str, str] = {}
    for number, message in enumerate(given):
        path = f"{place}[{number}]"
        if not isinstance(message, dict):
            raise _wrong(path, "a dict", message)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InvalidRequest(
                f"Invalid value for '{path}.role': {str(role)[:100]!r}. Allowed: {', '.join(ROLES)}.",
                param=f"{path}.role",
            )
        if role == "developer":
            changed[f"{path}.role"] = "developer read as system"
            role = "system"
        if content is None and role == "assistant":
            content = ""
        if content is None:
            message_text = f"Missing required parameter: '{path}.content'."
            raise InvalidRequest(message_text, param=f"{path}.content", code="missing_required_parameter")
        read.append({**message, "role": role, "content": content})
    return read, changed


def _wrong(path: str, wanted: str, value: object) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid type for {path!r}: expected {wanted}, got {type(value).__name__}.",
        param=path,
        code="invalid_type",
    )
