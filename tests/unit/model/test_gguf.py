"""The GGUF reader: what it reads, and how it refuses what it cannot."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from galley.errors import BadModelFile
from galley.model.gguf import GGUF

from .tinyfile import write


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(name: str, ne: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def build(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: int = 0,
    magic: bytes = b"GGUF",
    version: int = 3,
) -> bytes:
    head = magic + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\1" * data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def strings(*values: str | bytes) -> bytes:
    return struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values))


def test_reads_what_the_gguf_package_wrote(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    other = gguf.GGUFReader(str(path))
    with GGUF.open(path) as ours:
        assert ours.version == 3
        for name, field in other.fields.items():
            if not name.startswith("GGUF."):
                mine = ours.metadata[name]
                mine = mine.tolist() if isinstance(mine, np.ndarray) else mine
                assert mine == field.contents(), name
        assert list(ours.tensors) == [tensor.name for tensor in other.tensors]
        for tensor in other.tensors:
            info = ours.tensors[tensor.name]
            assert info.shape == tuple(reversed(tensor.shape.tolist())) and info.offset == tensor.data_offset
            assert np.array_equal(ours.raw(tensor.name), tensor.data.reshape(-1).view(np.uint8))
            assert not ours.raw(tensor.name).flags.writeable


@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type_nested_arrays_and_alignment(version: int) -> None:
    pack = struct.pack
    numbers: dict[int, tuple[str, Any]] = {
        0: ("<B", 200), 1: ("<b", -3), 2: ("<H", 60000), 3: ("<h", -300), 4: ("<I", 4 << 28), 5: ("<i", -5),
        6: ("<f", 0.5), 10: ("<Q", 1 << 60), 11: ("<q", -(1 << 60)), 12: ("<d", 0.1),
    }  # fmt: skip
    keys = [key(f"s{kind}", kind, pack(form, value)) for kind, (form, value) in numbers.items()]
    keys += [key(f"a{kind}", 9, pack("<IQ", kind, 1) + pack(form, v)) for kind, (form, v) in numbers.items()]
    keys += [
        key("yes", 7, b"\1"),
        key("bools", 9, pack("<IQ", 7, 2) + b"\1\0"),
        key("text", 8, text("naïve")),
    ]
    nested = pack("<IQ", 9, 2) + strings("a", "") + pack("<IQ", 5, 2) + pack("<2i", 1, -1)
    keys += [key("nested", 9, nested), key("words", 9, strings("x" * 300, "", "\0", "é"))]
    keys += [key("general.alignment", 4, pack("<I", 64))]
    file = GGUF(aligned(keys, version), "x")
    for kind, (_, value) in numbers.items():
        assert file.metadata[f"s{kind}"] == value and file.metadata[f"a{kind}"].tolist() == [value]
    assert file.metadata["yes"] is True and file.metadata["bools"].tolist() == [True, False]
    assert file.metadata["nested"][0] == ["a", ""] and file.metadata["nested"][1].tolist() == [1, -1]
    assert file.metadata["words"] == ["x" * 300, "", "\0", "é"]
    assert file.alignment == 64 and file.tensors["t"].offset % 64 == 0
    assert file.raw("t").tolist() == [1] * 16


def aligned(keys: list[bytes], version: int) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, 1, len(keys)) + b"".join(keys) + entry("t", [4])
    return head + b"\0" * (-len(head) % 64) + b"\1" * 16


HUGE = (1 << 63) + 5
FAULTS: dict[str, tuple[bytes, str, str]] = {
    "wrong magic": (build(magic=b"GGML"), "header", "magic"),
    "version 1": (build(version=1), "header", "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "header", "big-endian"),
    "truncated": (build()[:20], "header", "truncated"),
    "absurd key count": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), "header", "limit"),
    "keys over the file": (b"GGUF" + struct.pack("<IQQ", 3, 0, 60000), "header", "remain"),
    "absurd tensor count": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), "header", "limit"),
    "absurd string": (build([key("k", 8, struct.pack("<Q", HUGE))]), "metadata[k]", "limit"),
    "long string": (build([key("k", 8, struct.pack("<Q", 1 << 20))]), "metadata[k]", "remain"),
    "absurd array": (build([key("k", 9, struct.pack("<IQ", 4, HUGE))]), "metadata[k]", "limit"),
    "long array": (build([key("k", 9, struct.pack("<IQ", 4, 1 << 20))]), "metadata[k]", "remain"),
    "long string array": (build([key("k", 9, struct.pack("<IQ", 8, 1 << 20))]), "metadata[k]", "remain"),
    "long nested array": (build([key("k", 9, struct.pack("<IQ", 9, 1 << 20))]), "metadata[k]", "remain"),
    "deep nesting": (
        build([key("k", 9, struct.pack("<IQ", 9, 1) * 9 + struct.pack("<IQ", 4, 0))]),
        "[k]",
        "deep",
    ),
    "unknown value type": (build([key("k", 13, b"")]), "metadata[k]", "type 13"),
    "unknown element type": (build([key("k", 9, struct.pack("<IQ", 99, 1))]), "metadata[k]", "type 99"),
    "bad bool": (build([key("k", 7, b"\7")]), "metadata[k]", "bool"),
    "bad utf-8": (build([key("k", 8, text(b"\xff"))]), "metadata[k]", "UTF-8"),
    "bad utf-8 in an array": (
        build([key("tokenizer.ggml.tokens", 9, strings("ok", b"\xc3", b"\xa9"))]),
        "metadata[tokenizer.ggml.tokens]",
        "string 1 is not UTF-8",
    ),
    "duplicate key": (build([key("k", 7, b"\1")] * 2), "metadata[k]", "twice"),
    "empty key": (build([key("", 7, b"\1")]), "metadata[0]", "empty"),
    "alignment 0": (build([key("general.alignment", 4, b"\0" * 4)]), "metadata[general.alignment]", "power"),
    "alignment text": (
        build([key("general.alignment", 8, text("x"))]),
        "metadata[general.alignment]",
        "integer",
    ),
    "split file": (build([key("split.count", 2, b"\3\0")]), "metadata[split.count]", "3 parts"),
    "duplicate tensor": (build((), [entry("t", [1]), entry("t", [1], 0, 32)], 64), "tensor t", "twice"),
    "nameless tensor": (build((), [entry("", [1])], 64), "tensor", "no name"),
    "rank 9": (build((), [entry("t", [1] * 9)], 64), "tensor t", "rank 9"),
    "rank 0": (build((), [entry("tensorname", [])], 64), "tensor tensorname", "rank 0"),
    "zero dimension": (build((), [entry("t", [0])], 64), "tensor t", "zero"),
    "overflowing dimensions": (build((), [entry("t", [1 << 40, 1 << 40])], 64), "tensor t", "overflow"),
    "unknown tensor type": (build((), [entry("t", [32], 99)], 64), "tensor t", "type 99"),
    "withdrawn tensor type": (build((), [entry("t", [32], 4)], 64), "tensor t", "withdrawn"),
    "row not whole blocks": (build((), [entry("t", [33], 3)], 64), "tensor t", "Q4_1 block of 32"),
    "unaligned offset": (build((), [entry("t", [1], 0, 7)], 64), "tensor t", "alignment"),
    "outside the file": (build((), [entry("t", [64])], 64), "tensor t", "past the file"),
    "far outside the file": (build((), [entry("t", [1], 0, 1 << 62)], 64), "tensor t", "past the file"),
    "overlap": (
        build((), [entry("a", [16]), entry("b", [16], 0, 32)], 128),
        "tensor b",
        "overlaps that of a",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_name_the_field(case: str, tmp_path: Path) -> None:
    blob, field, problem = FAULTS[case]
    with pytest.raises(BadModelFile) as caught:
        GGUF(blob, "x.gguf")
    assert (
        field in caught.value.field and problem in caught.value.message and "x.gguf" in caught.value.message
    )
    path = tmp_path / "x.gguf"
    path.write_bytes(blob)
    with pytest.raises(BadModelFile):
        GGUF.open(path)


def test_split_file_says_what_to_do() -> None:
    with pytest.raises(BadModelFile) as caught:
        GGUF(FAULTS["split file"][0], "x")
    assert caught.value.hint is not None and "--merge" in caught.value.hint


def test_missing_empty_and_irregular_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for path in (tmp_path / "none", empty, tmp_path):
        with pytest.raises(BadModelFile):
            GGUF.open(path)


def test_views_outlive_close(tmp_path: Path) -> None:
    file = GGUF.open(write(tmp_path / "m.gguf"))
    view = file.raw("output_norm.weight")
    before = view.copy()
    file.close()
    file.close()
    assert np.array_equal(view, before)
    with pytest.raises(ValueError, match="closed"):
        file.raw("output_norm.weight")
