"""The machine: what it is, and what it can do at this moment."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import msgspec

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


class Busy(msgspec.Struct, frozen=True):
    """Processor time of the whole machine so far, in seconds (resolution: one tick, 10 ms)."""

    used: float
    """User, nice, system and interrupts, of all processes."""
    stolen: float
    """Ready to run, but the host ran somebody else."""

    @classmethod
    def now(cls) -> "Busy":
        """Read ``/proc/stat``."""
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        tick = 1.0 / os.sysconf("SC_CLK_TCK")
        user, nice, system, _idle, _iowait, irq, soft, steal = (int(f) * tick for f in fields[:8])
        return cls(used=user + nice + system + irq + soft, stolen=steal)

    def __sub__(self, earlier: "Busy") -> float:
        """Seconds used or stolen since ``earlier``."""
        return self.used - earlier.used + self.stolen - earlier.stolen


def facts() -> dict[str, Any]:
    """CPU model, instruction sets that matter, cores, memory, kernel, compiler, Python."""
    cpu: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        cpu.setdefault(name.strip(), value.strip())
    flags = set(cpu.get("flags", cpu.get("Features", "")).split())
    wanted = (
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512_vnni",
        "avx512_bf16",
        "amx_int8",
        "asimddp",
        "i8mm",
    )
    memory = Path("/proc/meminfo").read_text().split("\n", 1)[0].split()[1]
    compiler = subprocess.run(
        ["g++", "-dumpfullversion"], check=True, capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cpu_family_model_stepping": [cpu.get(k) for k in ("cpu family", "model", "stepping")],
        "cache": cpu.get("cache size"),
        "cores": sum(
            1 for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("processor")
        ),
        "isa": [f for f in wanted if f in flags],
        "virtual": "hypervisor" in flags,
        "memory_gb": round(int(memory) / 1e6, 1),
        "kernel": platform.release(),
        "compiler": f"g++ {compiler}",
        "python": platform.python_version(),
    }
