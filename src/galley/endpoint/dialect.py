"""How an error looks on the wire: OpenAI's four keys, Anthropic's envelope or Ollama's line, of one class of
errors."""

from typing import Any, Protocol

from galley.errors import GalleyError

__all__ = ["Anthropic", "Dialect", "Ollama", "OpenAI", "dialect_of"]


class Dialect(Protocol):
    """One family of error shapes."""

    def status(self, error: GalleyError) -> int:
        """The HTTP status."""
        ...

    def body(self, error: GalleyError, request_id: str | None) -> dict[str, Any]:
        """The JSON object."""
        ...


KINDS = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Status to Anthropic's error type."""


class OpenAI:
    """``{"error": {message, type, param, code}}``."""

    def status(self, error: GalleyError) -> int:
        return error.status

    def body(self, error: GalleyError, request_id: str | None) -> dict[str, Any]:
        return error.body()


class Anthropic:
    """``{"type": "error", "error": {"type", "message"}, "request_id"}``; overload is 529, as clients expect.

    ``param`` and ``code`` are kept beside the two keys: they are what a person needs to mend the request.
    """

    def status(self, error: GalleyError) -> int:
        return 529 if error.status == 503 else error.status

    def body(self, error: GalleyError, request_id: str | None) -> dict[str, Any]:
        kind = KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        inner = {key: value for key, value in error.body()["error"].items() if value is not None}
        return {"type": "error", "error": {**inner, "type": kind}, "request_id": request_id}


class Ollama:
    """``{"error": message}``; code and param stand beside it."""

    def status(self, error: GalleyError) -> int:
        return error.status

    def body(self, error: GalleyError, request_id: str | None) -> dict[str, Any]:
        inner = error.body()["error"]
        return {"error": inner["message"], "code": inner["code"], "param": inner["param"]}


def dialect_of(path: str) -> Dialect:
    """The dialect spoken at a path."""
    if path.startswith("/api/"):
        return Ollama()
    return Anthropic() if path == "/v1/messages" or path.startswith("/v1/messages/") else OpenAI()
