"""How the harness starts Galley: the same seam as a peer, one variant for each instruction set."""

import importlib
import os
import sys
from typing import Any

from benchmarks.protocol import Driver
from benchmarks.report import ROOT

__all__ = ["available_isas", "start_galley"]


def available_isas() -> list[str]:
    """Instruction sets the native backend can run here, best first. Raises ImportError without it."""
    native: Any = importlib.import_module("galley._native")
    return [str(isa) for isa in native.isa_available()]


def start_galley(*, isa: str | None = None, kind: str = "native", kv_type: str = "f16") -> Driver:
    """A Galley driver process; ``isa`` forces an instruction set, ``kv_type`` is ``f16`` or ``int8``."""
    command = [sys.executable, "-m", "benchmarks.galley_driver", "--backend", kind]
    if kv_type != "f16":
        command += ["--kv-type", kv_type]
    if isa is not None:
        command += ["--isa", isa]
    paths = [str(ROOT), *(p for p in sys.path if p)]
    name = f"galley {isa}" if isa else "galley" if kind == "native" else f"galley {kind}"
    if kv_type != "f16":
        name += f", {kv_type} KV"
    return Driver(name, command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
