"""A Jinja environment that can run a stranger's template: bounded in time, in memory and in reach.

Jinja's immutable sandbox keeps a template away from Python's internals, but not from ``'a' * 10**9`` or
five nested loops. Here every operation that can make something large is checked *before* it runs, every
loop turn, call and filter looks at the clock, and everything made is charged to a budget. What cannot be
bounded that way is not offered (``include``, ``lipsum``, most of Jinja's HTML filters).

Behaviour otherwise follows what Hugging Face's transformers does for chat templates: trim_blocks,
lstrip_blocks, loop controls, ``{% generation %}``, ``tojson`` without HTML escapes and with key order kept,
``raise_exception`` and ``strftime_now``.
"""

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from string import Formatter
from typing import Any, cast

from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import do_title
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from galley.model.chat_limits import MAX_INT_BITS, MAX_RANGE, Allowance, LimitError

MAX_SOURCE = 1 << 20
MAX_WIDTH = 10_000
"""Padding widths, indents and the like."""


class RefusalError(Exception):
    """The template called ``raise_exception``: it does not accept these messages."""


class _Generation(Extension):
    """``{% generation %}…{% endgeneration %}`` marks text for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012 - the name and kind Jinja asks for

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Guards(NodeTransformer):
    """Rewrites a parsed template so that loops, joins, slices and containers go through the environment."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if isinstance(node, nodes.Include | nodes.Import | nodes.FromImport | nodes.Extends):
            raise LimitError(f"line {node.lineno}: a chat template cannot load other templates")
        self.generic_visit(node)
        if isinstance(node, nodes.For):
            node.iter = self._through("paced", cast(nodes.Expr, node.iter))
        elif isinstance(node, nodes.Concat):
            return self._through("joined", *node.nodes)
        elif (
            (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
            or isinstance(node, nodes.List | nodes.Dict)
            or (isinstance(node, nodes.Tuple) and node.ctx == "load")
        ):
            return self._through("charged", node)
        return node

    def _through(self, method: str, *args: nodes.Expr) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None)


_FILTERS = """
    abs attr capitalize count d default dictsort e escape first float forceescape int items join last length
    list lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum
    title trim unique upper wordcount
"""
_SHALLOW = {"count", "d", "default", "first", "items", "last", "length", "selectattr", "rejectattr", "map"}
"""Filters that do not turn a container into text, so need not measure it."""

_STR_METHODS = """
    capitalize casefold center count endswith expandtabs find format index isalnum isalpha isascii isdecimal
    isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip
    partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines
    startswith strip swapcase title upper zfill
"""
_WIDE = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})


def _indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's ``indent`` with a bounded width."""
    pad = width if isinstance(width, str) else " " * min(width, 257)
    if len(pad) > 256:
        raise LimitError("an indent of more than 256 characters")
    lines = str(value).split("\n")
    padded = [
        line if not (line or blank) or (i == 0 and not first) else pad + line for i, line in enumerate(lines)
    ]
    return "\n".join(padded)


