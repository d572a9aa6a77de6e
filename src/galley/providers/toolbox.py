"""A request's tools and reasoning, as one model's chat format has them."""

import json
import secrets
import string
from typing import Any

from galley.errors import InvalidRequest
from galley.model.model import Model
from galley.providers.reasoning import Reasoning, reasoning_of
from galley.runtime.budget import Budgeted
from galley.runtime.guide import Grammar
from galley.runtime.guided import EXACT, JSON_STYLE, Compiled, Compiler, Thinking, guided_missing
from galley.runtime.sampling.params import check_guided
from galley.runtime.text.formats import GENERIC, detect
from galley.runtime.text.grammar import calls_grammar, free_grammar
from galley.runtime.text.harmony import HarmonyOutput
from galley.runtime.text.output import Output
from galley.types import Request, StructuredOutputs

__all__ = ["Toolbox"]

NOTE = """You may call functions to answer. These are the functions, as JSON:
{tools}
To call one, write nothing but
<tool_call>
{{"name": "the function's name", "arguments": {{"parameter": "value"}}}}
</tool_call>
and write one such block for each call. The results come back within <tool_response> blocks."""
LETTERS = string.ascii_letters + string.digits


class Toolbox:
    """How one model calls tools and reasons. Shared by all requests to it.

    Attributes:
        record: the chat format found in the template.
        shows_tools: the template knows of tools; else they are described in the system message.
        shown: control tokens that mark calls or reasoning, and so must be seen in the text.
    """

    def __init__(self, model: Model, compiler: Compiler) -> None:
        source = model.template.source if model.template is not None else ""
        self.record = detect(source)
        self.shows_tools = "tools" in source
        self._source = source
        self._tokenizer = model.tokenizer
        self.compiler = compiler
        ids = {
            i
            for marker in self.record.markers
            for i in self._tokenizer.segments(marker)
            if isinstance(i, int)
        }
        self.shown = frozenset(i for i in ids if self._tokenizer.is_special(i))

    def messages(self, request: Request) -> list[dict[str, Any]]:
        """The messages as the template is to see them. Where it knows no tools, the tools go into the system
        message, and calls and results of earlier turns into text."""
        out, _ = self.spoken(request.messages or [])
        if self.shows_tools:
            return out
        if request.tools:
            note = NOTE.format(
                tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in request.tools)
            )
            if out and out[0]["role"] == "system":
                out[0] = {**out[0], "content": f"{out[0]['content']}\n\n{note}"}
            else:
                out.insert(0, {"role": "system", "content": note})
        return out

    def spoken(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Messages as the template can show them, calls and results in words where it knows no tools; and
        what was changed."""
        if self.shows_tools:
            return messages, {}
        called = any(m.get("tool_calls") or m.get("role") == "tool" for m in messages)
        told = {"messages": "tool calls and results put in words"} if called else {}
        return [spoken_message(message) for message in messages], told

    def adjusted(self, request: Request) -> dict[str, str]:
        """What was changed or cannot be kept, in words by parameter."""
        if request.messages is None:
            return {}
        unkept = self.unkept(request)
        kept = {} if unkept is None else dict([unkept])
        kept |= self.reasoning(request).told
        if self.shows_tools:
            return kept
        _, told = self.spoken(request.messages)
        if request.tools:
            told["tools"] = "described in the system message: the chat template knows no tools"
        return told | kept

    def reasons_already(self, prompt: list[int]) -> bool:
        """Whether the prompt ends within the model's reasoning."""
        think = self.record.think
        if think is None:
            return False
        tail = self._tokenizer.decode(prompt[-64:], skip_special=False)
        return tail.rfind(think[0]) > tail.rfind(think[1])

    def answers_already(self, prompt: list[int]) -> bool:
        """Whether the prompt ends with reasoning that is over: the template switched it off."""
        think = self.record.think
        if think is None:
            return True
        return self._tokenizer.decode(prompt[-64:], skip_special=False).rstrip().endswith(think[1])

    def thinking(self, prompt: list[int]) -> Thinking | None:
        """Reasoning that may come before an answer to this prompt."""
        think = self.record.think
        if think is None or self.answers_already(prompt):
            return None
        return Thinking(think[0], think[1], self.reasons_already(prompt))

    def reasoning(self, request: Request) -> Reasoning:
        """What the request's wish for reasoning comes to. Raises InvalidRequest as ``reasoning_of``."""
        return reasoning_of(self.record, self._source, request)

    def compile(self, request: Request, prompt: list[int]) -> Grammar | None:
        """The grammar that the request asks for, if any: of calls, or of structured output, and the bound on
        its reasoning. Blocks while it compiles. Raises InvalidRequest as ``Compiler.compile``."""
        grammar = self._grammar(request, prompt)
        think, budget = self.record.think, self.reasoning(request).budget
        if budget is None or think is None or request.messages is None or self.answers_already(prompt):
            return grammar
        return Budgeted(
            grammar,
            markers=think,
            close=self._ids(think[1]),
            budget=budget,
            opened=self.reasons_already(prompt),
            text_of=self._text_of,
            vocab=self.compiler.vocab,
        )

    def _ids(self, marker: str) -> list[int]:
        """The ids a model would write a marker with."""
        ids: list[int] = []
        for segment in self._tokenizer.segments(marker):
            ids += [segment] if isinstance(segment, int) else self._tokenizer.encode_inner(segment)
        return ids

    def _text_of(self, token: int) -> bytes:
        tokenizer = self._tokenizer
        return (
            tokenizer.token_str(token).encode()
            if tokenizer.is_special(token)
            else tokenizer.token_bytes(token)
        )

    def _grammar(self, request: Request, prompt: list[int]) -> Compiled | None:
        wanted = request.params.structured_outputs
        thinking = self.thinking(prompt) if request.messages is not None else None
        path = request.structured_path or "structured_outputs"
        lead, rules = ("thinking ", self.compiler.thought(thinking)) if thinking is not None else ("", "")
        if request.tools and request.tool_choice in ("auto", "none") and wanted is None:
            free = self._lazily(request)
            if not free:
                return None
            grammar = StructuredOutputs(grammar=f"start: {lead}free\n{free}{rules}")
            return self.compiler.compile(grammar, param="tools")
        if not request.tools or request.tool_choice == "none":
            return None if wanted is None else self.compiler.compile(wanted, thinking=thinking, param=path)
        if request.tool_choice == "auto":
            assert wanted is not None
            return self.compiler.compile(wanted, thinking=thinking, calls=self._calls(request), param=path)
        if wanted is not None:
            raise InvalidRequest(
                "A call is required, so there is no answer to give a form to.",
                param=request.structured_path.partition(".")[0] or "structured_outputs",
            )
        check_guided(request.params)
        grammar = StructuredOutputs(grammar=f"start: {lead}calls\n{self._calls(request)}{rules}")
        return self.compiler.compile(grammar, param="tools")

    def _lazily(self, request: Request) -> str:
        """Rules of which ``free`` is any text, and a call wherever the model opens one: it is then kept to a
        tool's name, to its schema where that is ``strict``, and to one call where several are not wanted.
        With ``none``, text that opens no call. Empty where nothing has to be kept."""
        if self.unkept(request) is not None:
            return ""
        none = request.tool_choice == "none"
        if none and self._masked():
            return ""
        if not none and request.parallel_tool_calls and not stricts(request):
            return ""
        try:
            return free_grammar(
                self.record,
                None if none else self._lazy_schemas(request),
                several=request.parallel_tool_calls and self.record.parallel,
                literal=self.compiler.literal,
                style={**JSON_STYLE, **EXACT},
            )
        except ValueError as error:
            raise cannot(error) from None

    def _lazy_schemas(self, request: Request) -> dict[str, Any]:
        """The schema of each strict tool; any object for the others, where the format can write one."""
        held = stricts(request)
        schemas = schemas_of(request)
        if self.record.style in ("tagged", "pythonic"):
            return schemas  # its parameters are the format's own words, so there is no "any object"
        return {name: schema if name in held else {} for name, schema in schemas.items()}

    def _masked(self) -> bool:
        """Whether every way to open a call is one token, so that banning them is enough."""
        return len(self._openers()) == len(self.record.openers) and not self.record.bare

    def unkept(self, request: Request) -> tuple[str, str] | None:
        """What a grammar of calls cannot keep here: the parameter, and why."""
        if not request.tools or request.params.structured_outputs is not None:
            return None
        if request.tool_choice == "none" and not self._masked():
            param = "tool_choice"
        elif request.tool_choice == "auto" and (stricts(request) or not request.parallel_tool_calls):
            param = "tools.strict" if stricts(request) else "parallel_tool_calls"
        else:
            return None
        if self.record.style == "harmony":
            return param, "not enforced: this format opens calls in the middle of its messages"
        if param != "tools.strict" and guided_missing() is not None:
            return param, f"not enforced: {guided_missing()}"
        return None

    def banned(self, request: Request) -> tuple[int, ...]:
        """With ``tool_choice: none`` the markers of calls, where they are single tokens."""
        if not request.tools or request.tool_choice != "none":
            return ()
        return self._openers()

    def _openers(self) -> tuple[int, ...]:
        """Ids of the markers that open a call, where they are single tokens."""
        found = []
        for marker in self.record.openers:
            segments = self._tokenizer.segments(marker)
            if len(segments) == 1 and isinstance(segments[0], int):
                found.append(segments[0])
        return tuple(found)

    def output(self, request: Request, prompt: list[int]) -> Output | HarmonyOutput | None:
        """What tells an answer apart; None where there is nothing to tell."""
        if request.messages is None:
            return None
        schemas = None
        if request.tools and request.tool_choice != "none":
            schemas = schemas_of(request)
        new_id = call_id if self.record.ids == "call" else nine_letters
        if self.record.style == "harmony":
            return HarmonyOutput(schemas, new_id=new_id)
        if schemas is None and self.record.think is None:
            return None
        return Output(self.record, schemas, reasoning=self.reasons_already(prompt), new_id=new_id)

    def _calls(self, request: Request) -> str:
        schemas = schemas_of(request)
        kind, _, name = request.tool_choice.partition(":")
        if kind == "function":
            schemas = {name: schemas[name]}
        record = self.record
        try:
            return calls_grammar(
                record,
                schemas,
                several=kind != "function" and request.parallel_tool_calls and record.parallel,
                literal=self.compiler.literal,
                style={**JSON_STYLE, **EXACT},
            )
        except ValueError as error:
            raise cannot(error) from None


def cannot(error: ValueError) -> InvalidRequest:
    """The 400 for tools that a format cannot write."""
    return InvalidRequest(
        f"these tools cannot be enforced: {error}", param="tools", code="invalid_json_schema"
    )


def stricts(request: Request) -> frozenset[str]:
    """Names of the tools whose schema holds even where the model chooses to call them."""
    functions = [tool["function"] for tool in request.tools or ()]
    return frozenset(function["name"] for function in functions if function.get("strict"))


def schemas_of(request: Request) -> dict[str, Any]:
    """The parameters' schema of each tool, by name."""
    functions = [tool["function"] for tool in request.tools or ()]
    return {function["name"]: function.get("parameters") or {} for function in functions}


def spoken_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its calls, or with its result, as text in the generic format."""
    if message.get("tool_calls"):
        blocks = []
        for call in message["tool_calls"]:
            function = call["function"]
            arguments = function["arguments"]
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            lead = f'{{"name": {json.dumps(function["name"])}, "arguments": '
            blocks.append(f"{GENERIC.call[0]}\n{lead}{arguments}}}\n{GENERIC.call[1]}")
        said = said_in(message)
        return {"role": message["role"], "content": "\n".join([*([said] if said else []), *blocks])}
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{said_in(message)}\n</tool_response>"}
    return message


def said_in(message: dict[str, Any]) -> str:
    """A message's content as text, its parts joined as the HTTP door joins them."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content)


def call_id() -> str:
    """An id as OpenAI makes them."""
    return "call_" + "".join(secrets.choice(LETTERS) for _ in range(24))


def nine_letters() -> str:
    """An id as Mistral's templates want them."""
    return "".join(secrets.choice(LETTERS) for _ in range(9))
