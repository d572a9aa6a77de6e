"""Names of prefixes: what separates trees, and the chained hash that names a block outside a process."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

__all__ = ["Namespace", "Proof", "digests", "extend", "namespace", "root"]

Namespace = tuple[tuple[str, str], ...]
"""Extras that separate trees, e.g. ``(("model", key), ("ns", tenant))``; tags are part of the key (KV-5)."""

MEMORY_ONLY = ("tier", "memory")
"""The tag of prefixes that must not be written to disk."""


def namespace(
    model: str,
    *,
    tenant: str,
    salt: str | None = None,
    epoch: int = 0,
    memory_only: bool = False,
    adapter: str | None = None,
) -> Namespace:
    """The extras of one job's blocks (KV-5): weights and numerics, tenant, adapter with its
    revision (LRA-2), salt, epoch (KV-10)."""
    extras = [("model", model), ("ns", tenant)]
    if adapter:
        extras.append(("lora", adapter))
    if salt:
        extras.append(("salt", salt))
    if epoch:
        extras.append(("epoch", str(epoch)))
    if memory_only:
        extras.append(MEMORY_ONLY)
    return tuple(extras)


def spelled(space: Namespace) -> bytes:
    """The extras as bytes; each part says its length, so that no two spellings run into each other."""
    out = bytearray()
    for tag, value in space:
        for part in (tag.encode(), value.encode("utf-8", "surrogatepass")):
            out += len(part).to_bytes(4, "little") + part
    return bytes(out)


def packed(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian 32-bit words."""
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def root(space: Namespace) -> bytes:
    """The 16 bytes from which a namespace's chains start (blake2b-128)."""
    return blake2b(spelled(space), digest_size=16).digest()


def extend(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The 16 bytes of a block: blake2b-128 over its parent's and its own tokens. O(tokens)."""
    return blake2b(parent + packed(tokens), digest_size=16).digest()


def digests(space: Namespace, tokens: Sequence[int], size: int) -> Iterator[bytes]:
    """The names of the full blocks of a prompt, first block first; lazily."""
    name = root(space)
    for start in range(0, len(tokens) - size + 1, size):
        name = extend(name, tokens[start : start + size])
        yield name


class Proof:
    """A second, unchained 256-bit hash of a namespace and all tokens up to a block's end.

    A block read from disk must show it, so that a collision of the chained names is a miss and never a wrong
    read (KV-5). Tokens themselves are not written to disk.
    """

    def __init__(self, space: Namespace) -> None:
        extras = spelled(space)
        self._hash: Any = blake2b(len(extras).to_bytes(4, "little") + extras, digest_size=32)

    def copy(self) -> "Proof":
        """A proof that goes on from here on its own."""
        made = Proof.__new__(Proof)
        made._hash = self._hash.copy()
        return made

    def push(self, tokens: Sequence[int]) -> bytes:
        """Append one block's tokens; the proof of the prefix that ends with it."""
        self._hash.update(packed(tokens))
        found: bytes = self._hash.digest()
        return found
