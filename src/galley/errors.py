"""One family of typed errors. Every surface (HTTP, CLI, Python) renders these and nothing else.

Shape on the wire follows the OpenAI specification: ``{"error": {message, type, param, code}}``, all four
keys always present, ``code`` a string or null.
"""

from typing import Any, Literal


class GalleyError(Exception):
    """Base of all errors Galley raises on purpose.

    Attributes:
        status: HTTP status.
        type: OpenAI error type, e.g. ``invalid_request_error``.
        code: stable machine-readable string, or None.
        param: dotted path of the offending parameter, or None.
        retryable: whether the same call may succeed later.
        retry_after_s: seconds to wait, when known.
        hint: what to do about it (shown by the CLI and as ``x-galley-hint``).
        extra: further JSON-safe fields placed beside the four keys.
        exit_code: CLI exit code (0 ok, 1 fault, 2 usage, 3 model missing, 4 context, 5 policy, 6 upstream).
    """

    status: int = 500
    type: str = "server_error"
    code: str | None = "server_error"
    retryable: bool = False
    exit_code: int = 1

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        hint: str | None = None,
        retry_after_s: float | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        self.param = param
        self.hint = hint
        self.retry_after_s = retry_after_s
        self.extra = extra or {}

    def body(self) -> dict[str, Any]:
        """The OpenAI error object. Messages are cut at 2 kB so that an echo cannot amplify."""
        message = self.message if len(self.message) <= 2000 else self.message[:1997] + "..."
        return {
            "error": {
                "message": message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                **self.extra,
            }
        }


class InvalidRequest(GalleyError):
    """The caller's input is wrong; the same call will fail again."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"
    exit_code = 2


class UnsupportedParameter(InvalidRequest):
    """A parameter that would change the answer and that Galley does not implement."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus requested output does not fit the model's context. Never truncated."""

    code = "context_length_exceeded"
    exit_code = 4

    def __init__(
        self, *, prompt_tokens: int, max_tokens: int | None, context: int, param: str | None
    ) -> None:
        asked = (
            f"{prompt_tokens} in the prompt and {max_tokens} for the completion"
            if max_tokens
            else f"{prompt_tokens} in the prompt, which leaves none for the completion"
        )
        super().__init__(
            f"This model's maximum context length is {context} tokens. However, you requested {asked}.",
            param=param,
            extra={"n_prompt_tokens": prompt_tokens, "n_ctx": context, "max_tokens": max_tokens},
        )


class ModelNotFound(GalleyError):
    """No such model here. ``nearest`` names close ones."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"
    exit_code = 3

    def __init__(self, name: str, *, nearest: list[str] | None = None, hint: str | None = None) -> None:
        near = f" Nearest: {', '.join(nearest)}." if nearest else ""
        super().__init__(f"The model {name!r} does not exist here.{near}", param="model", hint=hint)


class NotFound(GalleyError):
    """A named object (receipt, route) does not exist."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"
    exit_code = 2


