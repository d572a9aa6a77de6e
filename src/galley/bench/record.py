"""A result as it is kept: figures with everything that a reader needs to judge and to repeat them."""

import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from galley.bench.machine import Placement, commit, facts
from galley.runtime.processors import Busy

__all__ = ["Recorder", "save"]


class Recorder:
    """Made before a benchmark, ``stop``ped after it, then asked for the record.

    Args:
        kind: which benchmark. command: its command line.
        threads: for the probes. seconds: a probe's length, about.
        servers: processor time used so far by each server that belongs to the measurement; None when one of
            them is not ours, and what others did cannot be told from what it did.
    """

    def __init__(
        self,
        kind: str,
        command: Sequence[str],
        *,
        threads: int,
        seconds: float = 0.5,
        servers: Sequence[Callable[[], float]] | None = (),
    ) -> None:
        self._kind = kind
        self._command = list(command)
        self._threads = threads
        self._seconds = seconds
        self._servers = servers
        self._taken = datetime.now(UTC)
        self.before = Placement.probe(threads, seconds=seconds)
        self.after: Placement | None = None
        self.others: float | None = None
        """Processors that other processes and the host kept busy, mean; None where it cannot be told."""
        self._began = self._reading()

    def stop(self) -> None:
        """The measurement is over: see what else the machine did, and probe it again."""
        ended = self._reading()
        if self._began is not None and ended is not None:
            wall = max(ended[0] - self._began[0], 1e-6)
            work = ended[1] - self._began[1] - (ended[2] - self._began[2])
            self.others = max(0.0, work / wall)
        self.after = Placement.probe(self._threads, seconds=self._seconds)

    def record(self, *, settings: dict[str, Any], **body: Any) -> dict[str, Any]:
        """The whole result, JSON-safe."""
        found: Any = msgspec.to_builtins(
            {
                "kind": self._kind,
                "version": 1,
                "taken": self._taken.isoformat(timespec="seconds"),
                "commit": commit(),
                "command": self._command,
                "machine": facts(),
                "placement": {"before": self.before, "after": self.after},
                "others_cores": self.others,
                "settings": settings,
                **body,
            },
            enc_hook=str,
        )
        assert isinstance(found, dict)
        return found

    def _reading(self) -> tuple[float, Busy, float] | None:
        """Wall clock, the machine's work, and that of ourselves and our servers, in seconds."""
        if self._servers is None or not Path("/proc/stat").is_file():
            return None
        own = time.process_time() + sum(used() for used in self._servers)
        return time.perf_counter(), Busy.now(), own

    def line(self) -> str:
        """Both readings and the others' work, for a person."""
        others = "" if self.others is None else f"; other work took {self.others:.2f} processors"
        if self.before is None or self.after is None:
            return f"limits not probed: the native kernels are not built{others}"
        b, a = self.before, self.after
        return (
            f"limits before and after: {b.read_gb_s:.1f}, {a.read_gb_s:.1f} GB/s"
            f" · {b.int8_gop_s:.0f}, {a.int8_gop_s:.0f} GOP/s int8"
            f" · {b.roundtrip_ns:.0f}, {a.roundtrip_ns:.0f} ns core to core{others}"
        )


def save(path: Path, record: dict[str, Any]) -> None:
    """Write a record. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
