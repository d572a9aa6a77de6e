"""``/v1/files``: uploads for batches, and what batches put out."""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from galley.endpoint.batches.journal import File, Journal
from galley.endpoint.batches.multipart import Begin, Multipart, boundary_of
from galley.endpoint.client import Client, DisconnectError, wire_error
from galley.endpoint.keys import Principal
from galley.endpoint.paging import Page, principal_of, respond
from galley.endpoint.wire import Fields, header_list, invalid
from galley.errors import InvalidRequest

__all__ = ["Files", "Upload"]

PURPOSES = ("batch",)
"""What an upload may be for: nothing here would read the others."""
FORM_FIELDS = 65_536
EXPIRY_S = (3600, 2_592_000)


class Files:
    """The bytes of files in a folder, beside the journal that knows them."""

    def __init__(self, journal: Journal, folder: Path) -> None:
        self.journal = journal
        self.folder = folder

    def path(self, id: str) -> Path:
        """Where a file's bytes are."""
        return self.folder / id

    def write(self, file: File, owner: str, pieces: Iterable[bytes]) -> File:
        """A file made here, complete or not at all; again for the same id is harmless."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{file.id}.{secrets.token_hex(4)}"
        try:
            with partial.open("wb") as out:
                size = sum(out.write(piece) for piece in pieces)
                out.flush()
                os.fsync(out.fileno())
            partial.rename(self.path(file.id))
        finally:
            partial.unlink(missing_ok=True)
        done = msgspec.structs.replace(file, bytes=size)
        self.journal.add_file(done, owner)
        return done

    def sweep(self) -> None:
        """Delete the bytes of files past their time, and what a crash left half written."""
        for id in self.journal.overdue_files():
            self.path(id).unlink(missing_ok=True)
        if not self.folder.exists():
            return
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                old = path.stat().st_mtime < time.time() - 3600
                if old and (path.name.startswith(".") or not self.journal.knows_file(path.name)):
                    path.unlink()

    async def list(self, request: HTTPRequest) -> Response:
        """``?after=&limit=&order=&purpose=``."""
        page = Page.read(request, most=10_000, allowed=("purpose",))
        owner = principal_of(request).key or ""
        found = await asyncio.to_thread(self.journal.files, owner, page.more.get("purpose"))
        return respond(page.cut([msgspec.to_builtins(file) for file in found]))

    async def get(self, request: HTTPRequest) -> Response:
        """What is known of a file."""
        return respond(await self._find(request))

    async def content(self, request: HTTPRequest) -> Response:
        """The bytes."""
        file = await self._find(request)
        return FileResponse(self.path(file.id), media_type="application/octet-stream", filename=file.filename)

    async def delete(self, request: HTTPRequest) -> Response:
        """Forget a file and delete its bytes."""
        file = await self._find(request)
        await asyncio.to_thread(self.journal.drop_file, file.id)
        self.path(file.id).unlink(missing_ok=True)
        return respond({"id": file.id, "object": "file", "deleted": True})

    async def _find(self, request: HTTPRequest) -> File:
        owner = principal_of(request).key or ""
        return await asyncio.to_thread(self.journal.file, request.path_params["id"], owner)


class Upload:
    """``POST /v1/files``.

    Args:
        max_file: bytes of the whole form.
        body_s: longest silence while it arrives.
    """

    def __init__(self, files: Files, *, max_file: int, body_s: float | None) -> None:
        self._files = files
        self._max_file = max_file
        self._body_s = body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = Client(scope, receive, send)
        principal = scope.get("state", {}).get("principal", Principal())
        id = "file-" + secrets.token_hex(12)
        self._files.folder.mkdir(parents=True, exist_ok=True)
        partial = self._files.folder / f".{id}"
        try:
            form, size = await self._receive(client, partial)
            file, ignored = self._read(form, id, size)
            partial.rename(self._files.path(id))
            await asyncio.to_thread(self._files.journal.add_file, file, principal.key or "")
            headers = [(b"x-galley-ignored-params", header_list(ignored).encode())] if ignored else []
            await client.json(200, msgspec.json.encode(file), headers)
        except DisconnectError:
            return
        except Exception as error:
            await client.error(wire_error(error))
        finally:
            partial.unlink(missing_ok=True)

    async def _receive(self, client: Client, partial: Path) -> tuple[dict[str, str], int | None]:
        """The form's text fields and the size of its file, which is written to ``partial``."""
        parser = Multipart(boundary_of((client.header(b"content-type") or b"").decode("latin-1")))
        form: dict[str, bytes] = {}
        name, size, room = "", None, FORM_FIELDS
        with partial.open("wb") as out:
            async for piece in client.pieces(self._max_file, silence_s=self._body_s):
                for found in parser.feed(piece):
                    if isinstance(found, Begin):
                        name = found.name
                        if name in form or (name == "file" and size is not None):
                            raise invalid(f"{name!r} is given twice.", name[:100], "invalid_value")
                        if name == "file":
                            size = 0
                            form["filename"] = (found.filename or "upload").encode()
                        else:
                            form[name] = b""
                    elif name == "file":
                        size = (size or 0) + out.write(found.data)
                    else:
                        room -= len(found.data)
                        if room < 0:
                            raise invalid("The form's fields are too long.", None, "invalid_multipart")
                        form[name] += found.data
            parser.finish()
            out.flush()
            await asyncio.to_thread(os.fsync, out.fileno())
        return {key: value.decode("utf-8", "replace") for key, value in form.items()}, size

    @staticmethod
    def _read(form: dict[str, str], id: str, size: int | None) -> tuple[File, list[str]]:
        fields = Fields(form)
        if size is None:
            fields.need("file")
        filename = fields.text("filename") or "upload"
        fields.need("purpose")
        purpose = fields.text("purpose", 64)
        if purpose not in PURPOSES:
            raise InvalidRequest(
                f"Files for {purpose!r} have no use here; allowed: {', '.join(PURPOSES)}.",
                param="purpose",
                code="unsupported_value",
            )
        now = int(time.time())
        expires = read_expiry(fields.raw("expires_after[anchor]"), fields.raw("expires_after[seconds]"))
        file = File(
            id=id,
            purpose=purpose,
            filename=filename[:255],
            bytes=size or 0,
            created_at=now,
            expires_at=None if expires is None else now + expires,
        )
        return file, fields.rest()


def read_expiry(anchor: Any, seconds: Any, name: str = "expires_after") -> int | None:
    """Seconds a file lives, None for ever. Raises InvalidRequest."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise invalid(f"'{name}.anchor' must be 'created_at'.", f"{name}.anchor", "invalid_value")
    least, most = EXPIRY_S
    if not (isinstance(seconds, int | str) and str(seconds).isdigit() and least <= int(seconds) <= most):
        raise invalid(
            f"'{name}.seconds' must be between {least} and {most}.", f"{name}.seconds", "invalid_value"
        )
    return int(seconds)
