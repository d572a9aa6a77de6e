"""Server-sent events out of any split of a byte stream (WHATWG HTML, section 9.2.6)."""

from collections.abc import Iterator

from galley.errors import Upstream

__all__ = ["Events"]

LIMIT = 1 << 20
"""Bytes of one unfinished event."""


class Events:
    """Feed it bytes, take ``(event, data)`` pairs. Comments and ids are dropped; data lines are joined by
    newlines; CRLF, CR and LF end lines. Linear in the bytes."""

    def __init__(self) -> None:
        self._rest = b""
        self._event = ""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """Events completed by these bytes. Raises Upstream (protocol) for an event above LIMIT."""
        text = self._rest + data if self._rest else data
        if b"\r" in text:
            # A CR at the very end may be half of a CRLF: it waits for the next byte.
            held = text.endswith(b"\r")
            text = text[: -1 if held else None].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            lines = text.split(b"\n")
            self._rest = lines.pop() + (b"\r" if held else b"")
        else:
            lines = text.split(b"\n")
            self._rest = lines.pop()
        if len(self._rest) + self._size > LIMIT:
            raise Upstream(f"an event is longer than {LIMIT} bytes", kind="protocol")
        for line in lines:
            if not line:
                if self._data:
                    yield self._event, b"\n".join(self._data) if len(self._data) > 1 else self._data[0]
                self._event, self._data, self._size = "", [], 0
            elif line.startswith(b"data:"):
                piece = line[6:] if line[5:6] == b" " else line[5:]
                self._size += len(piece)
                self._data.append(piece)
            elif line.startswith(b"event:"):
                self._event = line[6:].strip().decode("utf-8", "replace")
