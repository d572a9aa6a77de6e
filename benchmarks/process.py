"""A process and its descendants: processor time, peak memory, whether it lies still."""

import time
from pathlib import Path

__all__ = ["Busier", "ProcessTree"]

_SCHED_CLOCK = 2
"""CPUCLOCK_SCHED of linux/posix-timers.h: a whole process, its ended threads too, in nanoseconds."""


class Busier(RuntimeError):
    """A process uses processor time while it should wait."""


class ProcessTree:
    """The process ``pid`` and what it started. Linux."""

    def __init__(self, pid: int, name: str) -> None:
        self.pid = pid
        self.name = name

    def members(self) -> list[int]:
        """Process ids, parents first; those that end meanwhile are left out."""
        found, todo = [], [self.pid]
        while todo:
            pid = todo.pop()
            try:
                for task in Path(f"/proc/{pid}/task").iterdir():
                    todo += [int(child) for child in (task / "children").read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue
            found.append(pid)
        return found

    def cpu_seconds(self) -> float:
        """Processor time used so far by all living members, including their threads that ended."""
        total = 0.0
        for pid in self.members():
            try:
                total += time.clock_gettime((~pid << 3) | _SCHED_CLOCK)
            except OSError:  # it ended since
                continue
        return total

    def peak_rss_mb(self) -> float:
        """Sum of the members' largest resident sets (1e6 bytes); a mapped file counts where it was read."""
        total = 0
        for pid in self.members():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            total += sum(
                int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")
            )
        return total / 1e6

    def rest(self, *, window_s: float = 0.03, share: float = 0.02, patience_s: float = 3.0) -> float:
        """Wait until the tree is idle; return the seconds that took.

        Idle: less than ``share`` of one core over ``window_s``. Raises Busier after ``patience_s``: a worker
        then spins between commands and nothing measured beside it would mean anything.
        """
        start = time.monotonic()
        before = self.cpu_seconds()
        while True:
            time.sleep(window_s)
            after = self.cpu_seconds()
            if after - before < share * window_s:
                return time.monotonic() - start
            if time.monotonic() - start > patience_s:
                raise Busier(f"{self.name} keeps a core busy while it should wait")
            before = after
