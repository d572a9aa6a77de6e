"""Ollama's ``options`` and top-level fields, put into the words of chat completions."""

import math
import re
from typing import Any

from galley.endpoint.wire import Fields, invalid
from galley.errors import UnsupportedParameter

__all__ = ["Converted", "read_keep_alive"]

SAME = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "stop")
"""Options that mean the same under the same name."""
MACHINE = (
    "numa",
    "num_batch",
    "num_gpu",
    "main_gpu",
    "low_vram",
    "f16_kv",
    "use_mmap",
    "use_mlock",
    "num_thread",
    "num_keep",
    "vocab_only",
    "logits_all",
    "penalize_newline",
    "mirostat_tau",
    "mirostat_eta",
)
"""How Ollama's own runner would work. They change no answer here, and are named."""
OFF = {"tfs_z": (1, 1.0), "typical_p": (1, 1.0), "mirostat": (0,), "embedding_only": (False,)}
"""Samplers that are not built, with the values that switch them off."""
UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
LEVELS = ("low", "medium", "high")


class Converted:
    """What ``chat`` and ``generate`` have in common, as fields of a chat request.

    Attributes:
        chat: the fields. names: their paths, in the caller's words. ignored: paths without effect.
        adjusted: what was changed, in words by path.
    """

    def __init__(self, fields: Fields, *, context: int | None) -> None:
        self.chat: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self.ignored: list[str] = []
        self.adjusted: dict[str, str] = {}
        self._context = context
        options = fields.object("options")
        if options is not None:
            self._options(options)
        self._format(fields)
        self._think(fields)
        for name in ("logprobs", "top_logprobs"):
            if fields.raw(name) is not None:
                self.chat[name] = fields.raw(name)

    def _set(self, options: Fields, name: str, chat_name: str, value: Any) -> None:
        self.chat[chat_name] = value
        self.names[chat_name] = options.at(name)

    def _options(self, options: Fields) -> None:
        for name in SAME:
            if options.raw(name) is not None:
                self._set(options, name, name, options.raw(name))
        seed = options.integer("seed")
        if seed is not None and seed != -1:  # -1 asks for one that nobody knows
            self._set(options, "seed", "seed", seed)
        most = options.integer("num_predict", -2)
        if most == 0:
            raise invalid(
                f"{options.at('num_predict')!r} must not be 0.", options.at("num_predict"), "invalid_value"
            )
        if most is not None and most > 0:  # -1 and -2 are the rest of the context, which is the default
            self._set(options, "num_predict", "max_completion_tokens", most)
        self._penalty(options)
        wanted = options.integer("num_ctx", 1)
        if wanted is not None and self._context is not None and wanted > self._context:
            raise invalid(
                f"{options.at('num_ctx')!r} is {wanted}; this model is served with {self._context}.",
                options.at("num_ctx"),
                "integer_above_max_value",
            )
        for name, off in OFF.items():
            value = options.raw(name)
            if value is not None and not any(type(value) is type(same) and value == same for same in off):
                raise UnsupportedParameter(
                    f"{options.at(name)!r} is not supported here.", param=options.at(name)
                )
        self.ignored += [options.at(name) for name in MACHINE if options.raw(name) is not None]
        for path in options.rest():
            raise UnsupportedParameter(f"{path!r} is not supported here.", param=path)

    def _penalty(self, options: Fields) -> None:
        """``repeat_penalty`` counts prompt and output here; Ollama's counts the last ``repeat_last_n``."""
        penalty, reach = options.raw("repeat_penalty"), options.integer("repeat_last_n", -1)
        off = penalty is None or (not isinstance(penalty, bool) and penalty == 1)
        if off or reach == 0:
            if penalty is not None:
                options.number("repeat_penalty")
            if reach not in (None, 0):
                self.ignored.append(options.at("repeat_last_n"))
            return
        if reach not in (None, -1):
            raise UnsupportedParameter(
                f"{options.at('repeat_last_n')!r} other than -1 (everything) or 0 (off) is not supported.",
                param=options.at("repeat_last_n"),
            )
        self._set(options, "repeat_penalty", "repetition_penalty", penalty)
        if reach is None:
            self.adjusted[options.at("repeat_penalty")] = "over prompt and output, not the last 64 tokens"

    def _format(self, fields: Fields) -> None:
        """``""``, ``"json"`` or a schema."""
        form = fields.raw("format")
        if form is None or form == "":
            return
        self.names |= {"response_format.json_schema.schema": "format", "response_format": "format"}
        if form == "json":
            self.chat["response_format"] = {"type": "json_object"}
        elif isinstance(form, dict):
            schema = {"name": "format", "strict": False, "schema": form}
            self.chat["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif isinstance(form, str):
            raise invalid("'format' is 'json' or a JSON schema.", "format", "invalid_value")
        else:
            raise fields.wrong("format", "'json' or a JSON schema", form)

    def _think(self, fields: Fields) -> None:
        value = fields.raw("think")
        if value is None:
            return
        self.names["reasoning_effort"] = "think"
        if isinstance(value, bool):
            self.chat["reasoning_effort"] = "medium" if value else "none"
            return
        if not isinstance(value, str):
            raise fields.wrong("think", "a boolean or a level", value)
        self.chat["reasoning_effort"] = fields.choice("think", LEVELS)


def read_keep_alive(fields: Fields) -> float | None:
    """Seconds a model shall stay awake after the request: a number, or a duration like ``5m``; negative is
    for ever (``inf``). None where nothing is said. Raises InvalidRequest."""
    value = fields.raw("keep_alive")
    if value is None:
        return None
    seconds: float | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str):
        sign, bare = (-1.0, value[1:]) if value.startswith("-") else (1.0, value)
        parts = PART.findall(bare)
        if parts and "".join(number + unit for number, unit in parts) == bare:
            seconds = sign * sum(float(number) * UNITS[unit] for number, unit in parts)
        elif re.fullmatch(r"\d+(\.\d+)?", bare):
            seconds = sign * float(bare)
    if seconds is None or math.isnan(seconds):
        raise invalid(
            "'keep_alive' is a number of seconds or a duration like '5m'.", "keep_alive", "invalid_value"
        )
    return float("inf") if seconds < 0 else seconds
