"""From another API's words to those of chat completions: one reader checks both, by one set of rules."""

from collections.abc import Mapping
from typing import Any

from galley.errors import GalleyError, InvalidRequest

__all__ = ["rename_path", "renamed"]


def rename_path(path: str, names: Mapping[str, str]) -> str:
    """A chat path in the caller's words; the longest name that fits wins.

    ``names`` maps prefixes (``messages[2]`` or ``response_format``) to what the caller wrote.
    """
    best = ""
    for name in names:
        rest = path[len(name) :]
        if path.startswith(name) and (not rest or rest[0] in ".[") and len(name) > len(best):
            best = name
    return names[best] + path[len(best) :] if best else path


def renamed(error: GalleyError, names: Mapping[str, str]) -> GalleyError:
    """The same error in the caller's words, message included."""
    if not isinstance(error, InvalidRequest) or error.param is None:
        return error
    path = rename_path(error.param, names)
    if path != error.param:
        quoted = error.message.replace(f"'{error.param}'", f"'{path}'")
        error.message, error.param = quoted, path
        error.args = (quoted,)
    return error


def rename_all(paths: list[str], names: Mapping[str, str]) -> list[str]:
    """Paths in the caller's words."""
    return [rename_path(path, names) for path in paths]


def rename_keys(notes: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Notes by path, in the caller's words."""
    return {rename_path(path, names): note for path, note in notes.items()}