def _raise_exception(message: str) -> None:
    raise RefusalError(str(message))


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """See the module. One environment may render in several threads at once: allowances are per thread."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._local = threading.local()
        self._str_methods = frozenset(_STR_METHODS.split())
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[LoopControlExtension, _Generation],
            # Folding constants would run '*' while compiling, outside any allowance.
            optimized=False,
            finalize=self._finalized,
            cache_size=0,
        )
        stock = {name: self.filters[name] for name in _FILTERS.split()}
        own = {
            "title": self._title,
            "tojson": self._tojson,
            "indent": _indent,
            "join": self._join,
            "replace": self._replace,
        }
        self.filters = {name: self._guarded(name, filter_) for name, filter_ in (stock | own).items()}
        self.globals.pop("lipsum", None)

        def strftime_now(form: str) -> str:
            if len(form) > 256 or re.search(r"%[-_0^#EO]*\d", form):
                raise LimitError("a date format of more than 256 characters or with widths")
            return now().strftime(form)

        def bounded_range(*args: int) -> range:
            numbers = range(*args)
            if len(numbers) > MAX_RANGE:
                raise LimitError(f"a range of more than {MAX_RANGE}")
            return numbers

        self.globals |= {
            "range": bounded_range,
            "raise_exception": _raise_exception,
            "strftime_now": strftime_now,
            "dict": lambda *args, **kwargs: self.allowance.charge(dict(*args, **kwargs)),
        }

    @property
    def allowance(self) -> Allowance:
        allowance: Allowance = self._local.allowance
        return allowance

    def stream(self, source: Any, allowance: Allowance, values: dict[str, Any]) -> str:
        """Render a compiled template under an allowance. Raises LimitError and whatever it raises."""
        self._local.allowance = allowance
        try:
            pieces: list[str] = []
            total = 0
            for piece in source.root_render_func(source.new_context(values)):
                total += len(piece)
                allowance.length(total)
                allowance.tick()
                pieces.append(piece)
            return "".join(pieces)
        finally:
            del self._local.allowance

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        guarded: nodes.Template = _Guards().visit(tree)
        return guarded

    # What the rewritten template calls.

    def paced(self, items: Any) -> Iterator[Any]:
        """The items of a loop, with a look at the clock before each."""
        tick = self.allowance.tick
        for item in items:
            tick()
            yield item

    def charged(self, value: Any) -> Any:
        return self.allowance.charge(value)

    def joined(self, *parts: Any) -> str:
        """The ``~`` operator."""
        texts = [self._text(part) for part in parts]
        self.allowance.length(sum(map(len, texts)))
        text: str = self.allowance.charge("".join(texts))
        return text

    def concat(self, parts: Iterable[str]) -> str:
        """What macros and ``{% set %}`` blocks collect into."""
        pieces = list(parts)
        self.allowance.length(sum(map(len, pieces)))
        text: str = self.allowance.charge("".join(pieces))
        return text

    def _text(self, value: Any) -> str:
        if isinstance(value, list | tuple | dict):
            self.allowance.measure(value)
        return str(value)

    def _finalized(self, value: Any) -> Any:
        if isinstance(value, list | tuple | dict):
            self.allowance.measure(value)
        return value

    # What Jinja's sandbox lets us intercept.

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        allowance = self.allowance
        allowance.tick()
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                    allowance.length(len(sequence) * max(0, times))
            if isinstance(left, int) and isinstance(right, int):
                self._bits(left.bit_length() + right.bit_length())
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            allowance.length(len(left) + len(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._bits(left.bit_length() * max(0, right))
        elif operator == "%" and isinstance(left, str):
            self._format(left, (right,), {})
        return allowance.charge(super().call_binop(context, operator, left, right))

    def _bits(self, bits: int) -> None:
        if bits > MAX_INT_BITS:
            raise LimitError("the template made a number of thousands of bits")

    def _format(self, pattern: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Widths in format strings, written out or taken from an argument, can ask for gigabytes."""
        computed = "%" in pattern and "*" in pattern
        if "{" in pattern:
            computed = computed or any("{" in (spec or "") for _, _, spec, _ in Formatter().parse(pattern))
        if computed or re.search(r"\d{5}", pattern):
            raise LimitError("a format string with a large or computed width")
        self.allowance.measure((args, kwargs))
        fields = pattern.count("{") + pattern.count("%")
        widths = sum(int(digits) for digits in re.findall(r"\d+", pattern))
        inside = sum(len(str(value)) for value in (*args, *kwargs.values()))
        self.allowance.length(len(pattern) + widths + inside * (fields + 1))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's safe stand-in for ``str.format``, with its result bounded."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        @functools.wraps(safe)
        def bounded(*args: Any, **kwargs: Any) -> str:
            self._format(value.__self__, args, kwargs)
            return safe(*args, **kwargs)

        return bounded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in self._str_methods:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Every call a template makes. ``__self`` as in Jinja: the template's own names may be anything."""
        allowance = __self.allowance
        allowance.tick()
        owner = getattr(__obj, "__self__", None)
        if owner is __self:
            return __obj(*args)  # one of the guards above; Jinja adds keywords about the loop around it
        for value in (*args, *kwargs.values()):
            if isinstance(value, list | tuple | dict):
                allowance.measure(value)
        if isinstance(owner, str):
            args = __self._check_method(owner, __obj.__name__, args, kwargs)
        return allowance.charge(super().call(__context, __obj, *args, **kwargs))

    def _check_method(
        self, owner: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Bound the result of a str method before it is made; returns the arguments to use."""
        if name in _WIDE and any(isinstance(v, int) and v > MAX_WIDTH for v in (*args, *kwargs.values())):
            raise LimitError(f"str.{name} to more than {MAX_WIDTH} characters")
        if name == "replace":
            old, new = (*args, *kwargs.values(), "", "")[:2]
            self._replaced(owner, old, new)
        elif name == "join" and len(args) == 1:
            items = list(self.paced(args[0]))
            self.allowance.length(sum(len(i) for i in items if isinstance(i, str)) + len(owner) * len(items))
            return (items,)
        return args

    def _replaced(self, text: str, old: Any, new: Any) -> None:
        if isinstance(old, str) and isinstance(new, str) and len(new) > len(old):
            times = text.count(old)
            self.allowance.length(len(text) + times * (len(new) - len(old)))

    # Filters.

    def _guarded(self, name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(filter_)  # keeps Jinja's marks for filters that want the context
        def run(*args: Any, **kwargs: Any) -> Any:
            allowance = self.allowance
            allowance.tick()
            if name not in _SHALLOW:
                for value in args:
                    if isinstance(value, list | tuple | dict):
                        allowance.measure(value)
            result = filter_(*args, **kwargs)
            if isinstance(result, Iterator):
                return self.paced(result)
            return allowance.charge(result)

        return run

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """``json.dumps`` as transformers offers it: no HTML escapes, keys in their own order."""
        step = indent if isinstance(indent, int) else len(indent or "")
        if step > 16 or any(len(part) > 16 for part in separators or ()):
            raise LimitError("an indent or separators of more than 16 characters")
        values, depth = self.allowance.measure(value)
        self.allowance.length(values * max(0, step) * depth)
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def _title(self, s: Any) -> str:
        """Jinja's ``title`` runs Python code for every word, so its input is bounded."""
        if len(str(s)) > MAX_WIDTH:
            raise LimitError(f"a title of more than {MAX_WIDTH} characters")
        return do_title(s)

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        items = list(self.paced(value))
        if attribute is not None:
            items = [self.getitem(item, attribute) for item in items]
        texts = [self._text(item) for item in items]
        self.allowance.length(sum(map(len, texts)) + len(d) * len(texts))
        return d.join(texts)

    def _replace(self, s: str, old: str, new: str, count: int | None = None) -> str:
        text, old, new = str(s), str(old), str(new)
        self._replaced(text, old, new)
        return text.replace(old, new, -1 if count is None else count)
