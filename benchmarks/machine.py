"""The machine: what it is, and what it can do at this moment."""

import json
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from galley.bench import machine
from galley.runtime.processors import Busy

__all__ = ["Busy", "Limits", "Probe", "facts"]

NATIVE = Path(__file__).resolve().parent / "native"


class Limits(msgspec.Struct, frozen=True):
    """One reading of the probe (``native/probe.cpp``)."""

    roundtrip_ns: float
    """One cache line from core to core and back; tells which chiplets the virtual cores sit on."""
    megabytes: float
    """Size of the buffer read: that of the model, so that the caches help both alike."""
    threads: int
    read_1_gb_s: float
    read_gb_s: float
    """All threads together, each its own contiguous part."""
    int8_1_gop_s: float
    int8_gop_s: float
    int8_op: str


class Probe:
    """The probe program, built on first use."""

    def __init__(self, folder: Path) -> None:
        """``folder``: where the binary is kept. Raises CalledProcessError when it cannot be built."""
        self._binary = folder / "probe"
        source = NATIVE / "probe.cpp"
        if not self._binary.exists() or self._binary.stat().st_mtime < source.stat().st_mtime:
            folder.mkdir(parents=True, exist_ok=True)
            command = [
                "g++",
                "-O3",
                "-march=native",
                "-std=c++20",
                "-pthread",
                str(source),
                "-o",
                str(self._binary),
            ]
            subprocess.run(command, check=True)

    def take(self, megabytes: float, *, threads: int, seconds: float = 0.04) -> Limits:
        """Read the limits for a buffer of ``megabytes`` (1e6 bytes). Takes about 13 * ``seconds``."""
        command = [str(self._binary), f"{megabytes:.3f}", f"{seconds:.3f}", str(threads)]
        reply = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return msgspec.convert(json.loads(reply), Limits)


def facts() -> dict[str, Any]:
    """What ``galley bench`` says of the machine, and the compiler that built the probe."""
    compiler = subprocess.run(
        ["g++", "-dumpfullversion"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return {**machine.facts(), "compiler": f"g++ {compiler}"}
