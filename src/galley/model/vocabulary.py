"""What a tokenizer is made of, read from GGUF metadata or from a tokenizer.json."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Merger

from galley.errors import BadModelFile
from galley.model.gguf import GGUF
from galley.model.pretokenizers import PRE_TOKENIZERS, PreTokenizer

T = TypeVar("T")

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of GGUF's ``tokenizer.ggml.token_type``."""

_TURN_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<｜end▁of▁sentence｜>",
    "<EOT>",
    "</s>",
)
"""Tokens that end a turn whatever the metadata say: files that name only one of several are common."""


class Added(NamedTuple):
    """A token cut out of the text before merging. ``lstrip``/``rstrip`` eat white space beside it."""

    id: int
    control: bool
    lstrip: bool = False
    rstrip: bool = False


class Vocabulary(NamedTuple):
    """What a tokenizer is made of, wherever it was read from.

    Attributes:
        tokens: by id; "" where an id has no token.
        types: by id, GGUF token types.
        bytelevel: tokens are spelled in GPT-2's byte letters; else in text with ``▁`` for a space.
        prefix: put a space before text that starts the input or follows a special token.
        prefix_first: only before text that starts the input.
        prefix_missing: only when the text does not start with a space already.
    """

    tokens: list[str]
    types: Sequence[int]
    added: dict[str, Added]
    bytelevel: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    digest: str
    prefix: bool = False
    prefix_first: bool = False
    prefix_missing: bool = False


