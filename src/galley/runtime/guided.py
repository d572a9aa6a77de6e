"""Guided decoding: what the user wants an output to look like, compiled to a Guide by ``llguidance``.

The engine underneath (https://github.com/guidance-ai/llguidance) walks an Earley parser over regular lexemes
along a trie of the vocabulary. It comes with the optional extra ``guided`` and is imported when first needed.
"""

import hashlib
import json
import re
from array import array
from collections import OrderedDict
from threading import Lock
from typing import Any

import msgspec

from galley.errors import GuideFailed, InvalidRequest
from galley.model.tokenizer import Tokenizer
from galley.runtime.schema import blame, unenforced
from galley.types import StructuredOutputs

__all__ = ["Compiled", "Compiler", "GrammarGuide", "Thinking", "guided_missing"]

MAX_SOURCE = 1 << 19
"""Characters of a schema, a grammar or all choices together."""
MAX_CHOICES = 4096
JSON_STYLE: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is written on one line, as ``json.dumps`` has it, and as tool-calling models are trained to. So its
punctuation is forced and costs no draws, and no model can write white space until the context is full."""
EXACT = {"lenient": False, "coerce_one_of": False, "json_allowed_escapes": 'nrbtf\\"'}
"""Nothing relaxed, whatever a schema's own ``x-guidance`` says. No ``\\u`` escapes: two of them can be one
character, and then its length would be counted wrong."""


def guided_missing() -> str | None:
    """Why nothing can be guided here, or None."""
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        return f"structured output needs the package llguidance ({error})"
    return None


class Words:
    """Our tokenizer as ``llguidance`` wants to see it: the bytes of every id, and the ids of a text."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self._tokenizer = tokenizer
        # Logits may be padded beyond the tokens: no bytes, never allowed.
        self.tokens = [b""] * vocab
        self.special_token_ids = []
        for token in range(tokenizer.vocab_size):
            raw = tokenizer.token_bytes(token)
            if tokenizer.is_special(token):
                raw = tokenizer.token_str(token).encode()
                self.special_token_ids.append(token)
            self.tokens[token] = raw
        self.eos_token_id = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
        self.bos_token_id = tokenizer.bos_id

    def __call__(self, text: str) -> list[int]:
        """Ids of a text in the middle of a text."""
        return self._tokenizer.encode_inner(text)


class Thinking(msgspec.Struct, frozen=True):
    """Reasoning that may come before the answer (GRM-5), as the model writes it.

    ``opened``: the prompt ends within it. Otherwise the model may open it, or answer at once.
    """

    begin: str
    end: str
    opened: bool


class Compiled:
    """One compiled grammar. ``guide`` makes a fresh Guide of it; any thread may.

    Attributes:
        relaxed: what of the schema is not enforced, in words by path. Empty under ``strict``.
    """

    def __init__(self, matcher: Any, words: int, relaxed: dict[str, str]) -> None:
        self.relaxed = relaxed
        self._matcher = matcher
        self._words = words
        self._lock = Lock()

    def guide(self) -> "GrammarGuide":
        """A guide at the beginning of an output."""
        with self._lock:
            return GrammarGuide(self._matcher.deep_copy(), self._words)


