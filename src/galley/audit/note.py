"""Signed notes and checkpoints as C2SP has them (signed-note, tlog-checkpoint, tlog-cosignature), Ed25519.

Signing and verifying need the package ``cryptography`` (extra ``audit``); reading and writing the text does
not.
"""

import base64
import hashlib
import os
import secrets
import struct
from pathlib import Path
from typing import Any

import msgspec

from galley.errors import ConfigError, GalleyError

__all__ = ["Checkpoint", "Signer", "Verifier", "need_cryptography", "parse_checkpoint"]

PLAIN, COSIGNED = 1, 4
"""Signature types: of a log over the text, and of a witness with its time."""


class BadNote(GalleyError):
    """Text that is no signed note, or is not signed by the key asked for."""

    code = "audit_bad_checkpoint"


def need_cryptography() -> Any:
    """The Ed25519 module of ``cryptography``. Raises ConfigError where it is not installed."""
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ConfigError(
            "The audit log needs the package cryptography.",
            code="missing_dependency",
            param="audit.mode",
            hint="pip install 'galley[audit]', or set audit.mode = off",
        ) from error
    return ed25519


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a log says of itself: its name, how many entries, and the root over them."""

    origin: str
    size: int
    root: bytes
    text: str
    """As it was signed, with its last newline."""
    signatures: tuple[tuple[str, bytes], ...] = ()
    """Name of the key, and four bytes of its id followed by the signature."""

    @staticmethod
    def written(origin: str, size: int, root: bytes) -> str:
        """The text to sign."""
        return f"{origin}\n{size}\n{base64.b64encode(root).decode()}\n"

    @property
    def note(self) -> str:
        """Text and signatures, as it is published."""
        lines = [f"— {name} {base64.b64encode(made).decode()}\n" for name, made in self.signatures]
        return f"{self.text}\n{''.join(lines)}"

    def signed(self, name: str, made: bytes) -> "Checkpoint":
        """With one signature more."""
        return msgspec.structs.replace(self, signatures=(*self.signatures, (name, made)))


def parse_checkpoint(note: str) -> Checkpoint:
    """Read, verify nothing. Raises BadNote."""
    text, blank, tail = note.rpartition("\n\n")
    lines = text.split("\n")
    try:
        if not blank or len(lines) < 3 or not all(lines) or not lines[1].isascii() or not lines[1].isdigit():
            raise ValueError
        signatures = []
        for line in tail.removesuffix("\n").split("\n"):
            dash, name, made = line.split(" ")
            if dash != "—" or not name or "+" in name:
                raise ValueError
            signatures.append((name, base64.b64decode(made, validate=True)))
        found = base64.b64decode(lines[2], validate=True)
        if len(found) != 32 or str(int(lines[1])) != lines[1]:
            raise ValueError
    except ValueError as error:
        raise BadNote("this is no signed checkpoint") from error
    return Checkpoint(
        origin=lines[0], size=int(lines[1]), root=found, text=text + "\n", signatures=tuple(signatures)
    )


def key_id(name: str, kind: int, public: bytes) -> bytes:
    """The four bytes that name a key beside its name."""
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + public).digest()[:4]


def cosigned_text(text: str, seconds: int) -> bytes:
    """What a witness signs: that it saw this checkpoint at that time."""
    return f"cosignature/v1\ntime {seconds}\n{text}".encode()


class Verifier:
    """A public key: ``NAME+ID+KEY`` as Go's ``sumdb/note`` writes it.

    Raises BadNote for text that is none.
    """

    def __init__(self, vkey: str) -> None:
        try:
            self.name, shown, data = vkey.strip().split("+", 2)
            raw = base64.b64decode(data, validate=True)
            self.kind, self.public = raw[0], raw[1:]
            good = self.kind in (PLAIN, COSIGNED) and len(self.public) == 32
            if not good or key_id(self.name, self.kind, self.public).hex() != shown:
                raise ValueError
        except (ValueError, IndexError) as error:
            raise BadNote(f"{vkey[:100]!r} is no verifier key") from error
        self.vkey = vkey.strip()
        self._key = need_cryptography().Ed25519PublicKey.from_public_bytes(self.public)

    def check(self, checkpoint: Checkpoint) -> int:
        """Raises BadNote unless this key signed it. The time of a cosignature in Unix seconds, else 0."""
        from cryptography.exceptions import InvalidSignature

        mark = key_id(self.name, self.kind, self.public)
        for name, made in checkpoint.signatures:
            if name != self.name or made[:4] != mark:
                continue
            seconds, message, signature = 0, checkpoint.text.encode(), made[4:]
            if self.kind == COSIGNED:
                seconds, signature = int.from_bytes(made[4:12], "big"), made[12:]
                message = cosigned_text(checkpoint.text, seconds)
            try:
                self._key.verify(signature, message)
            except InvalidSignature:
                raise BadNote(f"the signature of {self.name} is wrong") from None
            return seconds
        raise BadNote(f"{self.name} has not signed this")


class Signer:
    """A private key in a file of its own, readable by its owner alone.

    Args:
        kind: PLAIN for a log, COSIGNED for a witness.
    """

    def __init__(self, name: str, seed: bytes, kind: int = PLAIN) -> None:
        self.name = name
        self.kind = kind
        self._key = need_cryptography().Ed25519PrivateKey.from_private_bytes(seed)
        self.public: bytes = self._key.public_key().public_bytes_raw()

    @property
    def vkey(self) -> str:
        """The verifier key, to be given to whoever verifies."""
        shown = base64.b64encode(bytes([self.kind]) + self.public).decode()
        return f"{self.name}+{key_id(self.name, self.kind, self.public).hex()}+{shown}"

    @classmethod
    def kept(cls, path: Path, *, name: str | None = None, kind: int = PLAIN) -> "Signer":
        """The key in a file; made there, under ``name`` or a random one, when there is none.

        Raises BadNote (not a key), ConfigError (no cryptography), OSError.
        """
        need_cryptography()
        try:
            line = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            name = name or f"galley-log/{secrets.token_hex(8)}"
            if not name.isprintable() or any(c in name for c in " +\n"):
                raise ConfigError(
                    f"{name!r} cannot name a log: no spaces, no plus.", param="audit.origin"
                ) from None
            seed = secrets.token_bytes(32)
            made = cls(name, seed, kind)
            mark = key_id(name, kind, made.public).hex()
            data = base64.b64encode(bytes([kind]) + seed).decode()
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(f"PRIVATE+KEY+{name}+{mark}+{data}\n")
                file.flush()
                os.fsync(file.fileno())
            return made
        try:
            private, key, found, mark, data = line.split("+", 4)
            raw = base64.b64decode(data, validate=True)
            made = cls(found, raw[1:], raw[0])
            good = (private, key) == ("PRIVATE", "KEY") and made.kind == kind
            if not good or key_id(found, kind, made.public).hex() != mark:
                raise ValueError
        except (ValueError, IndexError) as error:
            raise BadNote(f"{path} holds no signing key") from error
        return made

    def sign(self, checkpoint: Checkpoint, *, seconds: int = 0) -> Checkpoint:
        """With this key's signature added; a witness says when (Unix seconds)."""
        mark = key_id(self.name, self.kind, self.public)
        if self.kind == COSIGNED:
            made = struct.pack(">Q", seconds) + self._key.sign(cosigned_text(checkpoint.text, seconds))
        else:
            made = self._key.sign(checkpoint.text.encode())
        return checkpoint.signed(self.name, mark + made)
