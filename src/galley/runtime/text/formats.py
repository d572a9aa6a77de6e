"""How model families write tool calls and reasoning: a table of records, and which record a template means.

The same record drives the reader of an output (``calls``, ``output``) and the grammar that constrains one
(``grammar``), so what is enforced is what is understood. A new family of a known style is a new record here.
"""

from typing import Literal

import msgspec

__all__ = ["FORMATS", "GENERIC", "ChatFormat", "detect"]

Style = Literal["object", "listed", "named", "tagged", "pythonic", "harmony"]
"""``object``: ``{"name": …, "arguments": {…}}`` for each call. ``listed``: the same in one JSON array.
``named``: the name, then the arguments as JSON. ``tagged``: a tag for each argument, its value raw.
``pythonic``: ``[f(a=1), g()]``. ``harmony``: messages with a channel and a recipient."""


class ChatFormat(msgspec.Struct, frozen=True, kw_only=True):
    """One way of writing tool calls.

    Attributes:
        fingerprint: the template holds all of these strings, and none of ``absent``.
        section: markers around all calls of a turn, or empty.
        call: markers around each call, or empty. With an empty first one the call is ``bare``.
        bare: the character that opens a call which has no marker; only at the start of an answer.
        name_before, name_after: around the name of a ``named`` call. id_mark: what parts the name from an id.
        args_after: between the arguments and the closing marker of a ``named`` call.
        keys: of the name and of the arguments in an ``object``.
        tags: of a ``tagged`` call: function (empty: the call's own marker) and parameter, each followed by a
            name and ``>``; the parameter's end, the function's end.
        between: written between two calls. pad: written inside each marker of a call.
        parallel: whether several calls in a turn are usual.
        ids: how call ids look: ``call_…``, or nine letters and digits.
        think: markers around reasoning, when the template knows it.
    """

    name: str
    style: Style
    fingerprint: tuple[str, ...]
    absent: tuple[str, ...] = ()
    section: tuple[str, str] = ("", "")
    call: tuple[str, str] = ("", "")
    bare: str = ""
    name_before: str = ""
    name_after: str = ""
    id_mark: str = ""
    args_after: str = ""
    keys: tuple[str, str] = ("name", "arguments")
    tags: tuple[str, str, str, str] = ("", "", "", "")
    between: str = ""
    pad: str = ""
    parallel: bool = True
    ids: Literal["call", "nine"] = "call"
    think: tuple[str, str] | None = None

    @property
    def openers(self) -> list[str]:
        """Markers with which a call, or the section of calls, begins."""
        return [marker for marker in (self.section[0], self.call[0]) if marker]

    @property
    def markers(self) -> list[str]:
        """Every marker that must be seen in the text, also where a vocabulary has it as a control token."""
        found = [
            *self.section,
            *self.call,
            self.name_before,
            self.name_after,
            self.id_mark,
            *(self.think or ()),
        ]
        if self.style == "harmony":
            found += HARMONY
        return [marker for marker in found if marker]


HARMONY = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))

FORMATS = (
    ChatFormat(name="harmony", style="harmony", fingerprint=("<|channel|>", "<|message|>"), parallel=False),
    ChatFormat(
        name="deepseek-dsml",
        style="tagged",
        fingerprint=("｜DSML｜",),
        section=("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
        call=('<｜DSML｜invoke name="', ""),
        tags=("", '<｜DSML｜parameter name="', "</｜DSML｜parameter>", "</｜DSML｜invoke>"),
        between="\n",
    ),
    ChatFormat(
        name="deepseek-v3",
        style="named",
        fingerprint=("<｜tool▁sep｜>", "```json"),
        section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        call=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        name_before="function<｜tool▁sep｜>",
        name_after="\n```json\n",
        args_after="\n```",
        between="\n",
    ),
    ChatFormat(
        name="deepseek-v3.1",
        style="named",
        fingerprint=("<｜tool▁sep｜>",),
        section=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        call=("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        name_after="<｜tool▁sep｜>",
    ),
    ChatFormat(
        name="qwen3-coder",
        style="tagged",
        fingerprint=("<function=", "<parameter="),
        call=("<tool_call>", "</tool_call>"),
        tags=("<function=", "<parameter=", "</parameter>", "</function>"),
        between="\n",
        pad="\n",
    ),
    ChatFormat(
        name="hermes",
        style="object",
        fingerprint=("<tool_call>",),
        call=("<tool_call>", "</tool_call>"),
        between="\n",
        pad="\n",
    ),
    ChatFormat(
        name="mistral-v11",
        style="named",
        fingerprint=("[TOOL_CALLS]", "[ARGS]"),
        call=("[TOOL_CALLS]", ""),
        name_after="[ARGS]",
        id_mark="[CALL_ID]",
        ids="nine",
    ),
    ChatFormat(
        name="mistral",
        style="listed",
        fingerprint=("[TOOL_CALLS]",),
        section=("[TOOL_CALLS]", ""),
        pad=" ",
        between=", ",
        ids="nine",
    ),
    ChatFormat(name="pythonic", style="pythonic", fingerprint=("[func_name1(",), bare="[", between=", "),
    ChatFormat(name="llama4", style="pythonic", fingerprint=("<|header_start|>",), bare="[", between=", "),
    ChatFormat(
        name="llama3-json",
        style="object",
        fingerprint=("<|start_header_id|>", "tools"),
        call=("<|python_tag|>", ""),
        bare="{",
        keys=("name", "parameters"),
        between="; ",
        parallel=False,
    ),
)
"""The first record that fits a template is taken, so the more particular ones come first."""

GENERIC = ChatFormat(
    name="generic",
    style="object",
    fingerprint=(),
    call=("<tool_call>", "</tool_call>"),
    between="\n",
    pad="\n",
)
"""For templates that no record fits. One that cannot show tools at all gets them in the system message."""


def detect(source: str) -> ChatFormat:
    """The record that fits a template's text, with the reasoning markers it knows."""
    found = GENERIC
    for record in FORMATS:
        if all(mark in source for mark in record.fingerprint) and not any(m in source for m in record.absent):
            found = record
            break
    if found.style == "harmony":
        return found
    think = next((pair for pair in THINKING if pair[0] in source or pair[1] in source), None)
    return msgspec.structs.replace(found, think=think)
