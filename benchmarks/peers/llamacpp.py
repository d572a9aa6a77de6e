"""llama.cpp, built for this CPU from the source in a registry package: libllama and its server."""

import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import click

from benchmarks.peers.base import BENCH, SERVED_TOKENS, SLOTS, Model, Peer, Unsupported
from benchmarks.protocol import Driver
from benchmarks.server import Server, free_port

__all__ = ["LlamaCpp"]

NATIVE = Path(__file__).resolve().parent.parent / "native"


class LlamaCpp(Peer):
    """llama.cpp from the source inside the llama-cpp-python sdist, built for this very CPU.

    A binary wheel would be compiled for a common denominator; a peer deserves all its instructions.
    """

    name = "llama.cpp"
    reads_gguf = True
    refused: ClassVar = {"shared": "libllama shares no prefixes by itself: see its server over HTTP"}
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
        "-DLLAMA_BUILD_SERVER=ON",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_OPENSSL=OFF",
    )
    megabytes = 77
    """Of the source archive."""

    def __init__(
        self, folder: Path = BENCH, *, source: Path | None = None, build: Path | None = None
    ) -> None:
        """``source`` and ``build``: an unpacked llama.cpp and its finished build, instead of our own."""
        self._folder = folder
        self._sdist = folder / "llamacpp" / f"llama_cpp_python-{self.version}.tar.gz"
        unpacked = folder / "llamacpp" / f"llama_cpp_python-{self.version}" / "vendor" / "llama.cpp"
        self.source = source or unpacked
        self.build = build or folder / "llamacpp" / "build"
        # Somebody else's build, given or linked: used as it is, perhaps without the server.
        self._finished = build is not None or self.build.is_symlink()
        self.driver = folder / "llamacpp-driver"

    @property
    def server(self) -> Path:
        """The ``llama-server`` program."""
        return self.build / "bin" / "llama-server"

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
        wanted = (library, self.quantize, self.server)
        if not self._finished and not all(path.exists() for path in wanted):
            subprocess.run(
                ["cmake", "-S", str(self.source), "-B", str(self.build), *self.options], check=True
            )
            jobs = str(len(os.sched_getaffinity(0)))
            targets = ["llama", "llama-quantize", "llama-server"]
            subprocess.run(
                ["cmake", "--build", str(self.build), "-j", jobs, "--target", *targets], check=True
            )
        code = NATIVE / "llamacpp_driver.cpp"
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
            click.echo(
                f"{self.megabytes} MB to download: {self.package} {self.version}, its source", err=True
            )
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

    def prepare(self, model: Model) -> Path:
        return model.gguf

    def serve(self, model: Model, threads: int) -> Server:
        """llama-server with a unified KV buffer, which its slots share, and automatic prompt cache."""
        if not self.server.exists():
            raise Unsupported("this build of llama.cpp has no llama-server")
        port = free_port()
        command = [str(self.server), "--model", str(model.gguf), "--port", str(port), *self.serving(threads)]
        return Server(self.name, command, port=port, log=self._folder / "llama-server.log")

    def serving(self, threads: int) -> list[str]:
        """Flags of llama-server."""
        room = ["--ctx-size", str(SERVED_TOKENS), "--parallel", str(SLOTS), "--kv-unified"]
        return ["--threads", str(threads), *room]

    def describe(self) -> dict[str, Any]:
        with self.start() as driver:
            hello = driver.ask("hello")
        source = f"{self.package} {self.version} sdist, sha256 {self.sha256}"
        return {
            **hello,
            "source": source,
            "options": list(self.options),
            "n_batch": 2048,
            "n_ubatch": 512,
            "serving": self.serving(2),
        }
