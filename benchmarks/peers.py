"""The engines that are compared with Galley: how each is installed, started and described.

``python -m benchmarks.peers`` installs every peer into ``.bench/`` and prints what it got. To add one: a
class with ``install``, ``start`` and ``describe``, and a driver that speaks ``benchmarks.protocol``.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, Protocol

import click

from benchmarks.protocol import Driver
from benchmarks.report import ROOT

__all__ = ["BENCH", "PEERS", "LlamaCpp", "Peer"]

BENCH = ROOT / ".bench"
"""Everything the harness downloads or builds; not in version control."""


class Peer(Protocol):
    """What the harness needs of a peer."""

    name: str

    def install(self) -> None:
        """Download and build what is missing. Idempotent."""
        ...

    def start(self) -> Driver:
        """A fresh driver process. Raises FileNotFoundError when not installed."""
        ...

    def describe(self) -> dict[str, Any]:
        """Version, source, digest and flags, for the results."""
        ...


class LlamaCpp:
    """llama.cpp from the source inside the llama-cpp-python sdist, built for this very CPU.

    A binary wheel would be compiled for a common denominator; a peer deserves all its instructions.
    """

    name = "llama.cpp"
    package = "llama-cpp-python"
    version = "0.3.36"
    sha256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
    options = (
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_NATIVE=ON",
        "-DGGML_OPENMP=ON",
        "-DBUILD_SHARED_LIBS=ON",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_SERVER=OFF",
    )

    def __init__(
        self, folder: Path = BENCH, *, source: Path | None = None, build: Path | None = None
    ) -> None:
        """``source`` and ``build``: an unpacked llama.cpp and its finished build, instead of our own."""
        self._folder = folder
        self._sdist = folder / "llamacpp" / f"llama_cpp_python-{self.version}.tar.gz"
        unpacked = folder / "llamacpp" / f"llama_cpp_python-{self.version}" / "vendor" / "llama.cpp"
        self.source = source or unpacked
        self.build = build or folder / "llamacpp" / "build"
        self.driver = folder / "llamacpp-driver"

    @property
    def quantize(self) -> Path:
        """The ``llama-quantize`` program (``make_models`` needs it)."""
        return self.build / "bin" / "llama-quantize"

    def install(self) -> None:
        """Raises ValueError for a wrong digest, CalledProcessError when a build step fails."""
        if not self.source.exists():
            self._download()
            with tarfile.open(self._sdist) as archive:
                archive.extractall(self._sdist.parent, filter="data")
        library = self.build / "bin" / "libllama.so"
        if not (library.exists() and self.quantize.exists()):
            subprocess.run(
                ["cmake", "-S", str(self.source), "-B", str(self.build), *self.options], check=True
            )
            jobs = str(len(os.sched_getaffinity(0)))
            targets = ["llama", "llama-quantize"]
            subprocess.run(
                ["cmake", "--build", str(self.build), "-j", jobs, "--target", *targets], check=True
            )
        code = Path(__file__).resolve().parent / "native" / "llamacpp_driver.cpp"
        newest = max(code.stat().st_mtime, library.stat().st_mtime)
        if not self.driver.exists() or self.driver.stat().st_mtime < newest:
            self._folder.mkdir(parents=True, exist_ok=True)
            include = [f"-I{self.source / 'include'}", f"-I{self.source / 'ggml' / 'include'}"]
            link = [f"-L{library.parent}", f"-Wl,-rpath,{library.parent}", "-lllama", "-lggml", "-lggml-base"]
            flags = ["-O3", "-march=native", "-std=c++20"]
            subprocess.run(["g++", *flags, *include, str(code), "-o", str(self.driver), *link], check=True)

    def _download(self) -> None:
        self._sdist.parent.mkdir(parents=True, exist_ok=True)
        if not self._sdist.exists():
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:"]
            target = f"{self.package}=={self.version}"
            subprocess.run([*pip, "--dest", str(self._sdist.parent), target], check=True)
        with self._sdist.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise ValueError(f"{self._sdist} has sha256 {digest}, expected {self.sha256}")

    def start(self) -> Driver:
        if not self.driver.exists():
            raise FileNotFoundError(f"{self.driver}: run python -m benchmarks.peers first")
        return Driver(self.name, [str(self.driver)])

    def describe(self) -> dict[str, Any]:
        with self.start() as driver:
            hello = driver.ask("hello")
        source = f"{self.package} {self.version} sdist, sha256 {self.sha256}"
        return {**hello, "source": source, "options": list(self.options), "n_batch": 2048, "n_ubatch": 512}


PEERS: dict[str, type[LlamaCpp]] = {"llama.cpp": LlamaCpp}
"""By name. One for now."""


@click.command()
@click.option(
    "--llamacpp-source", type=click.Path(exists=True, path_type=Path), help="An unpacked llama.cpp."
)
@click.option(
    "--llamacpp-build", type=click.Path(exists=True, path_type=Path), help="Its finished native build."
)
def main(llamacpp_source: Path | None, llamacpp_build: Path | None) -> None:
    """Install the peers into .bench/ (downloads a 77 MB source archive and compiles for some minutes)."""
    if (llamacpp_source is None) != (llamacpp_build is None):
        raise click.UsageError("--llamacpp-source and --llamacpp-build belong together")
    peer = LlamaCpp(source=llamacpp_source, build=llamacpp_build)
    peer.install()
    click.echo(peer.describe())


if __name__ == "__main__":
    main()
