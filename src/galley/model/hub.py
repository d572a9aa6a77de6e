"""``hf:`` models: a GGUF in a hub repository, by ``huggingface_hub``'s own client."""

import importlib.util
import io
import os
from pathlib import Path
from typing import Any

import msgspec

from galley.errors import InvalidRequest, ModelNotFound
from galley.model.progress import PullPlan
from galley.model.staging import CHUNK, DigestMismatch, Fetched, PullError, Staging, model_name


class HubSource(msgspec.Struct, frozen=True, kw_only=True):
    """A GGUF in a hub repository, by ``huggingface_hub``'s own client (extra ``galley[hf]``)."""

    repo: str
    file: str | None = None
    revision: str | None = None
    endpoint: str | None = None
    token: str | None = None

    def name(self) -> str:
        return model_name(Path(self.file).stem if self.file else self.repo.rpartition("/")[2])

    def plan(self, name: str) -> PullPlan:
        remote = self._remote()
        return PullPlan(
            name=name,
            what=f"{remote.file} of {self.repo} at revision {remote.revision[:12]}",
            origin=f"the model hub{f' {self.endpoint}' if self.endpoint else ''}",
            download_bytes=remote.bytes,
            disk_bytes=remote.bytes,
            license=remote.license,
            sha256=remote.sha256,
        )

    def fetch(self, staging: Staging) -> Fetched:
        hub = _hub()
        remote = self._remote()
        staging.room(remote.bytes)
        # Named by content: what a killed pull left of other bytes is never gone on with.
        path = staging.folder / f"{remote.sha256 or remote.revision}.gguf.part"
        staging.progress.phase("Downloading", remote.bytes)
        try:
            url = hub.hf_hub_url(self.repo, remote.file, revision=remote.revision, endpoint=self.endpoint)
            headers = hub.utils.build_hf_headers(token=self.token)
            with Counted(path, staging, remote.bytes) as file:
                # hf_hub_download would name its partial file anew in every process and never find it again.
                hub.file_download.http_get(
                    url,
                    file,
                    resume_size=file.tell(),
                    headers=headers,
                    expected_size=remote.bytes,
                    tqdm_class=_silent(),
                )
                os.fsync(file.fileno())
        except Exception as error:
            raise self._refusal(error) from error
        got = staging.digest(path, "Verifying")
        if path.stat().st_size != remote.bytes or (remote.sha256 and got != remote.sha256):
            size = path.stat().st_size
            path.unlink()
            raise DigestMismatch(
                f"{remote.file}: the hub promised {remote.bytes:,} bytes with sha256 {remote.sha256}; "
                f"{size:,} bytes with {got} arrived. They were deleted."
            )
        return Fetched(path=path, sha256=got, revision=remote.revision, license=remote.license)

    def _remote(self) -> "_RemoteFile":
        api = _hub().HfApi(endpoint=self.endpoint, token=self.token)
        try:
            info = api.model_info(self.repo, revision=self.revision, files_metadata=True)
        except Exception as error:
            raise self._refusal(error) from error
        files = {item.rfilename: item for item in info.siblings or () if item.rfilename.endswith(".gguf")}
        wanted = self.file
        if wanted is None:
            if len(files) != 1:
                listed = ", ".join(sorted(files)[:12]) or "none"
                raise InvalidRequest(
                    f"{self.repo} holds {len(files)} GGUF files: {listed}.",
                    hint=f"name one: galley pull hf:{self.repo}/FILE",
                )
            wanted = next(iter(files))
        if wanted not in files:
            raise ModelNotFound(f"hf:{self.repo}/{wanted}", nearest=sorted(files)[:5])
        item = files[wanted]
        if item.size is None:
            raise PullError(f"The hub does not say how large {wanted} is.")
        card = info.card_data or {}
        return _RemoteFile(
            file=wanted,
            revision=str(info.sha),
            bytes=int(item.size),
            sha256=item.lfs.sha256 if item.lfs else None,
            license=card.get("license"),
        )

    def _refusal(self, error: Exception) -> Exception:
        """The hub client's errors, as ours: what is missing is a missing model, the rest is upstream."""
        kind = type(error).__name__
        if isinstance(error, PullError | ModelNotFound | KeyboardInterrupt):
            return error
        if kind in _HUB_MISSING:
            return ModelNotFound(f"hf:{self.repo}", hint="a private or gated repository needs HF_TOKEN")
        return PullError(f"The model hub failed for {self.repo}: {kind}: {str(error)[:500]}")


_HUB_MISSING = {
    "RepositoryNotFoundError",
    "RevisionNotFoundError",
    "EntryNotFoundError",
    "RemoteEntryNotFoundError",
}


class _RemoteFile(msgspec.Struct, frozen=True, kw_only=True):
    file: str
    revision: str
    bytes: int
    sha256: str | None
    license: str | None


def _hub() -> Any:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise PullError("hf: models need the package huggingface_hub.", hint="pip install 'galley[hf]'")
    import huggingface_hub
    import huggingface_hub.file_download

    # Without this it asks the hub for a list of other programs before every pull, to name them in its header.
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    return huggingface_hub


def _silent() -> Any:
    """A progress class for the hub's client that draws nothing: Counted tells ours."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]  # comes with the hub client

    class Bar(tqdm):  # type: ignore[type-arg,misc,unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)

    return Bar


class Counted(io.FileIO):
    """A partial file, open at its end; every mebibyte that reached it is progress.

    Args:
        total: bytes of the whole; a partial file that is longer is begun anew.
    """

    def __init__(self, path: Path, staging: Staging, total: int) -> None:
        super().__init__(path, "r+" if path.exists() else "w+")
        self._staging = staging
        self._told = self.seek(0, os.SEEK_END)
        if self._told > total:
            self._told = self.seek(0)
            self.truncate()
        staging.progress.advance(self._told)

    def write(self, data: Any) -> int:
        """All of it, unlike a raw file. Raises OSError."""
        rest = memoryview(data)
        size = len(rest)
        while rest:
            done = super().write(rest[:CHUNK])
            rest = rest[done:]
            # A server without ranges starts again from zero: progress never falls.
            self._told = max(self._told, self.tell())
            self._staging.progress.advance(self._told)
        return size
