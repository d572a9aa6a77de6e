"""Processors this process may compute on, how many kernel threads that makes, and who else uses them."""

import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

__all__ = ["Busy", "Processors", "Threads"]


class Threads(msgspec.Struct, frozen=True, kw_only=True):
    """A number of kernel threads, why it is that many, and what is wrong with it, in words for a person."""

    count: int
    why: str
    warnings: tuple[str, ...] = ()


class Processors(msgspec.Struct, frozen=True, kw_only=True):
    """The processors of this machine as this process may use them."""

    name: str
    """Model name, as the processor tells it."""
    cores: int
    """Logical processors of the machine."""
    usable: tuple[int, ...]
    """Numbers of those in this process's affinity mask."""
    physical: tuple[tuple[int, ...], ...]
    """The usable ones, grouped by the physical core they share (simultaneous multithreading)."""
    quota: float | None = None
    """Processors' worth of time that the control groups allow; None is no limit."""
    quota_from: str | None = None
    """The file that says so."""

    @classmethod
    def read(cls, root: Path = Path("/"), usable: tuple[int, ...] | None = None) -> "Processors":
        """Read them now. ``root`` and ``usable`` (the affinity mask) are replaced in tests."""
        cores = os.cpu_count() or 1
        if usable is None:
            # Absent on macOS, where a process cannot be bound.
            mask = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(cores)
            usable = tuple(sorted(mask))
        groups: dict[tuple[int, ...], list[int]] = {}
        for number in usable:
            groups.setdefault(_siblings(root, number), []).append(number)
        quota, source = min(_quotas(root), default=(None, None))
        return cls(
            name=_name(root),
            cores=cores,
            usable=usable,
            physical=tuple(tuple(group) for group in groups.values()),
            quota=quota,
            quota_from=source,
        )

    def threads(self, asked: int | None = None, origin: str = "the caller") -> Threads:
        """How many kernel threads to run: ``asked``, else one for each physical core within the quota.

        One for each core, not for each sibling: siblings share the vector units that the kernels fill.
        Within the quota, because a group that has used up its time is stopped as a whole, in the middle
        of a step, with the others waiting at a barrier.
        """
        usable, physical = len(self.usable), len(self.physical)
        if asked is not None:
            return Threads(count=asked, why=f"asked for by {origin}", warnings=tuple(self._faults(asked)))
        count = physical
        why = f"one for each of {physical} usable cores"
        if physical < usable:
            why = f"one for each of {physical} physical cores ({usable} logical ones share their units)"
        elif usable < self.cores:
            why = f"one for each of {usable} cores in the affinity mask, of {self.cores} there are"
        if self.quota is not None and int(self.quota) < count:
            count = max(1, int(self.quota))
            why = (
                f"what the quota of {self.quota:g} processors ({self.quota_from}) allows of {physical} cores"
            )
        return Threads(count=count, why=why, warnings=tuple(self._faults(count)))

    def _faults(self, count: int) -> Iterator[str]:
        usable, physical = len(self.usable), len(self.physical)
        if count > usable:
            yield (
                f"{count} threads on {usable} usable processors: at every barrier all wait for those "
                "that are not running"
            )
        elif count > physical:
            yield f"{count} threads on {physical} physical cores: those on one core share its vector units"
        if self.quota is not None and count > self.quota:
            yield (
                f"{count} threads with a quota of {self.quota:g} processors ({self.quota_from}): "
                "the process will be stopped now and then, in the middle of a step"
            )


class Busy(msgspec.Struct, frozen=True):
    """Processor time of the whole machine so far, in seconds (resolution: one tick, 10 ms)."""

    used: float
    """User, nice, system and interrupts, of all processes."""
    stolen: float
    """Ready to run, but the host ran somebody else."""

    @classmethod
    def now(cls, proc: Path = Path("/proc")) -> "Busy":
        """Read ``/proc/stat``. Raises OSError where there is none (not Linux)."""
        fields = (proc / "stat").read_text().split("\n", 1)[0].split()[1:]
        tick = 1.0 / os.sysconf("SC_CLK_TCK")
        user, nice, system, _idle, _iowait, irq, soft, steal = (int(f) * tick for f in fields[:8])
        return cls(used=user + nice + system + irq + soft, stolen=steal)

    def __sub__(self, earlier: "Busy") -> float:
        """Seconds used or stolen since ``earlier``."""
        return self.used - earlier.used + self.stolen - earlier.stolen


def _name(root: Path) -> str:
    with suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _siblings(root: Path, number: int) -> tuple[int, ...]:
    """Logical processors on the same physical core; itself alone where the system does not tell."""
    path = root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
    found: list[int] = []
    with suppress(OSError, ValueError):
        for piece in path.read_text().strip().split(","):
            first, _, last = piece.partition("-")
            found += range(int(first), int(last or first) + 1)
    return tuple(sorted(found)) if number in found else (number,)


def _quotas(root: Path) -> Iterator[tuple[float, str]]:
    """(processors, file) of every control group above this process that limits its processor time.

    Groups nest and each may limit, so the whole path counts. Both versions of control groups; inside a
    container the path may name places that are not mounted, which limit nothing that could be read.
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                mounts = ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
            elif "cpu" in controllers.split(","):
                mounts = [f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"]
            else:
                continue
            for mount in mounts:
                inner = Path(path.lstrip("/"))
                for place in (inner, *inner.parents):
                    yield from _quota(root, Path(mount) / place)


def _quota(root: Path, group: Path) -> Iterator[tuple[float, str]]:
    with suppress(OSError, ValueError):
        quota, period = (root / group / "cpu.max").read_text().split()
        if quota != "max":
            yield int(quota) / int(period), f"/{group / 'cpu.max'}"
    with suppress(OSError, ValueError):
        limit = int((root / group / "cpu.cfs_quota_us").read_text())
        if limit > 0:
            whole = int((root / group / "cpu.cfs_period_us").read_text())
            yield limit / whole, f"/{group / 'cpu.cfs_quota_us'}"
