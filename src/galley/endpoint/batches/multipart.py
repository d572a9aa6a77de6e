"""Reading ``multipart/form-data`` (RFC 7578) as it arrives: a file of any size costs one buffer."""

import re
from collections.abc import Iterator
from email.message import Message
from typing import NamedTuple

from galley.errors import InvalidRequest

__all__ = ["Begin", "Data", "Multipart", "boundary_of"]

MAX_HEAD = 16_384
MAX_PARTS = 64


class Begin(NamedTuple):
    """A part begins."""

    name: str
    filename: str | None


class Data(NamedTuple):
    """Bytes of the part that began last."""

    data: bytes


def broken(why: str) -> InvalidRequest:
    """The form cannot be read."""
    return InvalidRequest(f"The form cannot be read: {why}.", code="invalid_multipart")


def boundary_of(content_type: str) -> bytes:
    """The boundary a content type names. Raises InvalidRequest."""
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_param("boundary")
    if message.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
        raise InvalidRequest(
            "Send the file as multipart/form-data.", code="invalid_content_type", param="file"
        )
    if not 1 <= len(boundary) <= 70 or not boundary.isascii():
        raise broken("the boundary must have 1 to 70 characters")
    return boundary.encode()


class Multipart:
    """Bytes in, parts out. O(bytes)."""

    def __init__(self, boundary: bytes) -> None:
        self._mark = b"\r\n--" + boundary
        # The first boundary may open the body without the line break before it.
        self._buffer = b"\r\n"
        self._state = "preamble"
        self._parts = 0

    def feed(self, piece: bytes) -> Iterator[Begin | Data]:
        """What the next bytes complete. Raises InvalidRequest."""
        self._buffer += piece
        while True:
            if self._state in ("preamble", "data"):
                place = self._buffer.find(self._mark)
                if place < 0:
                    # All but what could be the beginning of a boundary.
                    safe = max(0, len(self._buffer) - len(self._mark))
                    found, self._buffer = self._buffer[:safe], self._buffer[safe:]
                    if found and self._state == "data":
                        yield Data(found)
                    return
                if place and self._state == "data":
                    yield Data(self._buffer[:place])
                self._buffer = self._buffer[place + len(self._mark) :]
                self._state = "boundary"
            elif self._state == "boundary":
                if len(self._buffer) < 2:
                    return
                if self._buffer.startswith(b"--"):
                    self._state = "end"
                elif self._buffer.startswith(b"\r\n"):
                    self._state = "head"
                else:
                    raise broken("a boundary is followed by something else than a line break")
                self._buffer = self._buffer[2:]
            elif self._state == "head":
                place = self._buffer.find(b"\r\n\r\n")
                if place < 0:
                    if len(self._buffer) > MAX_HEAD:
                        raise broken("the headers of a part are too long")
                    return
                head, self._buffer = self._buffer[:place], self._buffer[place + 4 :]
                self._parts += 1
                if self._parts > MAX_PARTS:
                    raise broken(f"more than {MAX_PARTS} parts")
                # The line break before a boundary may follow at once: an empty part.
                self._state = "data"
                yield self._begun(head)
            else:
                self._buffer = b""
                return

    def finish(self) -> None:
        """Raises InvalidRequest unless the last boundary came."""
        if self._state != "end":
            raise broken("it ends before its last boundary")

    @staticmethod
    def _begun(head: bytes) -> Begin:
        message = Message()
        for line in head.split(b"\r\n"):
            key, colon, value = line.decode("utf-8", "replace").partition(":")
            if colon and re.fullmatch(r"[A-Za-z0-9-]+", key):
                message[key] = value.strip()
        if message.get_content_disposition() != "form-data":
            raise broken("a part is not form-data")
        name = message.get_param("name", header="content-disposition")
        filename = message.get_param("filename", header="content-disposition")
        if not isinstance(name, str):
            raise broken("a part has no name")
        return Begin(name, message.get_filename() if filename is not None else None)