def _digest(*parts: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _turn_ends(tokens: dict[str, int], types: Sequence[int], known: Iterable[int]) -> tuple[int, ...]:
    ends = set(known)
    ends |= {tokens[text] for text in _TURN_ENDS if text in tokens and types[tokens[text]] in (CONTROL, USER)}
    return tuple(sorted(ends))


def _byte_level(model: models.BPE, pre: PreTokenizer) -> Merger:
    merger = Merger(model)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    merger.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    merger.decoder = decoders.ByteLevel()
    return merger


class FromGGUF:
    """Reads ``tokenizer.ggml.*``; every fault names its key."""

    def __init__(self, gguf: GGUF) -> None:
        self.gguf = gguf
        self.tokens: list[str] = self._strings("tokens")
        if not self.tokens:
            raise self._fault("tokens", "is empty")
        self.types = self._types()
        self.ids = dict(zip(self.tokens, range(len(self.tokens)), strict=True))

    def _fault(self, key: str, problem: str, hint: str | None = None) -> BadModelFile:
        return BadModelFile(self.gguf.path, f"metadata[tokenizer.ggml.{key}]", problem, hint=hint)

    def _get(self, key: str) -> Any:
        return self.gguf.metadata.get(f"tokenizer.ggml.{key}")

    def _strings(self, key: str) -> list[str]:
        value = self._get(key)
        if value is None:
            raise self._fault(key, "is missing", hint="the file has no tokenizer; pull a complete model")
        if not isinstance(value, list) or (value and not isinstance(value[0], str)):
            raise self._fault(key, "is not an array of strings")
        return value

    def _types(self) -> list[int]:
        value = self._get("token_type")
        if value is None:
            return [NORMAL] * len(self.tokens)
        if (
            not isinstance(value, np.ndarray)
            or value.dtype.kind not in "iu"
            or value.size != len(self.tokens)
        ):
            raise self._fault("token_type", f"is not an array of {len(self.tokens)} integers, one per token")
        return [int(kind) for kind in value.tolist()]

    def _flag(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._fault(key, "is not a bool")
        return value

    def _id(self, key: str, default: int | None = None) -> int | None:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._fault(key, "is not an integer")
        if value == 0xFFFFFFFF:  # how some converters say "none"
            return None
        if not 0 <= value < len(self.tokens):
            raise self._fault(key, f"{value} is outside the vocabulary of {len(self.tokens)}")
        return value

    def build(self, make: Callable[[Merger, "Vocabulary"], T]) -> T:
        """Hand merger and vocabulary to ``make``. Raises BadModelFile."""
        kind = self._get("model")
        if kind == "gpt2":
            merger, pre, bos_default, bos_fallback = self._gpt2()
        elif kind == "llama":
            merger, pre, bos_default, bos_fallback = self._sentencepiece(), "", True, 1
        else:
            raise self._fault("model", f"{kind!r} is not supported; gpt2 and llama are")
        bytelevel = kind == "gpt2"
        bos = self._id("bos_token_id", bos_fallback)
        ends = [
            self._id("eos_token_id", None if bytelevel else 2),
            self._id("eot_token_id"),
            self._id("eom_token_id"),
        ]
        eos_ids = _turn_ends(self.ids, self.types, (end for end in ends if end is not None))
        self._mark_controls(bos, eos_ids)
        added = {
            self.tokens[i]: Added(i, kind != USER)
            for i, kind in enumerate(self.types)
            if kind in (CONTROL, USER, UNKNOWN) and self.tokens[i]
        }
        add_bos = self._flag("add_bos_token", bos_default)
        prefix = False if bytelevel else self._flag("add_space_prefix", True)
        merges = self._get("merges") if bytelevel else None
        scores = None if bytelevel else self._get("scores").tolist()
        return make(
            merger,
            Vocabulary(
                tokens=self.tokens,
                types=self.types,
                added=added,
                bytelevel=bytelevel,
                bos_id=bos,
                eos_ids=eos_ids,
                add_bos=add_bos and bos is not None,
                digest=_digest("gguf", kind, pre, self.tokens, self.types, merges, scores, add_bos, prefix),
                prefix=prefix,
            ),
        )

    def _mark_controls(self, bos: int | None, eos_ids: Iterable[int]) -> None:
        """Old converters left bos and turn ends as normal tokens, so that a user could type them."""
        for token in (*([] if bos is None else [bos]), *eos_ids):
            if self.types[token] in (NORMAL, USER):
                self.types[token] = CONTROL

    def _gpt2(self) -> tuple[Merger, str, bool, int | None]:
        name = self._get("pre")
        if name is None:
            raise self._fault(
                "pre", "is missing: how to cut text into words is unknown", hint="convert it again"
            )
        pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
        if pre is None or not isinstance(name, str):
            known = ", ".join(sorted(PRE_TOKENIZERS))
            hint = "a tokenizer of this kind would cut words wrongly; pull another model or report this one"
            raise self._fault("pre", f"pre-tokeniser {name!r} is not known; {known} are", hint=hint)
        merges = self._strings("merges")
        pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
        odd = next((i for i, pair in enumerate(pairs) if len(pair) != 2), None)
        if odd is not None:
            raise self._fault("merges", f"merge {odd} is {merges[odd]!r}, not two parts with a space between")
        aside = {
            self.tokens[i] for i, kind in enumerate(self.types) if kind in (UNKNOWN, CONTROL, USER, UNUSED)
        }
        vocab = {text: i for text, i in self.ids.items() if text not in aside} if aside else self.ids
        try:
            model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre.ignore_merges)
        except Exception:
            # Perhaps a merge makes or uses a token set aside; leaving those out is what setting aside means.
            pairs = [p for p in pairs if p[0] not in aside and p[1] not in aside and p[0] + p[1] not in aside]
            try:
                model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre.ignore_merges)
            except Exception as error:
                raise self._fault("merges", f"do not fit the tokens: {error}") from error
        return _byte_level(model, pre), name, pre.add_bos, None

    def _sentencepiece(self) -> Merger:
        """SentencePiece BPE as ranked merges: a token's score is the rank of every pair that makes it."""
        scores = self._get("scores")
        if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or scores.size != len(self.tokens):
            raise self._fault("scores", f"is not an array of {len(self.tokens)} floats, one per token")
        if not np.isfinite(scores).all():
            raise self._fault("scores", "holds a number that is not finite")
        vocab: dict[str, int] = {}
        plain: dict[str, int] = {}
        for i, text in enumerate(self.tokens):
            kind = self.types[i]
            if kind == BYTE:
                if not re.fullmatch(r"<0x[0-9A-F]{2}>", text):
                    raise self._fault("tokens", f"token {i} is of type byte but spelled {text!r}")
                vocab[text] = i
            elif kind in (NORMAL, UNUSED) and text:
                vocab[text] = plain[text] = i
        missing = next((byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab), None)
        if missing is not None:
            raise self._fault("tokens", f"byte {missing} has no token: some text could not be written")
        order = sorted(plain.items(), key=lambda item: -scores[item[1]])
        pairs = [
            (text[:cut], text[cut:])
            for text, _ in order
            for cut in range(1, len(text))
            if text[:cut] in plain and text[cut:] in plain
        ]
        return Merger(models.BPE(vocab=vocab, merges=pairs, byte_fallback=True))


