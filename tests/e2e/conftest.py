"""A whole server over a tiny random model, in a thread of the test process."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from galley import config
from galley.endpoint.serve import Server
from galley.model.store import Store
from galley.providers.opened import EngineOptions, Opened, disk_options
from tests.tiny import tiny_gguf


class TinyServer:
    """``galley serve`` without the process: same Server, same socket, its own event loop in a thread."""

    def __init__(self, home: Path, model: Path, **flags: object) -> None:
        settings = {"home": home, "model": str(model), "port": 0, "kv_memory": 8 << 20, "threads": 1} | flags
        self.config = config.load(settings, env={})
        entry = Store(home).resolve(str(model))
        self.model = entry.name
        self.opened: Opened | None = None
        names = EngineOptions.__struct_fields__
        options = EngineOptions(**{name: getattr(self.config.engine, name) for name in names})

        def open_model() -> Opened:
            disk = disk_options(self.config) if "disk_bytes" in flags else None
            self.opened = Opened(entry.path, entry.name, options, disk=disk)
            return self.opened

        self.server = Server(self.config, entry, open_model, drain_s=5)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            self.loop = runner.get_loop()
            runner.run(self.server.run())

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def engine(self):
        assert self.opened is not None
        return self.opened.engine

    def start(self) -> "TinyServer":
        self.thread.start()
        deadline = time.monotonic() + 60
        while self.server.router.state != "ready":
            assert self.server.router.state == "loading" and time.monotonic() < deadline, (
                self.server.router.failure
            )
            time.sleep(0.01)
        return self

    def idle(self, within_s: float = 20) -> None:
        """Wait until nothing runs any more."""
        deadline = time.monotonic() + within_s
        while self.server.router.active or self.engine.stats().running or self.engine.stats().waiting:
            assert time.monotonic() < deadline, f"still busy: {self.engine.stats()}"
            time.sleep(0.01)

    def stop(self) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.server.stop)
        self.thread.join(30)
        assert not self.thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", "llama", seed=7)


@pytest.fixture
def tiny_serve(tmp_path: Path, tiny_path: Path) -> Iterator[Callable[..., TinyServer]]:
    """Start servers with settings of the test's own."""
    started: list[TinyServer] = []

    def start(**flags: object) -> TinyServer:
        started.append(TinyServer(tmp_path, tiny_path, **flags).start())
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Iterator[TinyServer]:
    """One server for all tests of a module."""
    server = TinyServer(tmp_path_factory.mktemp("home"), tiny_path).start()
    yield server
    server.stop()
