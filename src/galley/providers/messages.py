"""Conversations given in Python, held to what the HTTP door holds them to."""

from collections.abc import Iterable
from typing import Any

from galley.errors import InvalidRequest

__all__ = ["RESERVED", "check_text", "read_messages", "refuse_reserved"]

ROLES = ("system", "developer", "user", "assistant", "tool")
RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "tokenizer", "self")
)
"""Variables a chat template gets anyway."""


def refuse_reserved(names: Iterable[str], param: str) -> None:
    """Raises InvalidRequest for a template variable that may not be set by the user."""
    for name in names:
        if not isinstance(name, str) or name in RESERVED or not name.isidentifier():
            raise InvalidRequest(f"{str(name)[:64]!r} may not be set here.", param=param)


def check_text(text: str, path: str) -> None:
    """Raises InvalidRequest for what is no text: NUL, or half of a surrogate pair."""
    if "\x00" in text:
        raise InvalidRequest(f"{path!r} holds a NUL character.", param=path)
    if any(0xD800 <= ord(char) <= 0xDFFF for char in text):
        raise InvalidRequest(f"{path!r} holds a lone surrogate, which is not text.", param=path)


def read_messages(given: Any, place: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The messages as a template takes them, and what was changed, by path.

    ``developer`` is read as ``system``; an assistant's missing content as empty. An assistant's
    ``tool_calls`` and a tool's ``tool_call_id`` stay as they are given. Raises InvalidRequest with the path
    of what is wrong, beginning with ``place``.
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
        _check_content(content, role, f"{path}.content")
        if message.get("tool_calls") is not None:
            _check_calls(message["tool_calls"], role, f"{path}.tool_calls")
        read.append({**message, "role": role, "content": content})
    return read, changed


def _check_content(content: Any, role: str, path: str) -> None:
    """Text, or parts that hold text; what else a template takes is its own affair, except in turns that are
    put in words."""
    if isinstance(content, str):
        check_text(content, path)
    elif isinstance(content, list):
        for number, part in enumerate(content):
            text = part.get("text") if isinstance(part, dict) else None
            if isinstance(text, str):
                check_text(text, f"{path}[{number}].text")
            elif role == "tool":
                raise _wrong(f"{path}[{number}]", "a part with text", part)
    elif role == "tool":
        raise _wrong(path, "text, or a list of parts with text", content)


def _check_calls(calls: Any, role: str, path: str) -> None:
    """``tool_calls`` as OpenAI has them: of an assistant, each with a function's name and its arguments."""
    if role != "assistant":
        raise InvalidRequest(f"{path!r} belongs to an assistant's message.", param=path)
    if not isinstance(calls, list | tuple):
        raise _wrong(path, "a list of calls", calls)
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise _wrong(f"{path}[{number}].function", "a dict", function)
        if not isinstance(function.get("name"), str):
            raise _wrong(f"{path}[{number}].function.name", "a string", function.get("name"))
        if not isinstance(function.get("arguments"), str | dict):
            where = f"{path}[{number}].function.arguments"
            raise _wrong(where, "JSON text or a dict", function.get("arguments"))


def _wrong(path: str, wanted: str, value: object) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid type for {path!r}: expected {wanted}, got {type(value).__name__}.",
        param=path,
        code="invalid_type",
    )
