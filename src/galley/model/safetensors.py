"""Reading safetensors files: a JSON header of names, types and places, then the bytes.

The format: 8 bytes little-endian length of the header, the header, the data; offsets count from its end
(github.com/huggingface/safetensors, README). Everything is checked against the file's size before it is read.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from galley.errors import BadModelFile

__all__ = ["Safetensors"]

MAX_HEADER = 16 << 20
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}
"""Types that are read; a file may hold others as long as nobody asks for them."""


class Safetensors:
    """One file, read whole.

    Attributes:
        names: of its tensors, in the header's order.
        metadata: the header's ``__metadata__``.

    Raises BadModelFile naming the field at fault.
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        try:
            self._data = path.read_bytes()
        except OSError as error:
            raise BadModelFile(self.path, "file", error.strerror or str(error)) from error
        if len(self._data) < 8:
            raise self._bad("header", f"{len(self._data)} bytes are too few")
        length = int.from_bytes(self._data[:8], "little")
        if length > min(MAX_HEADER, len(self._data) - 8):
            raise self._bad("header", f"its length of {length} bytes is more than there is")
        self._start = 8 + length
        try:
            table: Any = json.loads(self._data[8 : self._start])
        except (ValueError, RecursionError) as error:
            raise self._bad("header", f"is not JSON: {error}") from error
        if not isinstance(table, dict):
            raise self._bad("header", "is not an object")
        self.metadata: dict[str, Any] = table.pop("__metadata__", None) or {}
        self._table = table
        self.names = list(table)

    def __contains__(self, name: str) -> bool:
        return name in self._table

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor as float32, contiguous, of its own. KeyError when there is none of that name."""
        entry = self._table[name]
        try:
            kind, shape = entry["dtype"], entry["shape"]
            first, last = entry["data_offsets"]
            width = WIDTHS.get(kind)
            whole = all(
                isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, first, last)
            )
        except (TypeError, KeyError, ValueError) as error:
            raise self._bad(name, f"its entry makes no sense: {error!r}") from error
        if width is None:
            raise self._bad(name, f"its type {str(kind)[:20]!r} is none of {', '.join(WIDTHS)}")
        count = 1
        for n in shape if whole else ():
            count *= n
        if not whole or last - first != count * width or self._start + last > len(self._data):
            raise self._bad(
                name, f"its shape {str(shape)[:60]} and place {first}..{last} do not fit the file"
            )
        raw = np.frombuffer(self._data, np.uint8, count * width, self._start + first)
        if kind == "BF16":
            wide = raw.view("<u2").astype(np.uint32) << np.uint32(16)
            return wide.view(np.float32).reshape(shape)
        return raw.view("<f4" if kind == "F32" else "<f2").astype(np.float32).reshape(shape)

    def _bad(self, field: str, problem: str) -> BadModelFile:
        return BadModelFile(self.path, field, problem)
