"""The machine a figure belongs to: what it is, what else it does, and what it can do at this moment."""

import importlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Self

import msgspec

import galley
from galley.runtime.backend import native_missing
from galley.runtime.processors import Busy, Processors

__all__ = ["Busy", "Placement", "commit", "facts"]

PROBE_MEGABYTES = 256
"""Well over any last-level cache, so that memory is measured and not a cache."""
ISA_FLAGS = (
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


class Placement(msgspec.Struct, frozen=True):
    """One reading of the limits. Virtual cores move, so it belongs beside every figure.

    Attributes:
        roundtrip_ns: one cache line from core to core and back: tells whether they share a cache.
        read_gb_s: all threads reading a buffer far larger than the caches.
        int8_gop_s: all threads, the widest int8 dot products in registers; two operations a product.
    """

    threads: int
    roundtrip_ns: float
    read_gb_s: float
    int8_gop_s: float

    @classmethod
    def probe(cls, threads: int, *, seconds: float = 0.5, megabytes: float = PROBE_MEGABYTES) -> Self | None:
        """Measure for about ``seconds``; None where the native kernels are not built.

        ``megabytes``: size of the buffer read. That of a model lets the caches help both alike.
        """
        if native_missing() is not None:
            return None
        native: Any = importlib.import_module("galley._native")
        return cls(
            threads=threads,
            roundtrip_ns=native.probe_roundtrip(0.2 * seconds),
            read_gb_s=native.probe_bandwidth(threads, megabytes, 0.5 * seconds),
            int8_gop_s=native.probe_int8(threads, 0.3 * seconds),
        )


def facts() -> dict[str, Any]:
    """Processor, instruction sets that matter, cores, memory, kernel, Python, and Galley's version."""
    flags: set[str] = set()
    model: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            model.setdefault(name.strip(), value.strip())
        flags = set(model.get("flags", model.get("Features", "")).split())
    processors = Processors.read()
    return {
        "cpu": processors.name,
        "cpu_family_model_stepping": [model.get(k) for k in ("cpu family", "model", "stepping")],
        "cache": model.get("cache size"),
        "cores": processors.cores,
        "usable_cores": len(processors.usable),
        "physical_cores": len(processors.physical),
        "quota": processors.quota,
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "virtual": "hypervisor" in flags,
        "memory_gb": _memory_gb(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "galley": galley.__version__,
    }


def _memory_gb() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def commit(folder: Path | None = None) -> str:
    """The commit of a checkout, with ``+`` when tracked files differ from it.

    Installed as a package, or without git, it is ``galley <version>``. ``folder``: anywhere in the checkout;
    default: this package's own.
    """
    version = f"galley {galley.__version__}"
    place = folder or Path(galley.__file__).resolve().parent
    if folder is None and not (place.parents[1] / "pyproject.toml").is_file():
        # site-packages may lie inside some other repository
        return version
    git = ["git", "-C", str(place)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return version
    return head + ("+" if changed else "")
