"""A tokenizer of bytes: id b is byte b, 256 a special token, 257.. given byte strings."""

SPECIAL = 256


class Alphabet:
    """Satisfies ``text.stream.Vocabulary``. ``opens_with_space`` behaves as SentencePiece models do."""

    def __init__(self, *tokens: bytes, opens_with_space: bool = False) -> None:
        self.tokens = tokens
        self.opens_with_space = opens_with_space

    def token_bytes(self, token: int, /) -> bytes:
        if token < 256:
            return bytes((token,))
        return b"" if token == SPECIAL else self.tokens[token - 257]

    def token_str(self, token: int, /) -> str:
        return "<|end|>" if token == SPECIAL else self.token_bytes(token).decode()

    def is_special(self, token: int, /) -> bool:
        return token == SPECIAL

    def decode(self, ids: list[int], skip_special: bool = True, *, start: bool = False) -> str:
        raw = b"".join(b"<|end|>" if i == SPECIAL and not skip_special else self.token_bytes(i) for i in ids)
        if start and self.opens_with_space and raw.startswith(b" "):
            raw = raw[1:]
        return raw.decode("utf-8", "replace")
