"""Machine: what this computer has, as the operating system tells it. Measurements are doctor's."""

from pathlib import Path

import msgspec

from galley.providers.opened import memory_available
from galley.runtime.processors import Processors


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Processor and memory as this process may use them."""

    processor: str
    cores: int
    """Logical processors of the machine."""
    usable_cores: int
    """Those in this process's affinity mask."""
    affinity: tuple[int, ...]
    """Their numbers."""
    physical_cores: tuple[tuple[int, ...], ...]
    """The usable ones, by the physical core they share."""
    quota: float | None
    """Processors' worth of time that the control groups allow; None is no limit."""
    quota_from: str | None
    memory_total: int | None
    """Bytes of the machine; None where the system does not tell."""
    memory_available: int | None
    """Bytes free or reclaimable, within this process's control group: what the memory plan starts from."""

    @classmethod
    def read(cls, proc: Path = Path("/proc")) -> "Machine":
        """Read it now; ``proc`` is replaced in tests."""
        processors = Processors.read()
        return cls(
            processor=processors.name,
            cores=processors.cores,
            usable_cores=len(processors.usable),
            affinity=processors.usable,
            physical_cores=processors.physical,
            quota=processors.quota,
            quota_from=processors.quota_from,
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
