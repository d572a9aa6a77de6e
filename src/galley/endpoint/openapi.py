"""This server's own OpenAPI 3.1 document, at ``/openapi.json``.

Written by hand beside the readers: shapes and ranges that a client can rely on. Where a reader looks deeper
than the document says, the answer is a 400 that names the place.
"""

from typing import Any

from galley import __version__

__all__ = ["document"]

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
YES: Schema = {"type": "boolean"}
ANY: Schema = {"type": "object"}


def maybe(schema: Schema) -> Schema:
    """The schema, or null: null counts as absent everywhere."""
    return {"anyOf": [schema, {"type": "null"}]}


def ranged(kind: str, low: float, high: float) -> Schema:
    """An optional number in a range."""
    return maybe({"type": kind, "minimum": low, "maximum": high})


def obj(required: str = "", **properties: Schema) -> Schema:
    """An object; further fields are allowed, and named in a header where they have no effect."""
    return {"type": "object", "required": required.split(), "properties": properties}


def array(items: Schema, **more: Any) -> Schema:
    """An array."""
    return {"type": "array", "items": items, **more}


def ref(name: str) -> Schema:
    """A named schema."""
    return {"$ref": f"#/components/schemas/{name}"}


SAMPLING: dict[str, Schema] = {
    "max_tokens": maybe({"type": "integer", "minimum": 1}),
    "n": ranged("integer", 1, 16),
    "temperature": ranged("number", 0, 2),
    "top_p": ranged("number", 0, 1),
    "top_k": maybe({"type": "integer", "minimum": -1}),
    "min_p": ranged("number", 0, 1),
    "frequency_penalty": ranged("number", -2, 2),
    "presence_penalty": ranged("number", -2, 2),
    "repetition_penalty": ranged("number", 0.01, 10),
    "seed": ranged("integer", -(2**63), 2**64 - 1),
    "stop": maybe({"anyOf": [TEXT, array(TEXT, maxItems=16)]}),
    "logit_bias": maybe({"type": "object", "additionalProperties": {"type": "number"}}),
    "stream": maybe(YES),
    "stream_options": maybe(ANY),
    "service_tier": maybe({"enum": ["auto", "default", "flex", "scale", "priority", "fast"]}),
    "store": maybe(YES),
    "metadata": maybe({"type": "object", "additionalProperties": TEXT, "maxProperties": 16}),
    "user": maybe({"type": "string", "maxLength": 512}),
}

PART = obj("type", type=TEXT, text=TEXT)
CONTENT: Schema = {"anyOf": [TEXT, array(PART, minItems=1), {"type": "null"}]}
MESSAGE = obj("role", role=TEXT, content=CONTENT)
USAGE = obj("prompt_tokens completion_tokens total_tokens", prompt_tokens=WHOLE, completion_tokens=WHOLE)

