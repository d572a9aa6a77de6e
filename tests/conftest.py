"""What every test gets: no network beyond loopback, no settings of the user's, the real model where it is."""

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from galley.errors import GalleyError
from galley.model.store import Store

MODEL = "smollm2-135m"
HOME = Path(os.environ.get("GALLEY_HOME") or Path(__file__).parents[1] / ".galley").absolute()
"""Where ``make test`` keeps the model; read before the environment is cleaned below."""
REQUIRED = os.environ.get("GALLEY_REQUIRE_MODEL", "") not in {"", "0"}


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF of SmolLM2-135M-Instruct. Missing, it fails under ``make test`` and skips elsewhere."""
    try:
        return Store(HOME).resolve(MODEL).path
    except GalleyError as error:
        reason = f"{MODEL} is not in {HOME} ({error.message}); `make test` pulls it"
        if REQUIRED:
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def smollm2_home(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home of this test run's own in which the model is registered, so that receipts land there."""
    home = tmp_path_factory.mktemp("home")
    Store(home).pull(f"file:{smollm2_path}", name=MODEL)
    return home


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads the user's settings or writes into the user's home."""
    for name in list(os.environ):
        if name.startswith("GALLEY_") and name not in {"GALLEY_BACKEND", "GALLEY_ISA"}:
            monkeypatch.delenv(name)
    monkeypatch.setenv("GALLEY_HOME", str(tmp_path / "home"))


def _outside(address: Any) -> bool:
    """Whether a socket address leaves this machine. Names count as outside, save localhost."""
    if not isinstance(address, tuple):
        return False  # AF_UNIX
    try:
        return not ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return address[0] not in {"localhost", ""}


@pytest.fixture(autouse=True, scope="session")
def _loopback_only() -> Iterator[None]:
    """Connections and look-ups beyond loopback fail at once, in every thread of this process."""
    patch = pytest.MonkeyPatch()
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse(address: Any) -> None:
        if _outside(address):
            raise RuntimeError(f"a test tried to reach {address!r}; tests stay on this machine")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        refuse(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        refuse(address)
        return connect_ex(self, address)

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        # Wildcard addresses are for binding, which is looked up but never reached.
        if host not in {None, "", "0.0.0.0", "::"}:
            refuse((host.decode() if isinstance(host, bytes) else host, 0))
        return lookup(host, *args, **kwargs)

    patch.setattr(socket.socket, "connect", guarded_connect)
    patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    patch.setattr(socket, "getaddrinfo", guarded_lookup)
    yield
    patch.undo()
