"""The tree against RFC 6962 as it is written down, against its test vectors, and against pymerkle."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymerkle import InmemoryTree

from galley.audit import verifier
from galley.audit.merkle import consistency_path, inclusion_path, leaf_hash, root, span

VECTORS = [
    b"", b"\x00", b"\x10", b"\x20\x21", b"\x30\x31", b"\x40\x41\x42\x43",
    b"\x50\x51\x52\x53\x54\x55\x56\x57", b"\x60\x61\x62\x63\x64\x65\x66\x67\x68\x69\x6a\x6b\x6c\x6d\x6e\x6f",
]  # fmt: skip
"""The inputs of the Certificate Transparency reference tests, and their roots by tree size."""
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


class Plain:
    """Nodes over a list of entries, by the definition of RFC 6962 §2.1, recursive and slow."""

    def __init__(self, entries: list[bytes]) -> None:
        self.entries = entries

    def node(self, height: int, index: int) -> bytes:
        return self.mth(self.entries[index << height : (index + 1) << height])

    def mth(self, d: list[bytes]) -> bytes:
        if not d:
            return hashlib.sha256().digest()
        if len(d) == 1:
            return hashlib.sha256(b"\x00" + d[0]).digest()
        k = 1
        while 2 * k < len(d):
            k *= 2
        return hashlib.sha256(b"\x01" + self.mth(d[:k]) + self.mth(d[k:])).digest()

    def path(self, m: int, d: list[bytes]) -> list[bytes]:
        if len(d) == 1:
            return []
        k = 1
        while 2 * k < len(d):
            k *= 2
        if m < k:
            return [*self.path(m, d[:k]), self.mth(d[k:])]
        return [*self.path(m - k, d[k:]), self.mth(d[:k])]

    def proof(self, m: int, d: list[bytes], whole: bool = True) -> list[bytes]:
        if m == len(d):
            return [] if whole else [self.mth(d)]
        k = 1
        while 2 * k < len(d):
            k *= 2
        if m <= k:
            return [*self.proof(m, d[:k], whole), self.mth(d[k:])]
        return [*self.proof(m - k, d[k:], False), self.mth(d[:k])]


def test_the_vectors_of_certificate_transparency() -> None:
    assert root([]).hex() == hashlib.sha256().hexdigest()
    for size, wanted in enumerate(ROOTS, 1):
        assert root([leaf_hash(entry) for entry in VECTORS[:size]]).hex() == wanted
        assert span(Plain(VECTORS), 0, size).hex() == wanted
        assert verifier.join([verifier.leaf(entry) for entry in VECTORS[:size]]).hex() == wanted


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.data())
def test_paths_are_those_of_the_rfc_and_verify(size: int, data: st.DataObject) -> None:
    entries = [b"%d" % i for i in range(size)]
    plain = Plain(entries)
    top = plain.mth(entries)
    index = data.draw(st.integers(0, size - 1))
    path = inclusion_path(plain, index, size)
    assert path == plain.path(index, entries)
    verifier.check_inclusion(verifier.leaf(entries[index]), index, size, path, top)
    first = data.draw(st.integers(1, size))
    old = plain.mth(entries[:first])
    proof = consistency_path(plain, first, size)
    assert proof == (plain.proof(first, entries) if first < size else [])
    verifier.check_consistency(first, old, size, top, proof)
    with pytest.raises(verifier.Wrong):
        verifier.check_inclusion(verifier.leaf(b"another"), index, size, path, top)
    with pytest.raises(verifier.Wrong):
        verifier.check_consistency(first, hashlib.sha256(old).digest(), size, top, proof)
    for spoilt in spoilt_paths(path):
        with pytest.raises(verifier.Wrong):
            verifier.check_inclusion(verifier.leaf(entries[index]), index, size, spoilt, top)
    for spoilt in spoilt_paths(proof):
        with pytest.raises(verifier.Wrong):
            verifier.check_consistency(first, old, size, top, spoilt)


def spoilt_paths(path: list[bytes]) -> list[list[bytes]]:
    """A hash more, one less, one changed, two exchanged."""
    found = [[*path, b"x" * 32], [b"x" * 32, *path]]
    if path:
        found += [path[:-1], path[1:], [bytes([path[0][0] ^ 1]) + path[0][1:], *path[1:]]]
    if len(path) > 1:
        found.append([path[1], path[0], *path[2:]])
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 255, 256, 257, 300])
def test_pymerkle_agrees_on_roots_and_accepts_our_proofs(size: int) -> None:
    """An implementation of others: the same roots, the same paths, both ways."""
    theirs = InmemoryTree(algorithm="sha256")
    entries = [b"entry %d" % i for i in range(size)]
    for entry in entries:
        theirs.append_entry(entry)
    leaves = [leaf_hash(entry) for entry in entries]
    nodes = Levels(leaves)
    assert theirs.get_root() == root(leaves)
    for index in range(0, size, max(1, size // 9)):
        proof = theirs.prove_inclusion(index + 1, size)
        assert proof.path[0] == leaves[index]
        assert proof.path[1:] == inclusion_path(nodes, index, size)
        verifier.check_inclusion(leaves[index], index, size, proof.path[1:], theirs.get_root(size))
    for first in range(1, size, max(1, size // 9)):
        verifier.check_consistency(
            first, theirs.get_root(first), size, theirs.get_root(size), consistency_path(nodes, first, size)
        )


class Levels:
    """Nodes over leaf hashes."""

    def __init__(self, leaves: list[bytes]) -> None:
        self.leaves = leaves

    def node(self, height: int, index: int) -> bytes:
        return root(self.leaves[index << height : (index + 1) << height])


def test_sizes_and_places_that_do_not_exist() -> None:
    nodes = Levels([leaf_hash(b"a")])
    with pytest.raises(ValueError, match="no entry 1"):
        inclusion_path(nodes, 1, 1)
    with pytest.raises(ValueError, match="no beginning"):
        consistency_path(nodes, 2, 1)
    with pytest.raises(verifier.Wrong):
        verifier.check_inclusion(leaf_hash(b"a"), 1, 1, [], leaf_hash(b"a"))
