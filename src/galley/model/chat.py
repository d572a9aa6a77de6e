"""Chat templates: messages to the text, or the token ids, a model was trained to read.

Two promises. A template is a stranger's program and runs bounded (``chat_sandbox``). And **what a user
wrote is never read as a control token**, even through a template: while rendering for ``encode``, a
sentinel character that occurs nowhere in the request sits inside every control token spelled in user text.
The rendered text is cut at the control tokens that remain, which are the template's own; then the
sentinels go, and each piece is tokenised whole, as plain text. For ordinary messages no sentinel is needed
and the ids are those of tokenising the whole rendered text at once.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes

from galley.errors import InvalidRequest, TemplateError
from galley.model.chat_limits import Allowance, LimitError
from galley.model.chat_sandbox import MAX_SOURCE, BoundedEnvironment, RefusalError
from galley.model.tokenizer import Tokenizer

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

_FINGERPRINTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("llama3", ("<|start_header_id|>",)),
    ("llama4", ("<|header_start|>",)),
    ("chatml", ("<|im_start|>",)),
    ("harmony", ("<|channel|>",)),
    ("deepseek", ("<｜User｜>",)),
    ("gemma", ("<start_of_turn>",)),
    ("command-r", ("<|START_OF_TURN_TOKEN|>",)),
    ("phi3", ("<|user|>", "<|end|>")),
    ("granite", ("<|start_of_role|>",)),
    ("zephyr", ("<|user|>",)),
    ("llama2", ("[INST]", "<<SYS>>")),
    ("mistral", ("[INST]",)),
    ("alpaca", ("### Instruction",)),
)
"""Formats by strings their templates hold; the first whose strings are all there names it."""

_TRUSTED: dict[str, frozenset[str]] = {
    "role": ROLES,
    "type": frozenset(
        {"function", "text", "object", "string", "number", "integer", "boolean", "array", "null"}
    ),
}
"""Words of the API itself, by key. Templates compare with them, and build control tokens of roles."""

_MAX_DEPTH = 100
_MIN_CHARS = 1 << 20


class ChatTemplate:
    """One compiled template. Any number of threads may use it at once.

    Attributes:
        source: the template. digest: its sha256. name: the chat format, e.g. ``chatml``, else ``custom``.
    """

    def __init__(
        self,
        source: str,
        bos_token: str = "",
        eos_token: str = "",
        *,
        seconds: float = 2.0,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Compile. Raises TemplateError (500) for a template that is malformed or not allowed.

        Args:
            seconds: the longest one rendering may take.
            now: the clock behind ``strftime_now``.
        """
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self.name = next((n for n, marks in _FINGERPRINTS if all(mark in source for mark in marks)), "custom")
        self._seconds = seconds
        self._environment = BoundedEnvironment(now)
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template is over {MAX_SOURCE} characters", by_messages=False)
        try:
            tree = self._environment.parse(source)
            self._template = self._environment.from_string(source)
        except (JinjaError, LimitError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise TemplateError(
                f"the chat template cannot be compiled: {error}", by_messages=False
            ) from error
        self._wants_parts = _wants_parts(tree)
        self._knows_developer = "developer" in source

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt as text, for people to read; ``encode`` is what a model should be given.

        Raises:
            InvalidRequest: a message is malformed (``param`` says where).
            TemplateError: 400 when these messages are the cause (the template refuses them, or fails on
                them but not on a plain question), else 500; also when a limit is passed.
        """
        values = {"tools": tools, **kwargs, "messages": self._checked(messages)}
        return self._run({**values, "add_generation_prompt": add_generation_prompt})

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """The prompt as ids; control tokens come from the template alone. Raises as ``render`` does.

        No bos is added: the template writes it where the model wants it.
        """
        values = {"tools": tools, **kwargs, "messages": self._checked(messages)}
        guard = _Guard(tokenizer.controls, values, self.source)
        more = {"add_generation_prompt": add_generation_prompt}
        segments = tokenizer.segments(self._run({**guard.marked(values), **more}))
        if guard.suspicious:
            # A template may cut, join or replace until harmless pieces spell a token. So render again with
            # the text broken at every letter a token could begin or end with: the template's own tokens are
            # all that can be left then. If the two disagree, the broken one is right.
            broken = tokenizer.segments(self._run({**guard.broken(values), **more}))
            if _ids(broken) != _ids(segments):
                segments = broken
        return tokenizer.encode_segments(guard.cleaned(segments))

    def _run(self, values: dict[str, Any]) -> str:
        size = sum(map(len, _strings(values)))
        allowance = Allowance(_MIN_CHARS + 8 * size, self._seconds)
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        try:
            return self._environment.stream(self._template, allowance, tokens | values)
        except RefusalError as error:
            raise TemplateError(
                f"the chat template refuses these messages: {error}", by_messages=True
            ) from error
        except Exception as error:
            raise TemplateError(
                f"the chat template failed: {type(error).__name__}: {error}", by_messages=self._runs_plainly()
            ) from error

    def _runs_plainly(self) -> bool:
        """Whether the template can render a plain question: if so, a failure is the messages' doing."""
        content: Any = [{"type": "text", "text": "hi"}] if self._wants_parts else "hi"
        values = {
            "messages": [{"role": "user", "content": content}],
            "tools": None,
            "add_generation_prompt": True,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        }
        try:
            self._environment.stream(self._template, Allowance(_MIN_CHARS, min(self._seconds, 0.2)), values)
        except Exception:
            # The error being reported is the first one; this run only tells whose fault that was.
            return False
        return True

    def _checked(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages in the shape templates expect: content a string (or parts), arguments parsed."""
        if not messages:
            raise InvalidRequest("messages is empty", param="messages")
        checked = []
        for index, message in enumerate(messages):
            where = f"messages[{index}]"
            if not isinstance(message, dict):
                raise InvalidRequest(f"{where} is not an object", param=where, code="invalid_type")
            role = message.get("role")
            if role not in ROLES:
                roles = ", ".join(sorted(ROLES))
                raise InvalidRequest(
                    f"{where}.role is {role!r}; it must be one of {roles}", param=f"{where}.role"
                )
            if role == "developer" and not self._knows_developer:
                role = "system"
            fixed = {**message, "role": role, "content": self._content(message.get("content"), where)}
            if message.get("tool_calls"):
                fixed["tool_calls"] = _with_parsed_arguments(message["tool_calls"], f"{where}.tool_calls")
            checked.append(fixed)
        return checked

    def _content(self, content: Any, where: str) -> Any:
        """Text parts are joined by a line break, unless the template loops over parts itself."""
        if content is None:
            content = ""
        if isinstance(content, list):
            texts = []
            for index, part in enumerate(content):
                at = f"{where}.content[{index}]"
                kind = part.get("type") if isinstance(part, dict) else None
                if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
                    message = f"{at}.type is {kind!r}: this model reads text parts only"
                    raise InvalidRequest(message, param=f"{at}.type", code="unsupported_content")
                texts.append(part[kind])
            content = "\n".join(texts)
        if not isinstance(content, str):
            message = f"{where}.content must be a string or a list of parts"
            raise InvalidRequest(message, param=f"{where}.content", code="invalid_type")
        return [{"type": "text", "text": content}] if self._wants_parts else content


def _with_parsed_arguments(calls: Any, where: str) -> list[Any]:
    """The API carries a call's arguments as a JSON string, templates expect the object it spells."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InvalidRequest(f"{where} must be a list of objects", param=where, code="invalid_type")
    parsed = []
    for call in calls:
        function = call.get("function")
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if isinstance(function, dict) and isinstance(arguments, str):
            try:
                value = json.loads(arguments)
            except (ValueError, RecursionError):
                # Models do write broken JSON; the history must be able to show it back to them as it was.
                value = arguments
            spelled = value if isinstance(value, dict) else arguments
            parsed.append({**call, "function": {**function, "arguments": spelled}})
        else:
            parsed.append(call)
    return parsed


def _wants_parts(tree: nodes.Template) -> bool:
    """Whether the template loops over ``content`` and never asks whether it is a string."""

    def is_content(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        return (
            isinstance(node, nodes.Getitem)
            and isinstance(node.arg, nodes.Const)
            and bool(node.arg.value == "content")
        )

    loops = any(
        any(is_content(n) for n in [loop.iter, *_arguments(loop.iter)]) for loop in tree.find_all(nodes.For)
    )
    asks = any(test.name in ("string", "iterable") for test in tree.find_all(nodes.Test))
    return loops and not asks


def _arguments(node: nodes.Node) -> list[nodes.Expr]:
    return node.args if isinstance(node, nodes.Call) else []


def _ids(segments: list[str | int]) -> list[int]:
    return [segment for segment in segments if isinstance(segment, int)]


def _trusted(key: Any, value: Any) -> bool:
    return key in _TRUSTED and isinstance(value, str) and value in _TRUSTED[key]


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    """Every string a request brought, keys included, save the trusted ones."""
    if depth > _MAX_DEPTH:
        raise InvalidRequest(f"messages or tools nest deeper than {_MAX_DEPTH}", param="messages")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(key, str):
                yield key
            if not _trusted(key, inner):
                yield from _strings(inner, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner, depth + 1)


def _mapped(value: Any, change: Callable[[str], str], rename: Callable[[str], str]) -> Any:
    """``value`` with every string changed, and every key renamed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            rename(key) if isinstance(key, str) else key: (
                inner if _trusted(key, inner) else _mapped(inner, change, rename)
            )
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_mapped(inner, change, rename) for inner in value]
    return value


class _Guard:
    """Keeps control tokens spelled in one request's text from being read as such."""

    def __init__(self, controls: frozenset[str], values: dict[str, Any], source: str) -> None:
        self._source = source
        self._texts = list(_strings(values))
        self.sentinel = self._unused()
        ordered = sorted(controls, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        ends = "".join(sorted({token[0] for token in ordered} | {token[-1] for token in ordered}))
        self._ends = re.compile(f"[{re.escape(ends)}]") if ends else None
        self._inner = "\n".join(ordered)
        self.suspicious = any(self._could_take_part(text) for text in self._texts)

    def _unused(self) -> str:
        """A private-use character that is nowhere in the request, and that nobody can guess."""
        while True:
            letter = chr(0x100000 + secrets.randbelow(0xFFFE))
            if not any(letter in text for text in self._texts):
                return letter

    def _inside(self, text: str) -> bool:
        """Whether a template could make a token by writing ``<|`` before and ``|>`` after this text."""
        core = text.strip()
        return bool(core) and core in self._inner

    def _could_take_part(self, text: str) -> bool:
        """Whether a token could begin in, end in or be built around this text."""
        return self._ends is not None and (self._ends.search(text) is not None or self._inside(text))

    def _mark(self, text: str) -> str:
        if self._spelled is None:
            return text
        # After the first character: the token is broken, and what precedes it keeps its neighbour.
        return self._spelled.sub(lambda match: match.group()[0] + self.sentinel + match.group()[1:], text)

    def _break(self, text: str) -> str:
        if self._ends is None:
            return text
        broken = self._ends.sub(lambda match: self.sentinel + match.group() + self.sentinel, text)
        return self.sentinel + broken + self.sentinel if self._inside(text) else broken

    def _break_key(self, key: str) -> str:
        # A key the template names must stay for it to find; the template's own text holds no sentinel.
        return key if self._ends is None or key in self._source else self._break(key)

    def marked(self, values: dict[str, Any]) -> dict[str, Any]:
        return {key: _mapped(value, self._mark, self._mark) for key, value in values.items()}

    def broken(self, values: dict[str, Any]) -> dict[str, Any]:
        return {key: _mapped(value, self._break, self._break_key) for key, value in values.items()}

    def cleaned(self, segments: list[str | int]) -> list[str | int]:
        """Segments without sentinels."""
        return [s if isinstance(s, int) else s.replace(self.sentinel, "") for s in segments]