def from_json(make: Callable[[Merger, "Vocabulary"], T], path: Path) -> T:
    """Read a Hugging Face tokenizer.json and hand merger and vocabulary to ``make``. Raises BadModelFile."""

    def fault(field: str, problem: str) -> BadModelFile:
        return BadModelFile(str(path), field, problem)

    try:
        source = json.loads(path.read_bytes())
        beside = path.with_name("tokenizer_config.json")
        config = json.loads(beside.read_bytes()) if beside.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise fault("file", f"cannot be read as JSON: {error}") from error
    if (
        not isinstance(source, dict)
        or not isinstance(source.get("model"), dict)
        or not isinstance(config, dict)
    ):
        raise fault("model", "is missing")
    model = source["model"]
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise fault("model.type", f"{model.get('type')!r} is not supported; BPE is")
    digest = _digest(
        "json", source, config.get("bos_token"), config.get("eos_token"), config.get("add_bos_token")
    )

    vocab: dict[str, int] = dict(model["vocab"])
    added: dict[str, Added] = {}
    for entry in source.get("added_tokens") or []:
        if entry.get("single_word"):
            raise fault(f"added_tokens[{entry.get('content')}].single_word", "is not supported")
        added[entry["content"]] = Added(
            entry["id"], bool(entry.get("special")), bool(entry.get("lstrip")), bool(entry.get("rstrip"))
        )
        vocab[entry["content"]] = entry["id"]
    size = max(vocab.values(), default=-1) + 1
    if not 0 < size <= 1 << 22 or min(vocab.values()) < 0:
        raise fault("model.vocab", f"ids reach {size - 1}")
    tokens, types = [""] * size, [UNUSED] * size
    for text, token in vocab.items():
        tokens[token] = text
        byte = model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", text)
        types[token] = BYTE if byte else NORMAL
    for entry in added.values():
        types[entry.id] = CONTROL if entry.control else USER

    bytelevel = "ByteLevel" in json.dumps([source.get("pre_tokenizer"), source.get("decoder")])
    source["added_tokens"] = []
    source["post_processor"] = source["decoder"] = None  # neither is used here
    schemes = [] if bytelevel else _take_metaspace(source)
    try:
        merger = Merger.from_str(json.dumps(source))
    except Exception as error:
        raise fault("file", f"the tokenizers library refuses it: {error}") from error

    def named(key: str) -> int | None:
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        return vocab.get(text) if isinstance(text, str) else None

    bos, eos = named("bos_token"), named("eos_token")
    return make(
        merger,
        Vocabulary(
            tokens=tokens,
            types=types,
            added=added,
            bytelevel=bytelevel,
            bos_id=bos,
            eos_ids=_turn_ends(vocab, types, [] if eos is None else [eos]),
            add_bos=bool(config.get("add_bos_token")) and bos is not None,
            digest=digest,
            prefix=bool(schemes),
            prefix_first="first" in schemes,
            prefix_missing=True,
        ),
    )


def _take_metaspace(source: dict[str, Any]) -> list[str]:
    """Switch off Metaspace's own prefix, which cannot see what lies before a segment; return its schemes."""
    found: list[str] = []
    top = source.get("pre_tokenizer") or {}
    for part in [top, *(top.get("pretokenizers") or [])]:
        if part.get("type") == "Metaspace":
            scheme = part.get("prepend_scheme") or (
                "always" if part.get("add_prefix_space", True) else "never"
            )
            part["prepend_scheme"] = "never"
            part.pop("add_prefix_space", None)
            if scheme != "never":
                found.append(scheme)
    return found
