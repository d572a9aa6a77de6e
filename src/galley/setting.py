"""One setting: its name, where it is read from, and what it means."""

from collections.abc import Callable
from typing import Any

import msgspec

__all__ = ["Setting"]


class Setting(msgspec.Struct, frozen=True):
    """A row of ``settings.SETTINGS``. ``parse`` takes text or a TOML value; ValueError says why not."""

    key: str
    env: str
    parse: Callable[[Any], Any]
    default: Any
    help: str
    secret: bool = False
    in_file: bool = True

    @property
    def flag(self) -> str:
        """``--kv-memory`` for ``engine.kv_memory``."""
        return "--" + self.key.rpartition(".")[2].replace("_", "-")
