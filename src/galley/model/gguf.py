"""GGUF reader: header, metadata and tensor table of a mapped file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.

A file is hostile until read. Every count and length is compared with the bytes that remain *before*
anything is allocated for it, so memory stays proportional to the file, and every fault is a
``BadModelFile`` that names the field.
"""

import mmap
import os
import stat
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from galley.errors import BadModelFile
from galley.model.quant.blocks import BLOCKS, GGMLType, tensor_nbytes

Buffer = bytes | mmap.mmap

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_STRING = 1 << 24
MAX_ITEMS = 1 << 22
"""Elements in one array; the largest vocabularies in use have 2^18."""
MAX_DEPTH = 4
MAX_NAME = 1 << 10

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
_SCALARS = {kind: struct.Struct("<" + code) for kind, code in _CODES.items()}
_DTYPES = {kind: np.dtype(code).newbyteorder("<") for kind, code in _CODES.items()}
_WITHDRAWN = {4, 5, 31, 32, 33, 36, 37, 38}


class TensorInfo(NamedTuple):
    """Where one tensor lies.

    ``shape`` is rows first (the reverse of ggml's ``ne``), columns contiguous; ``offset`` counts from the
    start of the file; ``nbytes`` is exact, without padding.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int


class _Cursor:
    """Reads forward through the header; knows what it is reading, so that a fault can say so."""

    __slots__ = ("buffer", "field", "path", "pos", "size")

    def __init__(self, buffer: Buffer, path: str) -> None:
        self.buffer = buffer
        self.size = len(buffer)
        self.pos = 0
        self.path = path
        self.field = "header"

    def fault(self, problem: str, hint: str | None = None) -> BadModelFile:
        return BadModelFile(self.path, self.field, problem, hint=hint)

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.pos:
            raise self.fault(
                f"{what} needs {count} bytes, {self.size - self.pos} remain: the file is truncated"
            )

    def u32(self, what: str) -> int:
        self.need(4, what)
        value: int = _U32.unpack_from(self.buffer, self.pos)[0]
        self.pos += 4
        return value

    def u64(self, what: str) -> int:
        self.need(8, what)
        value: int = _U64.unpack_from(self.buffer, self.pos)[0]
        self.pos += 8
        return value

    def string(self, what: str, limit: int = MAX_STRING) -> str:
        length = self.u64(what)
        if length > limit:
            raise self.fault(f"{what} of {length} bytes is longer than the limit {limit}")
        self.need(length, what)
        end = self.pos + length
        try:
            text = str(self.buffer[self.pos : end], "utf-8")
        except UnicodeDecodeError as error:
            raise self.fault(f"{what} is not UTF-8: {error.reason} at byte {error.start}") from None
        self.pos = end
        return text

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string("the string")
        if kind == _ARRAY:
            return self._array(depth + 1)
        form = _SCALARS.get(kind)
        if form is None:
            raise self.fault(f"unknown value type {kind}")
        self.need(form.size, "the value")
        value = form.unpack_from(self.buffer, self.pos)[0]
        self.pos += form.size
        if kind == _BOOL:
            if value > 1:
                raise self.fault(f"a bool is 0 or 1, not {value}")
            return bool(value)
        return value

    def _array(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self.fault(f"arrays nest deeper than {MAX_DEPTH}")
        kind = self.u32("the array's element type")
        count = self.u64("the array's length")
        if count > MAX_ITEMS:
            raise self.fault(f"an array of {count} elements is over the limit {MAX_ITEMS}")
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            self.need(12 * count, f"an array of {count} arrays")
            return [self._array(depth + 1) for _ in range(count)]
        dtype = _DTYPES.get(kind)
        if dtype is None:
            raise self.fault(f"unknown array element type {kind}")
        width = _SCALARS[kind].size
        self.need(width * count, f"an array of {count} elements")
        array = np.frombuffer(self.buffer, dtype=dtype, count=count, offset=self.pos).copy()
        self.pos += width * count
        if kind == _BOOL:
            if array.size and int(array.max()) > 1:
                raise self.fault("an array of bools holds something else than 0 and 1")
            return array.astype(np.bool_)
        return array

    def _strings(self, count: int) -> list[str]:
        self.need(8 * count, f"an array of {count} strings")
        fast = self._short_strings(count)
        return self._any_strings(count) if fast is None else fast

    def _short_strings(self, count: int) -> list[str] | None:
        """The hot loop of opening a model, where vocabularies are 50 000 to 250 000 short strings.

        Takes each length from its lowest byte alone, then checks all lengths at once and decodes all
        strings at once. None, with nothing read, when the array is not of that kind or is damaged.
        """
        if not count:
            return []
        # Bytes index twice as fast as a map; a short string takes at most 8 + 255 bytes.
        data = bytes(self.buffer[self.pos : self.pos + count * 263])
        pos = 0
        starts: list[int] = []
        add = starts.append
        try:
            for _ in range(count):
                add(pos)
                pos += 8 + data[pos]
        except IndexError:
            return None
        if pos > len(data):
            return None
        where = np.array(starts, dtype=np.int64)
        region = np.frombuffer(data, dtype=np.uint8, count=pos).copy()
        text = np.ones(pos, dtype=np.bool_)
        for byte in range(1, 8):
            if region[where + byte].any():
                return None
            text[where + byte] = False
        region[where] = 0
        joined = region[text].tobytes()
        if joined.count(b"\0") != count:
            return None
        # Joined text can be valid UTF-8 only if every piece is: a NUL never continues a sequence.
        try:
            out = joined.decode("utf-8").split("\0")
        except UnicodeDecodeError:
            return None
        self.pos += pos
        return out[1:]

    def _any_strings(self, count: int) -> list[str]:
        buffer, pos, size = self.buffer, self.pos, self.size
        unpack: Callable[[Any, int], tuple[Any, ...]] = _U64.unpack_from
        out: list[str] = []
        append = out.append
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + unpack(buffer, pos)[0]
                if pos > size:
                    raise self.fault(f"string {len(out)} of {count} runs past the end: the file is truncated")
                append(str(buffer[start:pos], "utf-8"))
        except struct.error:
            raise self.fault(f"string {len(out)} of {count} is cut off: the file is truncated") from None
        except UnicodeDecodeError as error:
            raise self.fault(
                f"string {len(out)} is not UTF-8: {error.reason} at byte {error.start}"
            ) from None
        self.pos = pos
        return out


class GGUF:
    """An open GGUF file.

    Attributes:
        path: as given, for messages.
        version: 2 or 3.
        metadata: key to value: int, float, bool, str, ``list[str]``, numpy 1-D arrays, lists of arrays.
        tensors: name to TensorInfo, in file order.
        alignment: of tensor data, bytes.
        data_start: offset of tensor data in the file.
    """

    def __init__(self, buffer: Buffer, path: str) -> None:
        """Parse ``buffer``. Raises BadModelFile. O(header) time; memory proportional to the header."""
        self.path = path
        self._buffer: Buffer | None = buffer
        cursor = _Cursor(buffer, path)
        self.version, tensor_count, key_count = self._head(cursor)
        self.metadata: dict[str, Any] = {}
        for index in range(key_count):
            cursor.field = f"metadata[{index}]"
            key = cursor.string("the key", MAX_NAME)
            if not key:
                raise cursor.fault("the key is empty")
            cursor.field = f"metadata[{key}]"
            if key in self.metadata:
                raise cursor.fault("the key appears twice")
            self.metadata[key] = cursor.value(cursor.u32("the value type"))
        self._refuse_split(cursor)
        self.alignment = self._alignment(cursor)
        self.data_start = 0
        self.tensors = self._table(cursor, tensor_count)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "GGUF":
        """Map a file read-only and parse its header. Raises BadModelFile; never blocks on a pipe."""
        name = os.fspath(path)
        try:
            if not stat.S_ISREG(os.stat(name).st_mode):
                raise BadModelFile(name, "file", "is not a regular file")
            with Path(name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 24:
                    raise BadModelFile(name, "header", f"{size} bytes are too few for a GGUF header")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BadModelFile(name, "file", error.strerror or str(error)) from error
        try:
            return cls(mapped, name)
        except BaseException:
            mapped.close()
            raise

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor: read-only uint8 1-D view into the map, nothing is copied.

        The map lives as long as any view of it. KeyError for an unknown name, ValueError after ``close``.
        """
        if self._buffer is None:
            raise ValueError(f"{self.path} is closed")
        info = self.tensors[name]
        return np.frombuffer(self._buffer, dtype=np.uint8, count=info.nbytes, offset=info.offset)

    def close(self) -> None:
        """Let go of the file. Views handed out stay valid; the last one to go unmaps it."""
        buffer, self._buffer = self._buffer, None
        if isinstance(buffer, mmap.mmap):
            try:
                buffer.close()
            except BufferError:
                # A view is alive and keeps the map; dropping our reference is all there is to do.
                return

    def __enter__(self) -> "GGUF":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @staticmethod
    def _head(cursor: _Cursor) -> tuple[int, int, int]:
        cursor.need(4, "the magic")
        magic = cursor.buffer[:4]
        if magic != b"GGUF":
            hint = "pull the model again, or convert it to GGUF"
            raise cursor.fault(f"the magic is {magic!r}, not b'GGUF'", hint=hint)
        cursor.pos = 4
        version = cursor.u32("the version")
        if version not in (2, 3):
            if version and version & 0xFFFF == 0:
                raise cursor.fault("the file is big-endian; Galley reads little-endian", hint="convert it")
            raise cursor.fault(f"GGUF version {version} is not supported (2 and 3 are)")
        tensors, keys = cursor.u64("the tensor count"), cursor.u64("the key count")
        # The least an entry takes: name, rank, a dimension, type and offset; or name, type and value.
        for what, count, limit, least in (
            ("tensors", tensors, MAX_TENSORS, 33),
            ("keys", keys, MAX_KEYS, 14),
        ):
            if count > limit:
                raise cursor.fault(f"{count} {what} are over the limit {limit}")
            cursor.need(count * least, f"a table of {count} {what}")
        return version, tensors, keys

    def _refuse_split(self, cursor: _Cursor) -> None:
        cursor.field = "metadata[split.count]"
        count = self.metadata.get("split.count", 1)
        if not isinstance(count, int):
            raise cursor.fault("is not an integer")
        if count > 1:
            raise cursor.fault(
                f"this is one of {count} parts of a split model; Galley reads one file",
                hint="join the parts with `llama-gguf-split --merge FIRST-PART OUT.gguf` and pull OUT.gguf",
            )

    def _alignment(self, cursor: _Cursor) -> int:
        cursor.field = "metadata[general.alignment]"
        value = self.metadata.get("general.alignment", 32)
        if not isinstance(value, int) or isinstance(value, bool):
            raise cursor.fault("is not an integer")
        if value < 1 or value > 1 << 20 or value & (value - 1):
            raise cursor.fault(f"{value} is not a power of two up to 2^20")
        return value

    def _table(self, cursor: _Cursor, count: int) -> dict[str, TensorInfo]:
        entries: list[TensorInfo] = []
        names: set[str] = set()
        for index in range(count):
            cursor.field = f"tensor {index}"
            name = cursor.string("the name", MAX_NAME)
            cursor.field = f"tensor {name}"
            if not name:
                raise cursor.fault(f"tensor {index} has no name")
            if name in names:
                raise cursor.fault("the name appears twice")
            names.add(name)
            entries.append(self._entry(cursor, name))
        start = -(-cursor.pos // self.alignment) * self.alignment
        self.data_start = start
        placed = [entry._replace(offset=start + entry.offset) for entry in entries]
        last: TensorInfo | None = None
        for entry in sorted(placed, key=lambda t: t.offset):
            cursor.field = f"tensor {entry.name}"
            if entry.offset + entry.nbytes > cursor.size:
                raise cursor.fault(
                    f"its {entry.nbytes} bytes at {entry.offset} end past the file's {cursor.size}: truncated"
                )
            if last is not None and entry.offset < last.offset + last.nbytes:
                raise cursor.fault(f"its data overlaps that of {last.name}")
            last = entry
        return {entry.name: entry for entry in placed}

    def _entry(self, cursor: _Cursor, name: str) -> TensorInfo:
        """One row of the table; ``offset`` still counts from the start of the data."""
        rank = cursor.u32("the rank")
        if not 1 <= rank <= 4:
            raise cursor.fault(f"rank {rank} is not within 1..4")
        ne = [cursor.u64("a dimension") for _ in range(rank)]
        code = cursor.u32("the tensor type")
        offset = cursor.u64("the offset")
        if min(ne) < 1:
            raise cursor.fault(f"dimensions {ne} hold a zero")
        if prod(ne) >= 1 << 63:
            raise cursor.fault(f"dimensions {ne} overflow")
        try:
            kind = GGMLType(code)
        except ValueError:
            old = " (withdrawn from the format; requantise the model)" if code in _WITHDRAWN else ""
            raise cursor.fault(f"unknown tensor type {code}{old}") from None
        shape = tuple(reversed(ne))
        if shape[-1] % BLOCKS[kind].block:
            raise cursor.fault(
                f"rows of {shape[-1]} values are no multiple of the {kind.name} block of {BLOCKS[kind].block}"
            )
        if offset % self.alignment:
            raise cursor.fault(f"offset {offset} is not a multiple of the alignment {self.alignment}")
        return TensorInfo(name, shape, kind, offset, tensor_nbytes(kind, shape))
