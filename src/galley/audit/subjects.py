"""Subjects: whom an entry is about, under a random id, with a key of their own.

The log holds ids and keyed commitments only. Who an id stands for, and the key that opens what was said, lie
in one small file for each subject; destroying that file leaves the log as it is and valid, and nothing in it
can be told any more from anybody else's (crypto-shredding).
"""

import base64
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from galley.errors import NotFound

__all__ = ["Subject", "Subjects", "canonical"]

KEPT = 10_000
"""Subjects held in memory."""


def canonical(value: Any) -> bytes:
    """JSON in one spelling: keys sorted, no white space, UTF-8; half characters become ``?``."""
    try:
        return msgspec.json.encode(value, order="sorted")
    except UnicodeEncodeError:
        plain = json.dumps(
            msgspec.to_builtins(value), sort_keys=True, ensure_ascii=False, separators=(",", ":")
        )
        return plain.encode("utf-8", "replace")


class Subject:
    """One subject's id and key. Commitments are HMAC-SHA-256 in hex: who has the key can check a guess, who
    has not learns nothing."""

    def __init__(self, id: str, key: bytes) -> None:
        self.id = id
        self._mac = hmac.digest(key, b"galley commitment v1", "sha256")
        self._body = hmac.digest(key, b"galley body v1", "sha256")

    def commit(self, what: str, data: bytes) -> str:
        """Commitment to data in the role ``what``."""
        return hmac.digest(self._mac, what.encode() + b"\0" + data, "sha256").hex()

    def chain(self, receipt: str, choice: int, ids: Iterable[int]) -> str:
        """Commitment to a choice's tokens one by one: c0 = HMAC(tokens ‖ receipt ‖ choice), then
        c = SHA-256(c ‖ id as little-endian uint32) for each. A prefix can be opened without the rest."""
        sha, packed = hashlib.sha256, struct.Struct("<I").pack
        link = hmac.digest(self._mac, f"tokens\0{receipt}\0{choice}".encode(), "sha256")
        for id in ids:
            link = sha(link + packed(id)).digest()
        return link.hex()

    def seal(self, receipt: str, body: bytes) -> bytes:
        """A body encrypted with AES-256-GCM: nonce, then ciphertext; the receipt's id is authenticated."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce = secrets.token_bytes(12)
        return nonce + AESGCM(self._body).encrypt(nonce, body, receipt.encode())

    def unseal(self, receipt: str, sealed: bytes) -> bytes:
        """The body. Raises ``cryptography.exceptions.InvalidTag`` when it is not what was sealed."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(self._body).decrypt(sealed[:12], sealed[12:], receipt.encode())


class Subjects:
    """The subjects of one log: a folder with a file for each.

    A subject is a tenant and a user of theirs. A file gone is a subject erased, also for a process that had
    it in memory; who comes back gets a new id and a new key. Safe for several threads and processes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, str | None], tuple[Path, Subject]] = {}
        self._secret: bytes | None = None

    @property
    def secret(self) -> bytes:
        """The log's own key: names the files, and commits to what is not personal, such as system prompts."""
        if self._secret is None:
            path = self._folder / "log"
            try:
                self._secret = path.read_bytes()
            except FileNotFoundError:
                self._place(path, secrets.token_bytes(32))
                self._secret = path.read_bytes()
        return self._secret

    def common(self, what: str, data: bytes) -> str:
        """A commitment under the log's own key: the same for equal data of all subjects."""
        return hmac.digest(self.secret, what.encode() + b"\0" + data, "sha256").hex()

    def of(self, tenant: str, user: str | None) -> Subject:
        """The subject, made when it is new. Raises OSError."""
        name = (tenant, user)
        known = self._known.get(name)
        if known is not None:
            with contextlib.suppress(FileNotFoundError):
                os.stat(known[0])
                return known[1]
        path = self._path(tenant, user)
        try:
            found = self._read(path)
        except FileNotFoundError:
            fresh = {
                "id": secrets.token_hex(12),
                "key": base64.b64encode(secrets.token_bytes(32)).decode(),
                "tenant": tenant,
                "user": user,
            }
            self._place(path, canonical(fresh))
            found = self._read(path)
        if len(self._known) >= KEPT:
            self._known.clear()
        subject = Subject(found["id"], base64.b64decode(found["key"]))
        self._known[name] = path, subject
        return subject

    def all(self) -> Iterator[dict[str, Any]]:
        """Id, tenant and user of every subject that is not erased."""
        for path in sorted(self._folder.glob("??/*")):
            with contextlib.suppress(FileNotFoundError):
                found = self._read(path)
                yield {name: found[name] for name in ("id", "tenant", "user")}

    def by_id(self, id: str) -> Subject | None:
        """The subject an entry names; None once it is erased. O(subjects)."""
        for path in self._folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                found = self._read(path)
                if found["id"] == id:
                    return Subject(id, base64.b64decode(found["key"]))
        return None

    def erase(self, tenant: str, user: str | None) -> str:
        """Destroy the key and the name. Returns the id, noted for the log (``erased``).

        The file is overwritten before it goes; copies that were made of it (backups, snapshots of the disk)
        are the operator's to destroy. Raises NotFound.
        """
        path = self._path(tenant, user)
        try:
            id: str = self._read(path)["id"]
            with path.open("r+b") as file:
                size = os.fstat(file.fileno()).st_size
                file.write(b"\0" * size)
                file.flush()
                os.fsync(file.fileno())
            path.unlink()
        except FileNotFoundError:
            raise NotFound(f"There is no subject of tenant {tenant!r}, user {user!r}.") from None
        sync_folder(path.parent)
        self._known.pop((tenant, user), None)
        line = canonical({"id": id, "time": time.time_ns() // 1000}) + b"\n"
        with (self._folder / "erased").open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        return id

    def erased(self) -> list[dict[str, Any]]:
        """Erasures that no entry of the log tells of yet."""
        try:
            lines = (self._folder / "erased").read_bytes().splitlines()
        except FileNotFoundError:
            return []
        return [msgspec.json.decode(line) for line in lines]

    def told(self, count: int) -> None:
        """The first ``count`` of them are in the log now."""
        path = self._folder / "erased"
        rest = path.read_bytes().splitlines(keepends=True)[count:]
        if rest:
            path.write_bytes(b"".join(rest))
        else:
            path.unlink()

    def _path(self, tenant: str, user: str | None) -> Path:
        name = self.common("subject", canonical([tenant, user]))
        return self._folder / name[:2] / name

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.json.decode(path.read_bytes())
        return found

    def _place(self, path: Path, data: bytes) -> None:
        """Write a file that is not there yet, whole or not at all; who comes second keeps the first's."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name[:16]}.{secrets.token_hex(8)}")
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        with contextlib.suppress(FileExistsError):
            os.link(beside, path)
        beside.unlink()
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
