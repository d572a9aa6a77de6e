"""All models of one process: which are there, which sleep, and which must make room."""

import asyncio
import logging
from collections.abc import Callable

from galley.errors import ModelNotFound, Overloaded
from galley.providers.resident import Resident, Status
from galley.runtime.memory import size

__all__ = ["Fleet"]

log = logging.getLogger(__name__)


class Fleet:
    """Models that share a machine (SLP-4).

    Args:
        budget: bytes that awake models may take together, weights and KV cache; None is no limit.
        idle_s: seconds without a request after which a model falls asleep; None never.
        sizes: bytes that a model is expected to take when it wakes, by its id.
    """

    def __init__(
        self, *, budget: int | None = None, idle_s: float | None = None, sizes: Callable[[str], int]
    ) -> None:
        self.budget = budget
        self.idle_s = idle_s
        self._sizes = sizes
        self._models: dict[str, Resident] = {}
        self._making = asyncio.Lock()

    def add(self, resident: Resident) -> None:
        """Serve one more model; its idle timeout is the fleet's."""
        resident.idle_after_s = self.idle_s
        self._models[resident.card.id] = resident

    def remove(self, name: str) -> Resident:
        """Forget a model. Raises ModelNotFound."""
        resident = self.find(name)
        del self._models[name]
        return resident

    def find(self, name: str) -> Resident:
        """Raises ModelNotFound."""
        if name not in self._models:
            raise ModelNotFound(name[:200], nearest=sorted(self._models)[:3])
        return self._models[name]

    def residents(self) -> list[Resident]:
        """Every model, in the order added."""
        return list(self._models.values())

    def status(self) -> list[Status]:
        """Every model, the busiest first."""
        found = [resident.status() for resident in self._models.values()]
        return sorted(found, key=lambda one: (one.state != "awake", one.idle_s))

    def stay(self, name: str, idle_s: float | None) -> bool:
        """How long a model stays awake without requests, from now on: seconds (``inf`` for ever), or None for
        the fleet's own time. False for a model that is none of the fleet's, which nothing changes."""
        resident = self._models.get(name)
        if resident is None:
            return False
        resident.idle_after_s = self.idle_s if idle_s is None else None if idle_s == float("inf") else idle_s
        return True

    async def make(self, resident: Resident) -> None:
        """Room for a model that wakes: the least recently used ones fall asleep, pinned and busy ones never.

        Raises Overloaded when that would not be enough.
        """
        if self.budget is None:
            return
        async with self._making:
            need = self._sizes(resident.card.id)
            idle = [
                other
                for other in self._models.values()
                if other is not resident and other.opened is not None and not other.pinned and not other.users
            ]
            idle.sort(key=lambda other: other.last_used)
            while (taken := self._taken(resident)) + need > self.budget:
                if not idle:
                    raise Overloaded(
                        f"The model {resident.card.id!r} needs {size(need)}; {size(taken)} of the"
                        f" {size(self.budget)} for models are in use and none is idle.",
                        code="no_memory",
                        retry_after_s=5.0,
                    )
                other = idle.pop(0)
                if await other.sleep():
                    log.info("%s sleeps, to make room for %s", other.card.id, resident.card.id)

    def _taken(self, but: Resident) -> int:
        taken = 0
        for other in self._models.values():
            if other is not but and other.opened is not None:
                taken += other.opened.bytes
            elif other is not but and other.state == "waking":
                taken += self._sizes(other.card.id)
        return taken

    async def watch(self, every_s: float = 1.0) -> None:
        """Put models to sleep that nobody has asked for in a while. Runs until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            for resident in list(self._models.values()):
                status = resident.status()
                if status.sleeps_in_s == 0.0 and not resident.users:
                    await resident.sleep()

    async def close(self) -> None:
        """Close every model, whatever it does. Idempotent."""
        for resident in self._models.values():
            await resident.shut()