SCHEMAS: dict[str, Schema] = {
    "Error": obj(
        "error",
        error=obj("message type param code", message=TEXT, type=TEXT, param=maybe(TEXT), code=maybe(TEXT)),
    ),
    "AnthropicError": obj(
        "type error", type={"const": "error"}, error=obj("type message", type=TEXT, message=TEXT)
    ),
    "ChatRequest": obj(
        "model messages",
        model={"type": "string", "maxLength": 512},
        messages=array(MESSAGE, minItems=1),
        max_completion_tokens=maybe({"type": "integer", "minimum": 1}),
        logprobs=maybe(YES),
        top_logprobs=ranged("integer", 0, 20),
        **SAMPLING,
    ),
    "CompletionRequest": obj(
        "model prompt",
        model={"type": "string", "maxLength": 512},
        prompt={"anyOf": [TEXT, array(TEXT, minItems=1), array(WHOLE), array(array(WHOLE), minItems=1)]},
        echo=maybe(YES),
        logprobs=ranged("integer", 0, 20),
        **{**SAMPLING, "max_tokens": maybe({"type": "integer", "minimum": 0})},
    ),
    "EmbeddingRequest": obj(
        "model input",
        model={"type": "string", "maxLength": 512},
        input={
            "anyOf": [
                {"type": "string", "minLength": 1},
                array({"type": "string", "minLength": 1}, minItems=1, maxItems=2048),
                array(WHOLE, minItems=1),
                array(array(WHOLE, minItems=1), minItems=1, maxItems=2048),
            ]
        },
        encoding_format=maybe({"enum": ["float", "base64"]}),
        dimensions=maybe({"type": "integer", "minimum": 1}),
        user=SAMPLING["user"],
    ),
    "Embeddings": obj(
        "object data model usage",
        object={"const": "list"},
        data=array(
            obj("object index embedding", index=WHOLE, embedding={"anyOf": [array(NUMBER), TEXT]}),
        ),
        usage=obj("prompt_tokens total_tokens", prompt_tokens=WHOLE, total_tokens=WHOLE),
    ),
    "ResponseRequest": obj(
        "model",
        model={"type": "string", "maxLength": 512},
        input=maybe({"anyOf": [TEXT, array(ANY)]}),
        instructions=maybe(TEXT),
        previous_response_id=maybe(TEXT),
        max_output_tokens=maybe({"type": "integer", "minimum": 1}),
        background=maybe(YES),
        **{name: SAMPLING[name] for name in ("temperature", "top_p", "stream", "store", "metadata", "user")},
    ),
    "MessagesRequest": obj(
        "model messages max_tokens",
        model={"type": "string", "maxLength": 512},
        max_tokens={"type": "integer", "minimum": 1},
        messages=array(obj("role content", role={"enum": ["user", "assistant", "system"]}), minItems=1),
        system=maybe({"anyOf": [TEXT, array(PART)]}),
        stop_sequences=maybe(array(TEXT)),
        temperature=ranged("number", 0, 1),
        top_p=ranged("number", 0, 1),
        stream=maybe(YES),
    ),
    "Chat": obj(
        "id object created model choices usage",
        id=TEXT,
        object={"const": "chat.completion"},
        choices=array(obj("index message finish_reason", index=WHOLE, message=ANY)),
        usage=USAGE,
    ),
    "Completion": obj(
        "id object created model choices usage",
        object={"const": "text_completion"},
        choices=array(obj("index text finish_reason", index=WHOLE, text=TEXT)),
        usage=USAGE,
    ),
    "Response": obj(
        "id object created_at status output model",
        object={"const": "response"},
        status={"enum": ["completed", "incomplete", "failed", "in_progress", "queued", "cancelled"]},
        output=array(obj("id type", id=TEXT, type=TEXT)),
    ),
    "Message": obj(
        "id type role content model stop_reason usage",
        type={"const": "message"},
        content=array(obj("type", type=TEXT)),
        usage=obj("input_tokens output_tokens", input_tokens=WHOLE, output_tokens=WHOLE),
    ),
    "Model": obj(
        "id object created owned_by max_model_len location capabilities price",
        object={"const": "model"},
        created=WHOLE,
        max_model_len=WHOLE,
        capabilities=array(TEXT),
        price=maybe(ANY),
    ),
    "List": obj("object data", object={"const": "list"}, data=array(ANY), has_more=YES),
    "Deleted": obj("id deleted", id=TEXT, deleted={"const": True}),
    "Key": obj(
        "object id name hint scopes models created",
        object={"const": "key"},
        scopes=array({"enum": ["inference", "batch", "receipts", "admin"]}),
        models=array(TEXT),
    ),
    "KeyRequest": obj(
        "",
        name=maybe({"type": "string", "maxLength": 100}),
        scopes=maybe(array({"enum": ["inference", "batch", "receipts", "admin"]}, maxItems=4)),
        models=maybe(array({"type": "string", "maxLength": 512})),
        expires_in_days=maybe({"type": "number", "exclusiveMinimum": 0, "maximum": 36_500}),
    ),
    "File": obj("id object bytes created_at filename purpose", object={"const": "file"}, bytes=WHOLE),
    "FileRequest": obj(
        "file purpose", file={"type": "string", "format": "binary"}, purpose={"const": "batch"}
    ),
    "Batch": obj(
        "id object endpoint input_file_id completion_window status created_at request_counts",
        object={"const": "batch"},
        status=TEXT,
        request_counts=obj("total completed failed", total=WHOLE, completed=WHOLE, failed=WHOLE),
    ),
    "BatchRequest": obj(
        "input_file_id endpoint completion_window",
        input_file_id={"type": "string", "maxLength": 128},
        endpoint={"enum": ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]},
        completion_window={"enum": ["1h", "4h", "24h"]},
        metadata=SAMPLING["metadata"],
    ),
    "TokenizeRequest": obj("", model=maybe(TEXT), prompt=maybe(TEXT), add_special_tokens=maybe(YES)),
    "Tokens": obj("tokens count max_model_len", tokens=array(WHOLE), count=WHOLE, max_model_len=WHOLE),
    "DetokenizeRequest": obj("tokens", model=maybe(TEXT), tokens=array(WHOLE)),
    "Prompt": obj("prompt", prompt=TEXT),
    "Count": obj("input_tokens", input_tokens=WHOLE),
    "Feedback": obj("object receipt reward created learned", object={"const": "feedback"}, learned=YES),
    "FeedbackRequest": obj(
        "receipt reward",
        receipt={"type": "string", "maxLength": 64},
        reward={"type": "number", "minimum": 0, "maximum": 1},
        comment=maybe({"type": "string", "maxLength": 2000}),
    ),
    "Receipt": obj("id request_id created api model status usage times", id=TEXT, status=TEXT),
    "MetadataRequest": obj("metadata", metadata=SAMPLING["metadata"]),
}

