"""The adapters of one served model: loaded and unloaded while it answers."""

import asyncio
from collections.abc import Iterable
from pathlib import Path

import msgspec

from galley.errors import InvalidRequest, ModelNotFound, Overloaded, PermissionDenied
from galley.model.adapter import Adapter
from galley.model.spec import ModelSpec
from galley.providers.base import ModelCard

__all__ = ["Adapters"]


class Adapters:
    """Adapters by name, with the requests that use them (LRA-3). Belongs to one event loop.

    Args:
        allowed: folders from which a client may have adapters loaded (LRA-6); none means none.
        max_rank: largest rank that is loaded.
    """

    def __init__(self, *, allowed: Iterable[Path] = (), max_rank: int = 64) -> None:
        self._allowed = [folder.resolve() for folder in allowed]
        self._max_rank = max_rank
        self._known: dict[str, Adapter] = {}
        self._users: dict[str, int] = {}
        self._leaving: set[str] = set()
        self._gone: set[str] = set()

    def known(self) -> list[Adapter]:
        """All that are loaded."""
        return list(self._known.values())

    def check_path(self, path: Path) -> Path:
        """The real path of an adapter that a client names (LRA-6): it and its files lie, links followed,
        within an allowed folder. Raises PermissionDenied, which tells nothing of what is there."""
        real = path.expanduser().resolve()
        files = [real, *(real / name for name in ("adapter_config.json", "adapter_model.safetensors"))]
        for file in files if real.is_dir() else files[:1]:
            if not any(file.resolve().is_relative_to(folder) for folder in self._allowed):
                raise PermissionDenied(
                    f"{str(path)[:200]!r} is not in a folder from which adapters may be loaded.",
                    hint="The server's setting engine.lora_dirs lists those folders.",
                )
        return real

    def read(self, name: str, path: Path, spec: ModelSpec) -> Adapter:
        """Read an adapter's files. Blocks; raises AdapterRefused, BadModelFile."""
        return Adapter.open(path, name, spec, max_rank=self._max_rank)

    def add(self, adapter: Adapter) -> None:
        """Serve it from now on. Raises InvalidRequest when its name is taken."""
        if adapter.name in self._known:
            raise InvalidRequest(
                f"An adapter {adapter.name[:100]!r} is loaded already.", param="lora_name", code="name_taken"
            )
        self._known[adapter.name] = adapter
        self._gone.discard(adapter.name)

    def find(self, name: str) -> Adapter | None:
        """The adapter of that name; None when it never was one. Raises ModelNotFound for one that is being
        unloaded, or was: its name must not fall back to the base model."""
        if name in self._leaving or name in self._gone:
            raise ModelNotFound(name[:200], nearest=sorted(self._known)[:3])
        return self._known.get(name)

    def use(self, adapter: Adapter) -> None:
        """One more request uses it. Raises ModelNotFound when it is gone meanwhile."""
        if self.find(adapter.name) is not adapter:
            raise ModelNotFound(adapter.name[:200], nearest=sorted(self._known)[:3])
        self._users[adapter.name] = self._users.get(adapter.name, 0) + 1

    def done(self, adapter: Adapter) -> None:
        """One request less."""
        self._users[adapter.name] -= 1

    def users(self, name: str) -> int:
        """Requests in hand that use it."""
        return self._users.get(name, 0)

    async def unload(self, name: str, *, wait_s: float = 30.0) -> Adapter:
        """Let nothing new in, wait for what is in hand, then forget it (LRA-3).

        Raises ModelNotFound, and Overloaded when that takes too long: it is then served as before.
        """
        adapter = self.find(name)
        if adapter is None:
            raise ModelNotFound(name[:200], nearest=sorted(self._known)[:3])
        self._leaving.add(name)
        try:
            async with asyncio.timeout(wait_s):
                while self.users(name):
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise Overloaded(
                f"The adapter {name[:100]!r} is still in use.", code="model_busy", retry_after_s=5.0
            ) from None
        finally:
            self._leaving.discard(name)
        del self._known[name]
        self._users.pop(name, None)
        self._gone.add(name)
        return adapter

    def cards(self, base: ModelCard) -> list[ModelCard]:
        """As models, each with its parent."""
        return [
            msgspec.structs.replace(base, id=name, parent=base.id, served_by=f"{base.served_by}+{name}")
            for name in self._known
        ]