class GrammarGuide:
    """Satisfies ``Guide``. ``words`` is the length of a mask row."""

    __slots__ = ("_matcher", "_words")

    def __init__(self, matcher: Any, words: int) -> None:
        self._matcher = matcher
        self._words = words

    @property
    def ended(self) -> bool:
        return bool(self._matcher.is_stopped())

    def begin(self, most: int) -> list[int]:
        forced = self._forced(most + 1)
        if len(forced) > most or self._closes(forced):
            forced = forced[: max(0, min(most, len(forced) - 1))]
        self._take(forced)
        return forced

    def accept(self, token: int, most: int) -> list[int]:
        self._take([token])
        if most < 1 or self.ended:
            return []
        forced = self._forced(most)[:most]
        self._take(forced)
        return forced

    def fill(self, masks: "array[int]", row: int) -> None:
        size = self._words * masks.itemsize
        address, length = masks.buffer_info()
        if (row + 1) * self._words > length:
            raise ValueError(f"row {row} lies outside {length} words of masks")
        self._matcher.unsafe_compute_mask_ptr(address + row * size, size)
        if self._matcher.is_error():
            raise self._fault("no mask")

    def rollback(self, count: int) -> None:
        if count and not self._matcher.rollback(count):
            raise self._fault(f"no way back of {count} tokens")

    def _forced(self, most: int) -> list[int]:
        if most < 1:
            return []
        forced: list[int] = self._matcher.compute_ff_tokens()
        if self._matcher.is_error():
            raise self._fault("no forced tokens")
        return forced

    def _closes(self, forced: list[int]) -> bool:
        """Whether these tokens complete the grammar."""
        if not forced:
            return False
        self._take(forced)
        ended = self.ended
        self.rollback(len(forced))
        return ended

    def _take(self, tokens: list[int]) -> None:
        if tokens and not self._matcher.consume_tokens(tokens):
            raise self._fault(f"token {tokens} was not allowed")

    def _fault(self, what: str) -> GuideFailed:
        why = self._matcher.get_error().partition("\n")[0]
        return GuideFailed(f"the grammar cannot be followed further: {what}. {why}"[:1000])


