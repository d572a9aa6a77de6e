"""Rooms behind the Backend seam, and the door that opens one."""

from typing import TYPE_CHECKING, NamedTuple

from galley.errors import ConfigError

if TYPE_CHECKING:
    from galley.model.gguf import GGUF
    from galley.model.spec import ModelSpec
    from galley.runtime.backend.base import Backend

__all__ = ["Opened", "native_missing", "open_backend"]


class Opened(NamedTuple):
    """A backend and, when it is not the best one, why."""

    backend: "Backend"
    warning: str | None


def native_missing() -> str | None:
    """Why the native kernels cannot be used here, or None when they can."""
    try:
        import galley._native  # noqa: F401
    except ImportError as e:
        return f"the native kernels are not built for this Python ({e})"
    return None


def open_backend(
    kind: str,
    gguf: "GGUF",
    spec: "ModelSpec",
    *,
    threads: int | None,
    num_blocks: int,
    isa: str | None = None,
    kv_type: str = "f16",
) -> Opened:
    """Open a backend: ``native``, ``reference``, or ``auto`` (native, else reference with a warning).

    The caller must show the warning; the choice is also in ``backend.name``.

    Raises:
        ConfigError: unknown kind, or ``native`` asked for and not possible.
    """
    if kind not in ("auto", "native", "reference"):
        raise ConfigError(f"unknown backend {kind!r}; use auto, native or reference", param="backend")
    warning: str | None = None
    if kind in ("auto", "native"):
        warning = native_missing()
        if warning is None:
            from galley.runtime.backend.native import NativeBackend

            try:
                return Opened(
                    NativeBackend(gguf, spec, threads=threads, num_blocks=num_blocks, isa=isa, kv=kv_type),
                    None,
                )
            except ValueError as e:
                warning = f"the native kernels cannot run this model ({e})"
        if kind == "native":
            raise ConfigError(
                warning,
                param="backend",
                hint="use --backend reference (slow), or install where a C++20 compiler is",
            )
    if isa is not None:
        raise ConfigError(
            f"isa {isa!r} was asked for, but {warning or 'the reference backend has none'}", param="isa"
        )
    if kv_type != "f16":
        raise ConfigError(
            f"KV of type {kv_type!r} was asked for, but {warning or 'the reference backend has none'}",
            param="kv_type",
        )
    from galley.runtime.backend.reference import ReferenceBackend

    backend = ReferenceBackend(gguf, spec, num_blocks=num_blocks)
    return Opened(
        backend, f"{warning}; using the numpy reference backend, which is slow" if warning else None
    )
