"""A hundred thousand damaged headers: each is read or refused with BadModelFile, in bounded memory."""

import random
import struct
import tracemalloc
from pathlib import Path

from galley.errors import BadModelFile
from galley.model.families import spec_from_gguf
from galley.model.gguf import GGUF

CASES = 100_000
ABSURD = (0, 1, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def header() -> tuple[bytes, list[int]]:
    """A small header that holds every construct, and the places of its counts, lengths and types."""
    out = bytearray()
    places: list[int] = []

    def number(form: str, value: int) -> None:
        places.append(len(out))
        out.extend(struct.pack(form, value))

    def name(value: str) -> None:
        number("<Q", len(value.encode()))
        out.extend(value.encode())

    out += b"GGUF"
    number("<I", 3)
    number("<Q", 2)
    number("<Q", 7)
    name("general.architecture")
    number("<I", 8)
    name("llama")
    name("general.alignment")
    number("<I", 4)
    number("<I", 32)
    name("tokens")
    number("<I", 9)
    number("<I", 8)
    number("<Q", 4)
    for word in ("a", "bé", "", "delta"):
        name(word)
    name("types")
    number("<I", 9)
    number("<I", 5)
    number("<Q", 3)
    out += struct.pack("<3i", 1, 2, 3)
    name("nested")
    number("<I", 9)
    number("<I", 9)
    number("<Q", 1)
    number("<I", 0)
    number("<Q", 2)
    out += b"\1\2"
    name("flag")
    number("<I", 7)
    out += b"\1"
    name("llama.block_count")
    number("<I", 4)
    number("<I", 1)
    for tensor, ne, kind, offset in (("token_embd.weight", (32, 4), 2, 0), ("norm", (8,), 0, 96)):
        name(tensor)
        number("<I", len(ne))
        for dimension in ne:
            number("<Q", dimension)
        number("<I", kind)
        number("<Q", offset)
    return bytes(out) + b"\0" * (-len(out) % 32) + bytes(range(128)), places


def mutate(rng: random.Random, seed: bytes, places: list[int]) -> bytes:
    blob = bytearray(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.randrange(6)
        if kind == 0 and blob:  # flip bits
            for _ in range(rng.choice((1, 1, 8))):
                blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
        elif kind == 1:  # truncate
            del blob[rng.randrange(len(blob) + 1) :]
        elif kind == 2:  # inflate a count, a length or a type
            at, value = (
                rng.choice(places),
                rng.choice((*ABSURD, rng.randrange(1 << 12), rng.randrange(1 << 64))),
            )
            raw = struct.pack("<Q", value)[: rng.choice((1, 4, 8))]
            blob[at : at + len(raw)] = raw
        elif kind == 3:  # a small other number: swaps types and ranks
            at = rng.choice(places)
            blob[at : at + 1] = bytes((rng.randrange(48),))
        elif kind == 4 and blob:  # overwrite with noise
            at = rng.randrange(len(blob))
            noise = rng.randbytes(rng.randrange(1, 16))
            blob[at : at + len(noise)] = noise
        else:  # repeat or drop a stretch
            at = rng.randrange(len(blob) + 1)
            end = min(len(blob), at + rng.randrange(1, 64))
            blob[at:end] = blob[at:end] * rng.choice((0, 2))
    return bytes(blob)


def test_seed_header_is_valid() -> None:
    file = GGUF(header()[0], "seed")
    assert file.metadata["tokens"] == ["a", "bé", "", "delta"] and file.raw("norm").size == 32


def test_100k_damaged_headers_are_read_or_refused() -> None:
    rng = random.Random(20_240_229)
    seed, places = header()
    read = refused = 0
    for _ in range(CASES):
        try:
            file = GGUF(mutate(rng, seed, places), "fuzz")
        except BadModelFile as error:
            refused += 1
            assert error.field and error.message
        else:
            read += 1
            for name, info in file.tensors.items():
                assert file.raw(name).size == info.nbytes
    # Both ends of the reader were exercised, or the mutations say nothing.
    assert read > CASES // 100 and refused > CASES // 2


def test_damaged_headers_take_no_memory() -> None:
    rng = random.Random(7)
    seed, places = header()
    blobs = [mutate(rng, seed, places) for _ in range(5_000)]
    tracemalloc.start()
    try:
        for blob in blobs:
            try:
                GGUF(blob, "fuzz")
            except BadModelFile:
                continue
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20, f"{peak} bytes for headers of {len(seed)}"


def test_damaged_models_are_refused_by_the_family_too(tmp_path: Path) -> None:
    rng = random.Random(11)
    from tests.unit.model.tinyfile import write

    blob = write(tmp_path / "m.gguf").read_bytes()
    end = GGUF(blob, "tiny").data_start
    numbers = [i for i in range(end) if blob[i : i + 6] == b"llama."]
    for _ in range(300):
        damaged = bytearray(blob)
        at = rng.choice(numbers) + rng.randrange(60)
        damaged[at] ^= 1 << rng.randrange(8)
        try:
            spec = spec_from_gguf(GGUF(bytes(damaged), "fuzz"))
        except BadModelFile:
            continue
        assert spec.layers == 2 and spec.hidden == 64
