"""Store: the models on this machine. A model is listed when, and only when, its whole file is there."""

import contextlib
import difflib
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from galley.errors import BadModelFile, ConfigError, GalleyError, InvalidRequest, ModelNotFound
from galley.model.progress import Progress, Silence
from galley.model.sources import ALIASES, SECOND_NAMES, FileSource, Source, parse_source
from galley.model.staging import MARK, Fetched, Staging, model_name

ENTRY = "entry.json"
UNREADABLE = "(its entry could not be read)"
MAGIC = b"GGUF"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One model: where it lies and what it is known to be."""

    name: str
    path: Path
    sha256: str | None
    """Of the GGUF file. None for a path that was never pulled, or that changed since."""
    bytes: int
    source: str
    license: str | None = None
    pulled_at: float = 0.0
    """Unix seconds; 0 for a path that was never pulled."""
    aliases: tuple[str, ...] = ()
    mtime_ns: int = 0
    in_place: bool = False
    """The file belongs to the user: ``remove`` forgets it and leaves it alone."""
    package_sha256: str | None = None
    revision: str | None = None


class NameTaken(GalleyError):
    """The store has another model under this name."""

    status = 409
    type = "invalid_request_error"
    code = "name_taken"
    exit_code = 2


class Store:
    """Models under ``home/models/NAME/``: the file and, written last, its ``entry.json``.

    The entry is written to a temporary name, synced and renamed, so a crash leaves either no entry or a
    whole one (and with it the whole file). Safe for several processes at once. A file of the store's own is
    the one beside its entry, wherever the home has been moved to.
    """

    def __init__(self, home: Path, *, hf_endpoint: str | None = None, hf_token: str | None = None) -> None:
        self.home = home
        self.models = home / "models"
        self._hf_endpoint = hf_endpoint
        self._hf_token = hf_token

    def list(self) -> "list[Entry]":
        """All models, by name. Raises BadModelFile for an entry that cannot be read."""
        entries, faults = self.survey()
        if faults:
            raise faults[0]
        return [*entries]

    def survey(self) -> tuple[Sequence[Entry], Sequence[BadModelFile]]:
        """All models that can be read, by name, and what is wrong with the others."""
        entries: list[Entry] = []
        faults: list[BadModelFile] = []
        for path in sorted(self.models.glob(f"*/{ENTRY}")):
            try:
                entries.append(self._read(path))
            except BadModelFile as error:
                faults.append(error)
        return entries, faults

    def resolve(self, name_or_path: str) -> Entry:
        """The model a user means: a stored name, an alias of one, or a path to a GGUF file.

        Raises ModelNotFound with the nearest names, BadModelFile when the file changed size since the pull.
        """
        name = SECOND_NAMES.get(name_or_path, name_or_path)
        if self._valid(name) and (self.models / name / ENTRY).is_file():
            return self._check(self._read(self.models / name / ENTRY))
        path = Path(name_or_path.removeprefix("file:")).expanduser()
        if path.is_file():
            path = path.absolute()
            stat = path.stat()
            return Entry(
                name=model_name(path.stem),
                path=path,
                sha256=None,
                bytes=stat.st_size,
                source=f"file:{path}",
                mtime_ns=stat.st_mtime_ns,
                in_place=True,
            )
        known = {entry.name for entry in self.survey()[0]}
        near = difflib.get_close_matches(
            name.lower(), sorted({*known, *ALIASES, *SECOND_NAMES}), n=3, cutoff=0.5
        )
        if name in ALIASES:
            raise ModelNotFound(name_or_path, hint=f"galley pull {name}")
        missing = [one for one in near if SECOND_NAMES.get(one, one) not in known]
        hint = f"galley pull {missing[0]}" if missing else "galley list; galley pull NAME"
        raise ModelNotFound(name_or_path, nearest=near, hint=hint)

    def pull(self, ref: str, progress: Progress | None = None, *, name: str | None = None) -> Entry:
        """Bring a model here: an alias, ``pypi:``, ``file:`` or ``hf:`` reference, or a path.

        Idempotent: a model that is here from the same source is returned as it is. Interrupted at any
        point, it leaves nothing in ``list`` and can be called again. Raises PullError, DigestMismatch,
        ModelNotFound, NameTaken, InvalidRequest, BadModelFile, and ConfigError when the store cannot be
        written.
        """
        progress = progress or Silence()
        source, proposed = self._source(ref)
        name = name or proposed
        if not self._valid(name):
            raise InvalidRequest(
                f"{name!r} is not a model name (a-z, 0-9, '.', '_', '-').",
                hint=f"--name {model_name(name)} would do",
            )
        label = self._label(ref, source)
        # One lock a name, so that two sources pulled under one name cannot mix either.
        with self._writing(), Staging(self.home / "staging" / name, progress) as staging:
            here = self._here(name, label)
            if here is not None:
                progress.note(f"{name} is here already: {here.path}")
                staging.clear()
                return here
            progress.plan(source.plan(name))
            self._own_staging(staging, label)
            fetched = source.fetch(staging)
            try:
                self._magic(fetched.path)
                self._whole(fetched.path)
            except BadModelFile:
                staging.clear()  # the next pull would find the same
                raise
            entry = self._keep(name, label, fetched)
            staging.clear()
            return entry

    def remove(self, name: str) -> Entry:
        """Forget a model and delete its file, unless the file is the user's own; also one whose entry is
        damaged. Raises ModelNotFound, and ConfigError when the store cannot be written."""
        name = SECOND_NAMES.get(name, name)
        folder = self.models / name
        if not self._valid(name) or not (folder / ENTRY).is_file():
            near = difflib.get_close_matches(
                name, [entry.name for entry in self.survey()[0]], n=3, cutoff=0.5
            )
            raise ModelNotFound(name, nearest=near, hint="galley list")
        try:
            entry = self._read(folder / ENTRY)
        except BadModelFile:
            held = sum(path.stat().st_size for path in folder.iterdir())
            entry = Entry(name=name, path=folder, sha256=None, bytes=held, source=UNREADABLE)
        with self._writing():
            # The entry goes first: from here on the model is not listed, whatever happens to the rest.
            (folder / ENTRY).unlink()
            _sync_folder(folder)
            shutil.rmtree(folder)
        return entry

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What the system refuses, as a typed error that says what to do."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{error.filename or self.home}: {error.strerror or error}",
                param="home",
                hint=f"models are kept in {self.home}: make it yours, or set GALLEY_HOME (--home)",
            ) from error

    def _source(self, ref: str) -> tuple[Source, str]:
        name = SECOND_NAMES.get(ref, ref)
        if name in ALIASES:
            return ALIASES[name], name
        source = parse_source(ref, hf_endpoint=self._hf_endpoint, hf_token=self._hf_token)
        if isinstance(source, FileSource) and not ref.startswith("file:") and not source.path.is_file():
            near = difflib.get_close_matches(ref.lower(), [*ALIASES, *SECOND_NAMES], n=3, cutoff=0.5)
            raise ModelNotFound(
                ref, nearest=near, hint="galley pull takes an alias, pypi:…, hf:ORG/REPO or a path"
            )
        alias = next((alias for alias, row in ALIASES.items() if row == source), None)
        return source, alias or source.name()

    @staticmethod
    def _label(ref: str, source: Source) -> str:
        """How the origin is recorded: aliases by what they stand for, never by themselves."""
        if isinstance(source, FileSource):
            return f"file:{source.path}"
        alias = ALIASES.get(SECOND_NAMES.get(ref, ref))
        return f"pypi:{alias.package}=={alias.version}" if alias else ref

    def _here(self, name: str, label: str) -> Entry | None:
        path = self.models / name / ENTRY
        if not path.is_file():
            return None
        entry = self._read(path)
        if entry.source != label:
            raise NameTaken(
                f"The name {name!r} is taken by {entry.source}.",
                hint=f"galley pull {label} --name OTHER, or galley rm {name}",
            )
        if entry.in_place and (not entry.path.is_file() or entry.path.stat().st_mtime_ns != entry.mtime_ns):
            return None  # The user's file changed: register it anew.
        return self._check(entry)

    @staticmethod
    def _own_staging(staging: Staging, label: str) -> None:
        """Leftovers of another source pulled under the same name are of no use here."""
        mark = staging.folder / MARK
        if mark.is_file() and mark.read_text(encoding="utf-8") == label:
            return
        staging.clear()
        staging.folder.mkdir(parents=True)
        mark.write_text(label, encoding="utf-8")

    @staticmethod
    def _magic(path: Path) -> None:
        with path.open("rb") as file:
            head = file.read(4)
        if head != MAGIC:
            raise BadModelFile(
                str(path), "magic", f"expected {MAGIC!r}, found {head!r}", hint="galley reads GGUF files"
            )

    @staticmethod
    def _whole(path: Path) -> None:
        """Raise BadModelFile for a header that cannot be read or a tensor that ends past the file."""
        from galley.model.gguf import GGUF  # with numpy: only who pulls needs it

        GGUF.open(path).close()

    def _keep(self, name: str, label: str, fetched: Fetched) -> Entry:
        folder = self.models / name
        folder.mkdir(parents=True, exist_ok=True)
        path = fetched.path
        if not fetched.in_place:
            path = folder / "model.gguf"
            os.replace(fetched.path, path)
            _sync_folder(folder)
        stat = path.stat()
        entry = Entry(
            name=name,
            path=path,
            sha256=fetched.sha256,
            bytes=stat.st_size,
            source=label,
            license=fetched.license,
            pulled_at=time.time(),
            aliases=tuple(alias for alias, target in SECOND_NAMES.items() if target == name),
            mtime_ns=stat.st_mtime_ns,
            in_place=fetched.in_place,
            package_sha256=fetched.package_sha256,
            revision=fetched.revision,
        )
        draft = folder / f"{ENTRY}.{os.getpid()}"
        with draft.open("wb") as file:
            written = entry if entry.in_place else msgspec.structs.replace(entry, path=Path(path.name))
            file.write(msgspec.json.format(msgspec.json.encode(written, enc_hook=str), indent=2))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, folder / ENTRY)
        _sync_folder(folder)
        return entry

    @staticmethod
    def _read(path: Path) -> Entry:
        try:
            entry = msgspec.json.decode(path.read_bytes(), type=Entry, dec_hook=lambda kind, text: kind(text))
            if entry.in_place:
                return entry
            return msgspec.structs.replace(entry, path=path.parent / entry.path.name)
        except (msgspec.DecodeError, OSError) as error:
            name = path.parent.name
            raise BadModelFile(
                str(path), "entry", str(error), hint=f"delete {path.parent} and galley pull {name}"
            ) from error

    @staticmethod
    def _check(entry: Entry) -> Entry:
        try:
            stat = entry.path.stat()
        except FileNotFoundError as error:
            raise ModelNotFound(
                entry.name,
                hint=f"its file {entry.path} is gone: galley rm {entry.name}, galley pull {entry.source}",
            ) from error
        if stat.st_size != entry.bytes:
            raise BadModelFile(
                str(entry.path),
                "size",
                f"{stat.st_size:,} bytes; it was {entry.bytes:,} when pulled",
                hint=f"galley rm {entry.name}, then galley pull {entry.source}",
            )
        if stat.st_mtime_ns != entry.mtime_ns:
            return msgspec.structs.replace(entry, sha256=None, mtime_ns=stat.st_mtime_ns)
        return entry

    @staticmethod
    def _valid(name: str) -> bool:
        return re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,127}", name) is not None


def _sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
