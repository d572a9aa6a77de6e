"""An environment of its own for one peer, with pinned packages from the package registry."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

__all__ = ["Venv"]


class Venv:
    """A virtual environment in ``folder`` holding exactly ``requirements`` and what they need."""

    def __init__(
        self, folder: Path, requirements: Sequence[str], *, megabytes: int, remove: Sequence[str] = ()
    ) -> None:
        """``megabytes``: about what is downloaded, told before. ``remove``: packages to take out again."""
        self.folder = folder
        self.requirements = list(requirements)
        self.megabytes = megabytes
        self._remove = list(remove)
        self._record = folder / "installed.json"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def ready(self) -> bool:
        """Whether the pinned packages are installed."""
        return self._record.exists() and json.loads(self._record.read_text())["pins"] == self.requirements

    def install(self) -> None:
        """Make it unless it is ready. Raises CalledProcessError when the installer fails."""
        if self.ready:
            return
        pins = " ".join(self.requirements)
        click.echo(f"about {self.megabytes} MB to download into {self.folder}: {pins}", err=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(self.folder)], check=True)
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--prefer-binary", *self.requirements], check=True)
        if self._remove:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *self._remove], check=True)
        listed = subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True, text=True)
        packages = {p["name"]: p["version"] for p in json.loads(listed.stdout)}
        record = {"pins": self.requirements, "packages": packages}
        self._record.write_text(json.dumps(record, indent=1) + "\n")

    def packages(self) -> dict[str, str]:
        """Name and version of everything installed. Raises FileNotFoundError before ``install``."""
        found: dict[str, str] = json.loads(self._record.read_text())["packages"]
        return found