class AuthenticationError(GalleyError):
    """No key or a wrong key."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    exit_code = 5


class PermissionDenied(GalleyError):
    """The key is good but may not do this."""

    status = 403
    type = "permission_error"
    code = "permission_denied"
    exit_code = 5


class PayloadTooLarge(InvalidRequest):
    """Body over the configured limit."""

    code = "request_too_large"


class RequestTimeout(InvalidRequest):
    """The body did not arrive in time."""

    status = 408
    code = "request_timeout"
    retryable = True


class Overloaded(GalleyError):
    """No room now: queue full, draining, or loading."""

    status = 503
    type = "server_error"
    code = "overloaded"
    retryable = True


class TooManyRequests(Overloaded):
    """This caller has more waiting than its share of the machine; others are still let in."""

    status = 429
    type = "requests"
    code = "rate_limit_exceeded"


class DeadlineExceeded(GalleyError):
    """``max_queue_s`` (503, may be tried again) or ``max_total_s`` (504, the caller's own limit) ran out;
    or, of no ``kind``, the server's own."""

    status = 503
    type = "server_error"
    code = "deadline_exceeded"
    retryable = True

    def __init__(
        self,
        message: str,
        *,
        kind: Literal["queue", "total"] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, param=kind and f"max_{kind}_s", retry_after_s=retry_after_s)
        if kind == "total":
            # The same call would take as long again: clients must not repeat it unasked.
            self.status = 504
            self.retryable = False


class BadModelFile(GalleyError):
    """A model file is damaged, truncated, hostile or of an unsupported kind.

    ``path`` and ``field`` name the place.
    """

    status = 500
    type = "server_error"
    code = "bad_model_file"
    exit_code = 3

    def __init__(self, path: str, field: str, problem: str, *, hint: str | None = None) -> None:
        super().__init__(f"{path}: {field}: {problem}", hint=hint)
        self.path = path
        self.field = field


class AdapterRefused(GalleyError):
    """A LoRA adapter is not one of this model, or asks for more than is done here."""

    status = 400
    type = "invalid_request_error"
    code = "unsupported_adapter"
    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, param="lora_path", hint=hint)


class TemplateError(GalleyError):
    """The chat template failed. 400 when the messages caused it (``param='messages'``), else 500."""

    code = "template_error"

    def __init__(self, message: str, *, by_messages: bool) -> None:
        super().__init__(message, param="messages" if by_messages else None)
        if by_messages:
            self.status = 400
            self.type = "invalid_request_error"


class GuideFailed(GalleyError):
    """The grammar of a structured output could not be followed further; its job alone ends with this."""

    code = "guide_failed"


class ConfigError(GalleyError):
    """A configuration value is unknown, malformed or out of range; names its origin."""

    status = 500
    code = "bad_config"
    exit_code = 2


class CacheFull(GalleyError):
    """A prefix cannot be kept on disk beside what is pinned or held there already."""

    status = 507
    code = "cache_full"
    exit_code = 1


class EngineFault(GalleyError):
    """A native step failed; only the jobs in that step end with this."""

    code = "engine_fault"
    retryable = True


class PolicyRefused(GalleyError):
    """Nothing may serve this request under the policy in force. ``extra`` says why, one by one."""

    status = 403
    type = "invalid_request_error"
    code = "no_eligible_model"
    exit_code = 5


UpstreamKind = Literal[
    "network", "timeout", "protocol", "server", "rate", "auth", "request", "context", "content", "cut", "open"
]


class Upstream(GalleyError):
    """Another server failed us. ``kind`` is its retry class:

    network, timeout, protocol (a reply that makes no sense), server (5xx): may be tried again;
    rate (429), open (the breaker is open): later, or elsewhere; auth (401, 402, 403): elsewhere only;
    request, context, content (other 4xx): the same everywhere, so never;
    cut: the stream broke after its first output: never, the client has part of an answer.
    """

    status = 502
    type = "api_error"
    code = "upstream_error"
    retryable = True
    exit_code = 6

    def __init__(
        self,
        message: str,
        *,
        kind: UpstreamKind,
        provider: str = "",
        upstream_status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(
            f"{provider}: {message}" if provider else message,
            code={"server": "upstream_error", "context": "context_length_exceeded"}.get(
                kind, f"upstream_{kind}"
            ),
            retry_after_s=retry_after_s,
            extra={"provider": provider} if provider else None,
        )
        self.kind: UpstreamKind = kind
        self.upstream_status = upstream_status
        if kind in ("request", "context", "content"):
            self.status, self.type, self.retryable = 400, "invalid_request_error", False
        elif kind == "rate":
            self.status, self.type = 429, "rate_limit_error"
        elif kind in ("timeout",):
            self.status = 504
        elif kind == "open":
            self.status, self.type = 503, "server_error"
