"""Machine: what this computer has, as the operating system tells it. Measurements are doctor's."""

import os
import platform
from pathlib import Path

import msgspec


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Processor and memory as this process may use them."""

    processor: str
    cores: int
    """Logical processors of the machine."""
    usable_cores: int
    """Those in this process's affinity mask."""
    memory_total: int | None
    """Bytes; None where the system does not tell."""
    memory_available: int | None
    """Bytes free or reclaimable, within this process's control group."""

    @classmethod
    def read(cls, root: Path = Path("/")) -> "Machine":
        """Read ``/proc`` and ``/sys``; ``root`` is replaced in tests."""
        cores = os.cpu_count() or 1
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
        total, available = cls._memory(root)
        return cls(
            processor=cls._processor(root),
            cores=cores,
            usable_cores=usable,
            memory_total=total,
            memory_available=available,
        )

    @staticmethod
    def _processor(root: Path) -> str:
        try:
            for line in (root / "proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass  # Not Linux: the platform module knows a name, if not the best one.
        return platform.processor() or platform.machine()

    @staticmethod
    def _memory(root: Path) -> tuple[int | None, int | None]:
        try:
            lines = (root / "proc/meminfo").read_text().splitlines()
        except OSError:
            return None, None
        table = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        total, available = table.get("MemTotal"), table.get("MemAvailable")
        group = root / "sys/fs/cgroup"
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
        except (OSError, ValueError):
            return total, available
        if limit != "max" and available is not None and total is not None:
            # A container may have far less than the machine it runs on.
            total = min(total, int(limit))
            available = min(available, max(0, int(limit) - used))
        return total, available
