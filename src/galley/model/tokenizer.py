"""Text to token ids and back, from GGUF metadata or a tokenizer.json.

The Rust ``tokenizers`` library does the merging of plain text. Cutting out special tokens is done here,
so that one rule holds for every model: **a control token comes from the template or from the caller's
``special=True``, never from a user's text.**
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer as Merger

from galley.errors import InvalidRequest
from galley.model.gguf import GGUF
from galley.model.vocabulary import BYTE, CONTROL, UNKNOWN, UNUSED, USER, FromGGUF, Vocabulary, from_json

_SPACE = "▁"


def _byte_letters() -> dict[str, int]:
    """GPT-2's mapping of printable stand-ins to bytes (openai/gpt-2, encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in set(plain)]
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


BATCH_ABOVE = 8192
"""Characters above which the encoder runs without the interpreter's lock (about 10 ms)."""


class Tokenizer:
    """Ids and text of one model. Immutable; any number of threads may use it at once.

    Attributes:
        vocab_size: number of ids the tokenizer knows (the logits may be padded beyond).
        bos_id: or None. add_bos: whether plain prompts start with it.
        eos_ids: every id that ends a turn (eos, eot, eom), ascending.
        digest: sha256 over everything that decides the ids.
    """

    def __init__(self, merger: Merger, vocabulary: Vocabulary) -> None:
        self._merger = merger
        self._vocabulary = vocabulary
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.add_bos = vocabulary.add_bos
        self.digest = vocabulary.digest
        self._letters = _byte_letters()
        self._bytes: dict[int, bytes] = {}
        self.controls = frozenset(text for text, added in vocabulary.added.items() if added.control)
        self._any_added = _alternatives(vocabulary.added)
        self._user_added = _alternatives(
            text for text, added in vocabulary.added.items() if not added.control
        )
        self._unwritable = _unwritable(vocabulary.tokens, self._letters) if vocabulary.bytelevel else None

    # -- text to ids

    def encode(self, text: str, *, special: bool = False, add_bos: bool | None = None) -> list[int]:
        """Ids of ``text``.

        Args:
            special: read control tokens such as ``<|im_end|>`` where they are spelled out. Off, they are
                plain text: use off for anything a user wrote.
            add_bos: put the bos token first; None does what the model's metadata say.
        Raises:
            InvalidRequest: the text holds a lone surrogate, or a character whose bytes have no token in
                this vocabulary (some lack a few control characters): it would vanish silently.
        """
        ids = self.encode_segments(self.segments(text) if special else (text,))
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise InvalidRequest("this model has no bos token", param="add_bos")
            ids.insert(0, self.bos_id)
        return ids

    def segments(self, text: str) -> list[str | int]:
        """Cut ``text`` at every special token spelled in it: plain text as str, special tokens as ids.

        Leftmost, longest first; O(len(text)).
        """
        return list(self._cut(text, self._any_added))

    def encode_segments(self, segments: Iterable[str | int]) -> list[int]:
        """Ids of text cut by ``segments``: ints as they are, strings without reading control tokens."""
        vocabulary = self._vocabulary
        ids: list[int] = []
        first = after_special = True
        for segment in segments:
            for part in self._cut(segment, self._user_added) if isinstance(segment, str) else (segment,):
                if isinstance(part, int):
                    ids.append(part)
                    after_special = True
                else:
                    lead = vocabulary.prefix and (first if vocabulary.prefix_first else after_special)
                    ids += self._merge(part, lead)
                    after_special = False
                first = False
        return ids

    def encode_inner(self, text: str) -> list[int]:
        """Ids of ``text`` where it continues a text: no bos, no opening space. Raises as ``encode`` does."""
        ids: list[int] = []
        for part in self._cut(text, self._user_added):
            ids += [part] if isinstance(part, int) else self._merge(part, False)
        return ids

    def _cut(self, text: str, pattern: re.Pattern[str] | None) -> Iterator[str | int]:
        if pattern is None:
            if text:
                yield text
            return
        position = 0
        for match in pattern.finditer(text):
            added = self._vocabulary.added[match.group()]
            before = text[position : match.start()]
            if added.lstrip:
                before = before.rstrip()
            if before:
                yield before
            yield added.id
            position = match.end()
            while added.rstrip and position < len(text) and text[position].isspace():
                position += 1
        if position < len(text):
            yield text[position:]

    def _merge(self, text: str, lead: bool) -> list[int]:
        if not self._vocabulary.bytelevel:
            if lead and not (self._vocabulary.prefix_missing and text.startswith((" ", _SPACE))):
                text = " " + text
            text = text.replace(" ", _SPACE)
        if self._unwritable is not None and (match := self._unwritable.search(text)):
            message = f"the character U+{ord(match.group()):04X} cannot be written in this model's vocabulary"
            raise InvalidRequest(message, code="unencodable_text")
        try:
            ids: list[int]
            if len(text) > BATCH_ABOVE:
                # `encode` holds the interpreter's lock for seconds then; a batch of one lets others run.
                ids = self._merger.encode_batch_fast([text], add_special_tokens=False)[0].ids
            else:
                ids = self._merger.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            bad = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if bad is None:
                raise
            message = f"the text is not valid Unicode: a lone surrogate at character {bad}"
            raise InvalidRequest(message, code="invalid_unicode") from error
        return ids

    # -- ids to text

    def decode(self, ids: Iterable[int], skip_special: bool = True, *, start: bool = False) -> str:
        """Text of ``ids``: the bytes of the tokens, joined, invalid UTF-8 shown as U+FFFD.

        ``start`` says that the ids open a text, and drops the space that SentencePiece models put there.
        Raises InvalidRequest for an id outside the vocabulary.
        """
        if skip_special:
            raw = b"".join(map(self.token_bytes, ids))
        else:
            raw = b"".join(self.token_bytes(i) or self.token_str(i).encode() for i in ids)
        if start and self._vocabulary.prefix and raw.startswith(b" "):
            raw = raw[1:]
        return raw.decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The raw bytes a token stands for; b"" for special and unused ones. Raises InvalidRequest."""
        raw = self._bytes.get(token)
        if raw is None:
            raw = self._bytes[token] = self._spell(token)
        return raw

    def _spell(self, token: int) -> bytes:
        text = self.token_str(token)
        if self.is_special(token):
            return b""
        kind = self._vocabulary.types[token]
        if kind == USER:
            return text.encode()
        if self._vocabulary.bytelevel:
            # A letter outside the byte alphabet stands for itself, as in a damaged or hand-made vocabulary.
            return b"".join(bytes((self._letters[c],)) if c in self._letters else c.encode() for c in text)
        if kind == BYTE:
            return bytes((int(text[3:5], 16),))
        return text.replace(_SPACE, " ").encode()

    def is_special(self, token: int) -> bool:
        """Control, unknown and unused tokens: they stand for no text."""
        self._known(token)
        return self._vocabulary.types[token] in (CONTROL, UNKNOWN, UNUSED)

    def token_str(self, token: int) -> str:
        """The token as the vocabulary spells it. Raises InvalidRequest for an unknown id."""
        self._known(token)
        return self._vocabulary.tokens[token]

    def _known(self, token: int) -> None:
        if not 0 <= token < self.vocab_size:
            raise InvalidRequest(f"token id {token} is outside the vocabulary of {self.vocab_size}")

    # -- sources

    @classmethod
    def from_gguf(cls, gguf: GGUF) -> "Tokenizer":
        """Build from ``tokenizer.ggml.*``. Raises BadModelFile naming the key."""
        return FromGGUF(gguf).build(cls)

    @classmethod
    def from_json(cls, path: str | Path) -> "Tokenizer":
        """Build from a Hugging Face tokenizer.json (BPE), reading tokenizer_config.json beside it if there.

        Raises BadModelFile.
        """
        return from_json(cls, Path(path))


def _alternatives(texts: Iterable[str]) -> re.Pattern[str] | None:
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _unwritable(tokens: Iterable[str], letters: dict[str, int]) -> re.Pattern[str] | None:
    """The characters whose UTF-8 needs a byte that no token stands for; None when there are none.

    A missing continuation byte is not looked for: such a vocabulary could hardly write anything.
    """
    missing = {byte for letter, byte in letters.items()} - {letters[t] for t in tokens if t in letters}
    ranges = []
    for byte in sorted(missing):
        if byte < 0x80:
            ranges.append((byte, byte))
        elif 0xC2 <= byte < 0xE0:
            ranges.append(((byte & 0x1F) << 6, ((byte & 0x1F) << 6) | 0x3F))
        elif 0xE0 <= byte < 0xF0:
            ranges.append((max(0x800, (byte & 0xF) << 12), ((byte & 0xF) << 12) | 0xFFF))
        elif 0xF0 <= byte < 0xF5:
            ranges.append((max(0x10000, (byte & 7) << 18), min(0x10FFFF, ((byte & 7) << 18) | 0x3FFFF)))
    if not ranges:
        return None
    return re.compile("[" + "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges) + "]")
