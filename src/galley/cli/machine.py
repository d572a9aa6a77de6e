"""Machine: what this computer has, as the operating system tells it. Measurements are doctor's."""

import os
import platform
from pathlib import Path

import msgspec

from galley.providers.opened import memory_available


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Processor and memory as this process may use them."""

    processor: str
    cores: int
    """Logical processors of the machine."""
    usable_cores: int
    """Those in this process's affinity mask."""
    memory_total: int | None
    """Bytes of the machine; None where the system does not tell."""
    memory_available: int | None
    """Bytes free or reclaimable, within this process's control group: what the memory plan starts from."""

    @classmethod
    def read(cls, proc: Path = Path("/proc")) -> "Machine":
        """Read it now; ``proc`` is replaced in tests."""
        cores = os.cpu_count() or 1
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
        return cls(
            processor=cls._field(proc / "cpuinfo", "model name")
            or platform.processor()
            or platform.machine(),
            cores=cores,
            usable_cores=usable,
            memory_total=cls._kilobytes(cls._field(proc / "meminfo", "MemTotal")),
            memory_available=memory_available(),
        )

    @staticmethod
    def _field(path: Path, name: str) -> str | None:
        """The value of the first ``name: value`` line; None where there is no such file (not Linux)."""
        if not path.is_file():
            return None
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
        return None

    @staticmethod
    def _kilobytes(text: str | None) -> int | None:
        return int(text.split()[0]) * 1024 if text else None
