"""One KV block as one file: a header that says whose it is, the raw bytes, and a checksum over both."""

import struct
from hashlib import sha256

import msgspec

__all__ = ["HEADER_BYTES", "BlockFile", "DamagedError"]

MAGIC = b"GALLEYKV"
VERSION = 1
HEAD = struct.Struct("<8sIIII32s16s16s32sQ")
"""magic, version, depth, tokens in the block, reserved, identity, digest, parent, proof, payload bytes."""
SUM_BYTES = 32
HEADER_BYTES = HEAD.size + SUM_BYTES


class DamagedError(Exception):
    """The bytes are not the block they were taken for: torn, flipped, or of something else."""


class BlockFile(msgspec.Struct, frozen=True, kw_only=True):
    """What identifies a block outside the process that computed it.

    Attributes:
        identity: 32 bytes; digest of weights, numerics, layout and RoPE (``DiskStore``).
        digest, parent: 16 bytes each; names of this block and of the one before it (the root for depth 0).
        proof: 32 bytes; ``chain.Proof`` of the whole prefix.
        depth: blocks before this one. tokens: positions in the block.
    """

    identity: bytes
    digest: bytes
    parent: bytes
    proof: bytes
    depth: int
    tokens: int

    def encode(self, payload: bytes) -> bytes:
        """The file: header, sha256 over header and payload, payload. O(payload)."""
        head = HEAD.pack(
            MAGIC,
            VERSION,
            self.depth,
            self.tokens,
            0,
            self.identity,
            self.digest,
            self.parent,
            self.proof,
            len(payload),
        )
        return head + checksum(head, payload) + payload

    def payload(self, data: bytes, size: int) -> memoryview:
        """The payload of ``size`` bytes out of a file's ``data``, if the file is exactly this block.

        Raises DamagedError saying what differs; nothing of a damaged file is ever used. O(data).
        """
        if len(data) != HEADER_BYTES + size:
            raise DamagedError(f"{len(data)} bytes, expected {HEADER_BYTES + size}")
        found = HEAD.unpack_from(data)
        wanted = (
            MAGIC,
            VERSION,
            self.depth,
            self.tokens,
            0,
            self.identity,
            self.digest,
            self.parent,
            self.proof,
            size,
        )
        for name, have, want in zip(FIELDS, found, wanted, strict=True):
            if have != want:
                raise DamagedError(f"another {name}")
        view = memoryview(data)
        if checksum(view[: HEAD.size], view[HEADER_BYTES:]) != view[HEAD.size : HEADER_BYTES]:
            raise DamagedError("the checksum does not fit")
        return view[HEADER_BYTES:]


FIELDS = (
    "magic",
    "version",
    "depth",
    "block size",
    "reserved word",
    "identity",
    "digest",
    "parent",
    "proof",
    "payload size",
)


def checksum(head: bytes | memoryview, payload: bytes | memoryview) -> bytes:
    """sha256 over both parts: the fastest strong hash where the processor has instructions for it. Releases
    the GIL for large payloads."""
    made = sha256(head)
    made.update(payload)
    return made.digest()