class Compiler:
    """Compiles grammars for one tokenizer, and keeps the last ones. Any thread may use it; compile where
    waiting harms nobody, for a large schema takes tens of milliseconds (GRM-1).

    Args:
        vocab: ids of the model's logits, at least those of the tokenizer.
        size: compiled grammars kept; the least recently used goes.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, *, size: int = 128) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self.compiled = 0
        """Grammars compiled since start; what the cache had does not count."""
        self.vocab = vocab
        self._kept: OrderedDict[str, Compiled] = OrderedDict()
        self._lock = Lock()
        self._engine: Any = None

    def compile(
        self,
        wanted: StructuredOutputs,
        *,
        thinking: Thinking | None = None,
        calls: str = "",
        param: str = "structured_outputs",
    ) -> Compiled:
        """The grammar of what is wanted, from the cache if it was compiled before.

        Raises InvalidRequest: ``missing_dependency`` without llguidance, ``invalid_json_schema`` naming the
        path of a keyword that cannot be enforced, ``invalid_grammar`` for what cannot be compiled or is too
        large. ``param`` is where the request holds it; ``calls`` are rules of which ``calls`` may be there
        in place of the answer.
        """
        try:
            described = json.dumps([msgspec.to_builtins(wanted), msgspec.to_builtins(thinking), calls])
        except (RecursionError, ValueError) as error:
            raise refuse(f"it cannot be read: {error}", param) from None
        if len(described) > MAX_SOURCE:
            raise refuse(f"it has more than {MAX_SOURCE} characters", param)
        key = hashlib.sha256(f"{self.tokenizer.digest} {self.vocab} {described}".encode()).hexdigest()
        with self._lock:
            known = self._kept.get(key)
            if known is not None:
                self._kept.move_to_end(key)
                return known
        made = self._make(wanted, self._top(thinking, calls), param)
        with self._lock:
            self.compiled += 1
            self._kept[key] = made
            while len(self._kept) > self.size:
                self._kept.popitem(last=False)
        return made

    def literal(self, text: str) -> str:
        """A marker in the Lark dialect: control tokens by their id, all else as text."""
        parts = []
        for segment in self.tokenizer.segments(text):
            token = isinstance(segment, int) and self.tokenizer.is_special(segment)
            spelled = segment if isinstance(segment, str) else self.tokenizer.token_str(segment)
            parts.append(f"<[{segment}]>" if token else json.dumps(spelled, ensure_ascii=False))
        return " ".join(parts)

    def _top(self, thinking: Thinking | None, calls: str) -> str:
        """A grammar around the answer, empty when there is nothing around it."""
        if thinking is None and not calls:
            return ""
        lead = "thinking " if thinking is not None else ""
        start = f"start: {lead}{'(calls | @answer)' if calls else '@answer'}\n"
        return start + calls + (self.thought(thinking) if thinking is not None else "")

    def thought(self, thinking: Thinking) -> str:
        """Lark rules of which ``thinking`` is reasoning and the white space after it."""
        if self.literal(thinking.end).startswith("<["):
            thought = f"thought: /(?s:.*)/ {self.literal(thinking.end)}\n"
        else:
            stop = re.escape(thinking.end).replace("/", "\\/")
            thought = f"thought[lazy]: /(?s:.*){stop}/\n"
        lead = "thought" if thinking.opened else f"({self.literal(thinking.begin)} thought)?"
        return f"thinking: {lead} GAP\nGAP: /[\\n ]{{0,4}}/\n{thought}"

    def _make(self, wanted: StructuredOutputs, top: str, param: str) -> Compiled:
        why = guided_missing()
        if why is not None:
            raise InvalidRequest(
                why, param=param, code="missing_dependency", hint="pip install 'galley[guided]' on the server"
            )
        relaxed: dict[str, str] = {}
        if wanted.json is not None or wanted.json_object:
            schema: Any = {"type": "object"} if wanted.json_object else self._schema(wanted.json, param)
            matcher = self._json(schema, top, wanted, param, relaxed)
        else:
            matcher = self._match({"lark_grammar": self._lark(wanted, param)}, top)
            if matcher.is_error():
                raise refuse(matcher.get_error(), param)
        return Compiled(matcher, -(-self.vocab // 32), relaxed)

    def _lark(self, wanted: StructuredOutputs, param: str) -> str:
        if wanted.grammar is not None:
            return wanted.grammar
        if wanted.choice is not None:
            return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in wanted.choice)
        if wanted.regex is None:
            raise refuse("it asks for nothing", param)
        return (
            "start: /"
            + re.sub(r"\\.|/|\n", lambda found: SLASHED.get(found[0], found[0]), wanted.regex)
            + "/"
        )

    def _schema(self, given: Any, param: str) -> Any:
        """The schema as an object; one that came as text is parsed."""
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError) as error:
                raise refuse(f"it is not JSON: {error}", param) from None
        if not isinstance(given, dict | bool):
            raise refuse("a schema is an object or a boolean", param)
        return given

    def _json(
        self,
        schema: Any,
        top: str,
        wanted: StructuredOutputs,
        param: str,
        relaxed: dict[str, str],
    ) -> Any:
        """Compile a schema. Without ``strict``, what cannot be enforced is taken out and noted."""
        style = JSON_STYLE
        if wanted.whitespace_pattern is not None:
            style = {"whitespace_pattern": wanted.whitespace_pattern}
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        schema = json.loads(json.dumps(schema))
        while True:
            styled = {**schema, "x-guidance": {**style, **EXACT}}
            blamed = unenforced(schema) if wanted.strict else []
            message = blamed[0].why if blamed else ""
            if not blamed:
                matcher = self._match({"json_schema": styled}, top)
                if not matcher.is_error():
                    return matcher
                message = matcher.get_error()
                blamed = blame(schema, message)
            path = ".".join([param, *blamed[0].path]) if blamed else param
            if wanted.strict or not blamed:
                raise InvalidRequest(
                    f"the schema cannot be enforced: {message.strip()[:600]} (at {path})",
                    param=path,
                    code="invalid_json_schema",
                    hint="leave it out, or say strict: false" if wanted.strict and blamed else None,
                )
            for place in blamed:
                relaxed[".".join([param, *place.path])] = place.take_out()

    def _match(self, answer: dict[str, Any], top: str) -> Any:
        import llguidance

        with self._lock:
            if self._engine is None:
                words: Any = Words(self.tokenizer, self.vocab)
                self._engine = llguidance.LLTokenizer(words, eos_token=list(self.tokenizer.eos_ids) or None)
        grammars = [{"lark_grammar": top}, {"name": "answer", **answer}] if top else [answer]
        limits = llguidance.LLParserLimits(verbose_errors=False)
        return llguidance.LLMatcher(
            self._engine, json.dumps({"grammars": grammars}), log_level=0, limits=limits
        )


SLASHED = {"/": "\\/", "\n": "\\n"}


def refuse(why: str, param: str) -> InvalidRequest:
    """The 400 for a grammar."""
    return InvalidRequest(
        f"the grammar cannot be used: {why.strip()[:1000]}", param=param, code="invalid_grammar"
    )