OPERATIONS: tuple[tuple[str, str, str | None, str, int, str], ...] = (
    ("post", "/v1/chat/completions", "ChatRequest", "Chat", 200, "Answer a conversation."),
    ("get", "/v1/chat/completions", None, "List", 200, "List stored completions."),
    ("get", "/v1/chat/completions/{id}", None, "Chat", 200, "A stored completion."),
    ("post", "/v1/chat/completions/{id}", "MetadataRequest", "Chat", 200, "Set its metadata."),
    ("delete", "/v1/chat/completions/{id}", None, "Deleted", 200, "Forget it."),
    ("get", "/v1/chat/completions/{id}/messages", None, "List", 200, "The messages it answered."),
    ("post", "/v1/completions", "CompletionRequest", "Completion", 200, "Continue a text."),
    ("post", "/v1/embeddings", "EmbeddingRequest", "Embeddings", 200, "Turn texts into vectors."),
    ("post", "/v1/responses", "ResponseRequest", "Response", 200, "Answer, with state kept here."),
    ("post", "/v1/responses/input_tokens", "ResponseRequest", "Count", 200, "Count a prompt's tokens."),
    ("get", "/v1/responses/{id}", None, "Response", 200, "A stored response."),
    ("delete", "/v1/responses/{id}", None, "Deleted", 200, "Forget it."),
    ("post", "/v1/responses/{id}/cancel", None, "Response", 200, "Stop a background response."),
    ("get", "/v1/responses/{id}/input_items", None, "List", 200, "What it answered."),
    ("post", "/v1/messages", "MessagesRequest", "Message", 200, "Answer, in Anthropic's form."),
    ("post", "/v1/messages/count_tokens", "MessagesRequest", "Count", 200, "Count a prompt's tokens."),
    ("get", "/v1/models", None, "List", 200, "Models served."),
    ("get", "/v1/models/{id}", None, "Model", 200, "One model."),
    ("get", "/v1/files", None, "List", 200, "List files."),
    ("post", "/v1/files", "FileRequest", "File", 200, "Upload a file."),
    ("get", "/v1/files/{id}", None, "File", 200, "A file."),
    ("get", "/v1/files/{id}/content", None, "", 200, "Its bytes."),
    ("delete", "/v1/files/{id}", None, "Deleted", 200, "Delete it."),
    ("get", "/v1/batches", None, "List", 200, "List batches."),
    ("post", "/v1/batches", "BatchRequest", "Batch", 200, "Begin a batch."),
    ("get", "/v1/batches/{id}", None, "Batch", 200, "A batch."),
    ("post", "/v1/batches/{id}/cancel", None, "Batch", 200, "Stop it."),
    ("get", "/v1/keys", None, "List", 200, "List API keys."),
    ("post", "/v1/keys", "KeyRequest", "Key", 201, "Make an API key."),
    ("delete", "/v1/keys/{id}", None, "Key", 200, "Revoke it."),
    ("get", "/v1/receipts", None, "List", 200, "List receipts."),
    ("get", "/v1/receipts/{id}", None, "Receipt", 200, "A receipt."),
    ("post", "/v1/feedback", "FeedbackRequest", "Feedback", 201, "What an answer was worth."),
    ("post", "/tokenize", "TokenizeRequest", "Tokens", 200, "Text to token ids."),
    ("post", "/detokenize", "DetokenizeRequest", "Prompt", 200, "Token ids to text."),
    ("post", "/apply-template", "ChatRequest", "Prompt", 200, "The prompt a conversation becomes."),
)
REFUSALS = {
    400: "The request is wrong.",
    401: "No key, or a wrong one.",
    403: "Not allowed.",
    404: "Not here.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    500: "A fault of this server.",
    503: "No room now.",
    529: "No room now.",
}
PAGED = ("limit", "after", "order")
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


def document() -> dict[str, Any]:
    """The document as JSON-safe objects."""
    paths: dict[str, Any] = {}
    for method, path, asked, answered, status, summary in OPERATIONS:
        paths.setdefault(path, {})[method] = operation(
            method, path, asked, answered, status=status, summary=summary
        )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Galley", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def operation(
    method: str, path: str, asked: str | None, answered: str, *, status: int, summary: str
) -> dict[str, Any]:
    """One operation object."""
    anthropic = path.startswith("/v1/messages")
    content: dict[str, Any] = {"application/octet-stream": {}}
    if answered:
        content = {"application/json": {"schema": ref(answered)}}
    if method == "post" and path in STREAMED:
        content["text/event-stream"] = {"schema": TEXT}
    error = {"application/json": {"schema": ref("AnthropicError" if anthropic else "Error")}}
    responses: dict[str, Any] = {str(status): {"description": "Done.", "content": content}}
    for code, why in REFUSALS.items():
        if (code == 529) == anthropic or code not in (503, 529):
            responses[str(code)] = {"description": why, "content": error}
    found: dict[str, Any] = {"summary": summary, "responses": responses}
    parameters: list[dict[str, Any]] = []
    if "{id}" in path:
        schema = {"type": "string", "minLength": 1}
        parameters.append({"name": "id", "in": "path", "required": True, "schema": schema})
    if answered == "List" and path != "/v1/models":
        names = ("limit",) if path in ("/v1/receipts",) else PAGED
        for name in names:
            schema = {"type": "integer", "minimum": 1, "maximum": 100} if name == "limit" else dict(TEXT)
            if name == "order":
                schema = {"enum": ["asc", "desc"]}
            parameters.append({"name": name, "in": "query", "schema": schema})
    if parameters:
        found["parameters"] = parameters
    if asked is not None:
        sort = "multipart/form-data" if asked == "FileRequest" else "application/json"
        found["requestBody"] = {"required": True, "content": {sort: {"schema": ref(asked)}}}
    return found
